"""Tokenizes a large synthetic .jsonl.zst through `gpt-jax data`: MB/s by workers, peak memory, and kills.

    python scripts/bench_tokenize.py --source 'texts/*.jsonl.xz' --tokenizer gpt2_bpe/ --megabytes 300

The corpus is made of paragraphs of the source, drawn at random into documents. It is tokenized with GPT-2's BPE by 1
and by 2 workers; then once more, killed (kill -9, the whole process group) at random moments and started again until
it is done. All stores must have the same bytes. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import psutil
import zstandard

from gpt_jax.data import prepare_data
from gpt_jax.data.corpora import open_corpus
from gpt_jax.data.loader import Loader
from gpt_jax.data.readers import expand_variables
from gpt_jax.errors import UserError


def make_corpus(source: str, path: pathlib.Path, size: int, seed: int = 0) -> int:
    """Writes documents of 1 to 40 random paragraphs of `source` to `path`; returns the bytes of text (about `size`)."""
    corpus = open_corpus("python_source") if source == "python_source" else open_corpus(path=source)
    paragraphs = [p for _, text in corpus.documents() for p in text.split("\n") if p]
    draw, written, number = random.Random(seed), 0, 0
    with open(path, "wb") as raw, zstandard.ZstdCompressor(level=3, threads=2).stream_writer(raw) as file:
        while written < size:
            text = "\n".join(draw.choices(paragraphs, k=draw.randrange(1, 41)))
            file.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False).encode() + b"\n")
            written, number = written + len(text.encode()), number + 1
    return written


def start(corpus: pathlib.Path, tokenizer: str, cache: pathlib.Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "gpt_jax.cli", "data"]
    options = {
        "data.path": corpus,
        "data.workers": workers,
        "data.tokenizer.kind": "gpt2",
        "data.tokenizer.path": tokenizer,
        "data.tokenizer.specials": "eot",
    }
    command += [f"--config.{key}={value}" for key, value in options.items()]
    environment = {**os.environ, "GPT_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def memory(pid: int) -> int:
    """Returns the resident bytes of a process and all its descendants."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        pass
    return total


def run(corpus: pathlib.Path, tokenizer: str, cache: pathlib.Path, workers: int) -> dict[str, float]:
    """Runs `gpt-jax data` to its end; returns seconds, MB/s of tokenizing and the peak memory of the process tree."""
    began, peak = time.monotonic(), 0
    process = start(corpus, tokenizer, cache, workers)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout))
    reader.start()
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.05)
    reader.join()
    if process.returncode:
        raise RuntimeError(f"gpt-jax data ended with {process.returncode}: {''.join(lines[-3:])}")
    rates = [float(m[1]) for line in lines if (m := re.search(r"([\d.]+) MB/s", line))]
    return {
        "seconds": round(time.monotonic() - began, 1),
        "mb_per_s": rates[-1] if rates else 0.0,
        "peak_mb": round(peak / 1e6, 1),
        "tokens": json.loads(lines[-1])["tokens"]["train"],
    }


def run_killed(
    corpus: pathlib.Path, tokenizer: str, cache: pathlib.Path, workers: int, kills: int, longest: float
) -> list[int]:
    """Starts `gpt-jax data`, kills its process group at random moments of the build, then lets it end.

    Returns the chunks that were finished at each kill.
    """
    draw, chunks = random.Random(0), []
    while len(chunks) < kills:
        before = chunks[-1] if chunks else 0
        process = start(corpus, tokenizer, cache, workers)
        while finished_chunks(cache) <= before and process.poll() is None:
            time.sleep(0.1)
        try:
            process.communicate(timeout=draw.uniform(0, longest))
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if not finished_chunks(cache):
            break  # the build was over
        chunks.append(finished_chunks(cache))
    run(corpus, tokenizer, cache, workers)
    return chunks


def finished_chunks(cache: pathlib.Path) -> int:
    """Returns how many chunks the journal of the unfinished store counts; 0 if there is none."""
    journals = list(cache.glob("stores/*.partial/journal.jsonl"))
    return journals[0].read_text().count("\n") - 1 if journals else 0


def fingerprint(cache: pathlib.Path) -> str:
    """Returns a hash of every file of the one store in a cache."""
    (store,) = [p for p in (cache / "stores").iterdir() if p.is_dir()]
    digest = hashlib.sha256()
    for path in sorted(p for p in store.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            digest.update(f"{path.relative_to(store)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def loader_speed(cache: pathlib.Path, corpus: pathlib.Path, tokenizer: str, doc_mask: bool) -> float:
    """Returns tokens/s of the loader alone: rows of 1,024, batches of 32."""
    from gpt_jax.config import DataConfig, TokenizerConfig

    config = DataConfig(
        path=str(corpus),
        doc_mask=doc_mask,
        tokenizer=TokenizerConfig(kind="gpt2", path=tokenizer, specials=("eot",)),
    )
    data = prepare_data(config, context_length=1024, batch_size=32, seed=0, cache_dir=cache, log=None)
    with Loader(data.train, prefetch=4) as loader:
        for _ in range(20):
            next(loader)
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < 3:
            next(loader)
            steps += 1
        return steps * 32 * 1024 / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="$GPT_JAX_DATA/lm/novels_en_train.jsonl.xz", help="text, or python_source")
    parser.add_argument("--tokenizer", default="$GPT_JAX_DATA/gpt2_bpe", help="folder of GPT-2's two files")
    parser.add_argument("--megabytes", type=float, default=300, help="text to tokenize")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--folder", default="", help="where to work; a temporary folder, removed at the end, if empty")
    args = parser.parse_args()
    folder = pathlib.Path(args.folder or tempfile.mkdtemp(prefix="bench_tokenize."))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = expand_variables(args.tokenizer)
        corpus = folder / "synthetic.jsonl.zst"
        size = make_corpus(args.source, corpus, int(args.megabytes * 1e6))
        print(f"{size / 1e6:,.1f} MB of text in {corpus.stat().st_size / 1e6:,.1f} MB of .jsonl.zst")
        report: dict = {"text_mb": round(size / 1e6, 1), "workers": {}}
        prints = set()
        for workers in args.workers:
            cache = folder / f"cache{workers}"
            shutil.rmtree(cache, ignore_errors=True)
            report["workers"][workers] = found = run(corpus, tokenizer, cache, workers)
            prints.add(fingerprint(cache))
            print(
                f"{workers} worker(s): {found['mb_per_s']:6.2f} MB/s, {found['seconds']:6.1f} s in all, "
                f"peak {found['peak_mb']:,.0f} MB, {found['tokens']:,} tokens"
            )
        if args.kills:
            cache = folder / "killed"
            shutil.rmtree(cache, ignore_errors=True)
            longest = 0.7 * found["seconds"] / args.kills
            report["kills"] = run_killed(corpus, tokenizer, cache, args.workers[-1], args.kills, longest)
            prints.add(fingerprint(cache))
        report["identical"] = len(prints) == 1
        print(
            f"killed {report.get('kills', 0)} times: stores are {'identical' if report['identical'] else 'DIFFERENT'}"
        )
        for name, doc_mask in (("packed", False), ("doc_mask", True)):
            report[f"loader_{name}_tokens_per_s"] = round(loader_speed(cache, corpus, tokenizer, doc_mask))
            print(f"loader alone, {name}: {report[f'loader_{name}_tokens_per_s']:,} tokens/s")
        print(json.dumps(report))
        sys.exit(0 if report["identical"] else 1)
    finally:
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
