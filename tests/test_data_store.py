"""Stores hold what was tokenized, whatever the workers and the kills; damage is found and named."""

import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from gpt_jax.data.build import build_store
from gpt_jax.data.cache import build_folder, locked
from gpt_jax.data.readers import Progress
from gpt_jax.data.store import Split, open_store, open_token_file
from gpt_jax.data.tokenizer import ByteTokenizer, train_char
from gpt_jax.data.worker import Worker
from gpt_jax.errors import UserError

TOKENIZER = ByteTokenizer(("eot",))


def documents(count=200, seed=0):
    """(split, text): a tenth for validation, 1 to 200 characters of one to four bytes."""
    draw = random.Random(seed)
    return [
        (
            "valid" if draw.random() < 0.1 else "train",
            "".join(draw.choice("ab é東\U0001f600\n") for _ in range(draw.randrange(1, 200))),
        )
        for _ in range(count)
    ]


def contents(folder):
    """Every file of a store, by name: SHA-256."""
    files = sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_store_holds_an_eot_and_the_tokens_of_every_document_in_order(tmp_path):
    store = build_store(documents(), TOKENIZER, tmp_path / "s", chunk_size=500)
    for name, split in store.splits.items():
        texts = [t for s, t in documents() if s == name]
        rows = [[256, *t.encode()] for t in texts]
        assert split.tokens.dtype == np.dtype("<u2")
        np.testing.assert_array_equal(split.tokens, np.concatenate(rows))
        np.testing.assert_array_equal(split.starts, np.cumsum([0, *map(len, rows)])[:-1])
        np.testing.assert_array_equal(store.document_bytes(name), [len(t.encode()) for t in texts])
        assert split.num_bytes == sum(len(t.encode()) for t in texts) and split.num_documents == len(texts)
    assert store.load_tokenizer().hash == TOKENIZER.hash


def test_vocabulary_beyond_65536_is_stored_in_four_bytes(tmp_path):
    alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))) + "".join(map(chr, range(0x10000, 0x10000 + 46_000)))
    tokenizer = train_char([alphabet], 0, ("eot",), "error")
    store = build_store([("train", alphabet[-10:])], tokenizer, tmp_path / "s")
    assert store.split("train").tokens.dtype == np.dtype("<u4")
    assert store.split("train").tokens.tolist() == [66_000, *range(65_990, 66_000)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_store_is_the_same_bytes_whatever_the_workers(tmp_path, workers):
    build_store(documents(), TOKENIZER, tmp_path / "here", chunk_size=500)
    build_store(documents(), TOKENIZER, tmp_path / "there", chunk_size=500, workers=workers, small=2000)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


class Crash(Exception):
    pass


def crashing(items, after):
    for i, item in enumerate(items):
        if i == after:
            raise Crash
        yield item


@pytest.mark.parametrize("torn", ["", "data", "journal"])
def test_interrupted_build_goes_on_to_the_same_bytes(tmp_path, torn):
    """Crashes after every 23rd document more; what a torn write leaves behind the last journal line is cut off."""
    whole = build_store(documents(), TOKENIZER, tmp_path / "whole", chunk_size=500).path
    out, partial = tmp_path / "s", tmp_path / "s.partial"
    read = []
    for after in range(23, 200, 23):
        with pytest.raises(Crash):
            build_store(crashing(documents(), after), TOKENIZER, out, chunk_size=500)
        assert partial.is_dir() and not out.exists()
        lines = (partial / "journal.jsonl").read_text().splitlines()
        read.append(len(lines))
        if torn == "data":
            for name in ("train.tokens", "train.starts", "valid.bytes"):
                with open(partial / name, "ab") as file:
                    file.write(b"torn!!!")
        if torn == "journal":
            with open(partial / "journal.jsonl", "a") as file:
                file.write(lines[-1][: len(lines[-1]) // 2])
    assert read == sorted(read) and read[-1] > read[0] > 1  # what was finished is kept
    build_store(documents(), TOKENIZER, out, chunk_size=500)
    assert contents(out) == contents(whole) and not partial.exists()


def test_a_build_killed_while_it_ends_can_be_finished(tmp_path):
    """Between the manifest and the end of the journal, and inside the writing of the manifest."""
    whole = build_store(documents(), TOKENIZER, tmp_path / "whole", chunk_size=500).path
    with pytest.raises(Crash):
        build_store(crashing(documents(), 150), TOKENIZER, tmp_path / "s", chunk_size=500)
    (tmp_path / "s.partial" / "manifest.json").write_text("{}")
    (tmp_path / "s.partial" / ".manifest.json.1234.tmp").write_text("{")
    build_store(documents(), TOKENIZER, tmp_path / "s", chunk_size=500)
    assert contents(tmp_path / "s") == contents(whole)
    open_store(tmp_path / "s", TOKENIZER)


def test_journal_that_promises_more_than_the_files_hold_is_believed_only_as_far_as_they_go(tmp_path):
    whole = build_store(documents(), TOKENIZER, tmp_path / "whole", chunk_size=500).path
    with pytest.raises(Crash):
        build_store(crashing(documents(), 150), TOKENIZER, tmp_path / "s", chunk_size=500)
    tokens = tmp_path / "s.partial" / "train.tokens"
    os.truncate(tokens, tokens.stat().st_size // 2)
    build_store(documents(), TOKENIZER, tmp_path / "s", chunk_size=500)
    assert contents(tmp_path / "s") == contents(whole)


def test_unfinished_build_of_something_else_is_begun_anew(tmp_path):
    other = ByteTokenizer(("eot", "mask"))
    for first in (dict(tokenizer=other), dict(fingerprint={"sha256": "other"}), dict(chunk_size=300)):
        arguments = dict(tokenizer=TOKENIZER, chunk_size=500) | first
        with pytest.raises(Crash):
            build_store(crashing(documents(), 150), out=tmp_path / "s", **arguments)
        build_store(documents(), TOKENIZER, tmp_path / "s", chunk_size=500)
        build_store(documents(), TOKENIZER, tmp_path / "whole", chunk_size=500)
        assert contents(tmp_path / "s") == contents(tmp_path / "whole")
        for path in (tmp_path / "s").rglob("*"):
            path.is_file() and path.unlink()
        os.rename(tmp_path / "s", tmp_path / f"done{len(list(tmp_path.iterdir()))}")


SLOW_BUILD = """
    import random, sys, time
    sys.path.insert(0, {tests!r})
    from test_data_store import TOKENIZER, documents
    from gpt_jax.data.build import build_store

    def slowly():
        for item in documents():
            time.sleep(0.004)
            yield item

    print("go", flush=True)
    build_store(slowly(), TOKENIZER, {out!r}, chunk_size=500, workers={workers}, small=2000)
"""


def start_build(out, workers):
    code = textwrap.dedent(SLOW_BUILD.format(tests=str(pathlib.Path(__file__).parent), out=str(out), workers=workers))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_build_killed_at_random_moments_ends_in_the_same_bytes(tmp_path, workers):
    build_store(documents(), TOKENIZER, tmp_path / "whole", chunk_size=500)
    draw, kills = random.Random(workers), 0
    for _ in range(10):
        process = start_build(tmp_path / "s", workers)
        try:
            process.wait(timeout=0.05 + 0.8 * draw.random())
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    build_store(documents(), TOKENIZER, tmp_path / "s", chunk_size=500)
    assert kills >= 3
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_workers_die_with_the_process_that_started_them(tmp_path):
    process = start_build(tmp_path / "s", 2)
    deadline = time.monotonic() + 20
    while len(children := children_of(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(children) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, children))


def children_of(pid):
    import psutil

    try:
        return [c.pid for c in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def alive(pid):
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_mistake_found_by_a_worker_is_the_users(tmp_path):
    bad = [("train", "x" * 3000), ("train", "y" * 3000)]
    tokenizer = train_char(["x"], 0, ("eot",), "error")
    for small in (1000, 10_000):  # in a process, here
        with pytest.raises(UserError, match="'y' is not in the vocabulary"):
            build_store(bad, tokenizer, tmp_path / "s", chunk_size=500, workers=1, small=small)


def test_worker_that_is_killed_is_told(tmp_path):
    tokenizer = train_char(["x"], 0, ("eot",), "bytes")
    tokenizer.save(tmp_path)
    worker = Worker(tmp_path, "<u2")
    assert worker.encode(["xx"])[0].tolist() == [3]
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended with exit code -9"):
        worker.encode(["x" * 100_000])
    worker.close()


def test_worker_runs_the_code_of_its_process_not_of_the_current_folder(tmp_path, monkeypatch):
    TOKENIZER.save(tmp_path / "tokenizer")
    (tmp_path / "gpt_jax").mkdir()
    (tmp_path / "gpt_jax/__init__.py").write_text("raise SystemExit('another checkout')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # as the command line leaves it
    worker = Worker(tmp_path / "tokenizer", "<u2")
    assert worker.encode(["xx"])[0].tolist() == [3]
    worker.close()


def test_no_training_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="no document fell in the training split"):
        build_store([("valid", "x")], TOKENIZER, tmp_path / "s")


def test_full_disk_is_one_line_and_the_build_goes_on_when_there_is_room(tmp_path):
    """The limit on the size of a file stands for the end of the disk."""
    code = textwrap.dedent(f"""
        import resource, sys
        sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
        from test_data_store import TOKENIZER, documents
        from gpt_jax.data.build import build_store
        from gpt_jax.errors import UserError
        try:
            build_store(documents(), TOKENIZER, {str(tmp_path / "s")!r}, chunk_size=500)
        except UserError as error:
            print(error)
    """)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.count("\n") == 1 and "no space left on the device for the token store" in out.stdout
    build_store(documents(), TOKENIZER, tmp_path / "s", chunk_size=500)
    build_store(documents(), TOKENIZER, tmp_path / "whole", chunk_size=500)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_report_says_how_fast_and_how_long(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt_jax.data.build._REPORT_SECONDS", 0.0)
    progress, lines = Progress(total=200), []

    def reading():
        for item in documents():
            progress.done += 1
            yield item

    build_store(reading(), TOKENIZER, tmp_path / "s", chunk_size=500, progress=progress, log=lines.append)
    assert len(lines) > 10
    assert all("MB/s" in line for line in lines) and "eta" in lines[-2] and "%" in lines[-2]
    assert f"{sum(len(t.encode()) for _, t in documents()) / 1e6:,.1f} MB" in lines[-1]


@pytest.fixture
def store(tmp_path):
    return build_store(documents(), TOKENIZER, tmp_path / "s", chunk_size=500)


@pytest.mark.parametrize("name", ["train.tokens", "train.starts", "valid.bytes", "tokenizer/tokenizer_config.json"])
def test_damaged_file_is_named(store, name, monkeypatch):
    path = store.path / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"damaged: .*{name} has {len(data) - 1} bytes instead of {len(data)}"):
        open_store(store.path)
    path.unlink()
    with pytest.raises(UserError, match=rf"damaged: .*{name} is missing"):
        open_store(store.path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for verify in (None, True):  # a small store's are always compared
        with pytest.raises(UserError, match=rf"damaged: the checksum of .*{name} differs") as error:
            open_store(store.path, verify=verify)
    open_store(store.path, verify=False)  # sizes alone cannot tell
    monkeypatch.setattr("gpt_jax.data.store._VERIFIED", 10)
    open_store(store.path)
    assert "\n" not in str(error.value)
    path.write_bytes(data)
    open_store(store.path, TOKENIZER, verify=True)


def test_damaged_manifest_and_missing_store_are_named(store, tmp_path):
    with pytest.raises(UserError, match="no token store in"):
        open_store(tmp_path / "none")
    manifest = store.path / "manifest.json"
    text = manifest.read_text()
    for bad in (text[: len(text) // 2], "[]", "{}"):
        manifest.write_text(bad)
        with pytest.raises(UserError, match=r"damaged: .*manifest\.json") as error:
            open_store(store.path)
        assert "\n" not in str(error.value)
    manifest.write_text(json.dumps(json.loads(text) | {"format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        open_store(store.path)


def test_wrong_tokenizer_for_a_store_is_refused(store):
    with pytest.raises(UserError, match=r"made with another tokenizer \(byte, .*not with this one \(char"):
        open_store(store.path, train_char(["ab"], 0, ("eot",), "bytes"))


def test_reading_goes_round_the_end(store):
    split = store.split("valid")
    whole = np.tile(np.asarray(split.tokens), 3)
    begins = np.zeros(split.num_tokens, bool)
    begins[np.asarray(split.starts, int)] = True
    begins = np.tile(begins, 3)
    size = split.num_tokens
    for start, count in ((0, size), (size - 3, 10), (5, 2 * size), (size - 1, 1)):
        np.testing.assert_array_equal(split.read(start, count), whole[start : start + count])
        np.testing.assert_array_equal(split.begins(start, count), begins[start : start + count])
    assert split.read(0, 5).dtype == np.int32


# -- nanoGPT's token files -----------------------------------------------------------------------------------------


def test_token_file_of_nanogpt_is_read_in_place(tmp_path):
    texts = ["one", "naïve", "three"]
    stream = np.concatenate([[*t.encode(), 256] for t in texts]).astype(np.uint16)
    stream.tofile(tmp_path / "train.bin")
    split = open_token_file(tmp_path / "train.bin", TOKENIZER)
    assert isinstance(split, Split) and isinstance(split.tokens, np.memmap)
    np.testing.assert_array_equal(split.tokens, stream)
    assert split.starts.tolist() == [3, 10, 16]
    assert split.num_bytes == 3 + 6 + 5 and split.num_documents == 3


def test_token_file_is_counted_once(tmp_path, monkeypatch):
    np.array([97, 98, 256], np.uint16).tofile(tmp_path / "a.bin")
    first = open_token_file(tmp_path / "a.bin", TOKENIZER, tmp_path / "memo")
    monkeypatch.setattr("gpt_jax.data.store._count", None)
    again = open_token_file(tmp_path / "a.bin", TOKENIZER, tmp_path / "memo")
    assert (first.num_bytes, first.num_documents) == (again.num_bytes, again.num_documents) == (2, 1)


def test_token_file_of_another_tokenizer_and_broken_ones_are_refused(tmp_path):
    np.array([1, 300], np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"a\.bin holds token 300, but the tokenizer \(byte\) has 257"):
        open_token_file(tmp_path / "a.bin", TOKENIZER)
    (tmp_path / "b.bin").write_bytes(b"odd")
    with pytest.raises(UserError, match="has 3 bytes: not a file of uint16 tokens"):
        open_token_file(tmp_path / "b.bin", TOKENIZER)
    with pytest.raises(UserError, match="no such file"):
        open_token_file(tmp_path / "c.bin", TOKENIZER)


# -- the cache -----------------------------------------------------------------------------------------------------


def test_folder_of_the_cache_is_built_once_and_only_whole(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "a").write_text("half")
        if len(calls) == 1:
            raise Crash
        (folder / "b").write_text("done")

    with pytest.raises(Crash):
        build_folder(tmp_path / "x", build)
    assert not (tmp_path / "x").exists()
    for _ in range(2):
        assert sorted(p.name for p in build_folder(tmp_path / "x", build).iterdir()) == ["a", "b"]
    assert len(calls) == 2


HOLD = """
    import sys, time
    from gpt_jax.data.cache import locked
    with locked({path!r}):
        print("held", flush=True)
        time.sleep(60)
"""


def test_lock_excludes_and_dies_with_a_killed_process(tmp_path):
    code = textwrap.dedent(HOLD.format(path=str(tmp_path / "x")))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    lines = []
    kill = threading.Timer(0.5, lambda: os.kill(process.pid, signal.SIGKILL))
    kill.start()
    before = time.monotonic()
    with locked(tmp_path / "x", lines.append):
        waited = time.monotonic() - before
    process.wait()
    assert 0.3 < waited < 10 and len(lines) == 1 and "waiting for another process" in lines[0]
