"""The command `gpt-jax sample`: continues prompts from a run, streaming where there is one to read it."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from gpt_jax.errors import UserError
from gpt_jax.generation import batches_by_length, check_prompts, stream_batch
from gpt_jax.loading import Loaded, load
from gpt_jax.objectives.base import objective_class
from gpt_jax.sampling import Sampling

_CHUNK = 8  # tokens between two looks at the stop strings and the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--workdir", required=True, help="the run, or one of its checkpoints")
    parser.add_argument("--step", type=int, default=None, help="checkpoint; default: the newest")
    parser.add_argument("--weights", default="auto", help="raw | ema | average | auto")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given more than once")
    parser.add_argument("--prompts-file", default="", metavar="FILE", help="prompts, one a line; '-' is standard input")
    parser.add_argument("--interactive", action="store_true", help="read a prompt a line and answer each as it comes")
    parser.add_argument("--max-tokens", type=int, default=100, help="tokens generated per prompt")
    parser.add_argument("--num-samples", type=int, default=1, help="continuations of each prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k most likely tokens; 0 is off")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling; 1 is off")
    parser.add_argument("--min-p", type=float, default=0.0, help="drop tokens below min-p times the most likely one")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off")
    parser.add_argument("--stop", action="append", default=[], help="end a text before this string")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones follow")
    parser.add_argument("--json", action="store_true", help="print one JSON line with the texts, nothing else")


def main(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs the command."""
    if overrides:
        raise UserError(f"sample takes no --config.{next(iter(overrides))}: the run's own config is used.")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    if args.num_samples < 1:
        raise UserError(f"--num-samples is {args.num_samples}; it must be at least 1.")
    if args.interactive and (args.json or args.prompt or args.prompts_file or args.num_samples > 1):
        raise UserError("--interactive takes its prompts from standard input: one text each, without --json.")
    prompts = [] if args.interactive else read_prompts(args.prompt, args.prompts_file)
    run = load(args.workdir, step=args.step, weights=args.weights)
    objective = run.config.objective["name"]
    if not objective_class(objective).generates:
        raise UserError(
            f"the run in {args.workdir!r} has the objective {objective!r}, which does not teach it to continue a text; "
            "start one that does from its weights (init.from)."
        )
    settings = dict(max_tokens=args.max_tokens, sampling=sampling, stop=args.stop)
    if args.interactive:
        for number, line in enumerate(_typed_lines()):
            continue_texts(run, [line], seed=args.seed + number, live=sys.stdout, **settings)
        return 0
    repeated = [prompt for prompt in prompts for _ in range(args.num_samples)]
    live = sys.stdout if len(repeated) == 1 and not args.json else None
    texts = continue_texts(run, repeated, seed=args.seed, live=live, **settings)
    if args.json:
        rows = [{"prompt": p, "text": t} for p, t in zip(repeated, texts, strict=True)]
        print(json.dumps({"workdir": args.workdir, "step": run.step, "samples": rows}, ensure_ascii=False))
    elif live is None:
        for prompt, text in zip(repeated, texts, strict=True):
            print(f"{prompt}{text}\n---")
    return 0


def _typed_lines() -> Iterator[str]:
    """Lines of standard input; on a terminal with a mark that asks for one."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")


def read_prompts(given: Sequence[str], file: str) -> list[str]:
    """Prompts of the flags, of a file or of standard input; one empty prompt if there are none."""
    prompts = list(given)
    if file == "-":
        prompts += sys.stdin.read().splitlines()
    elif file:
        try:
            prompts += pathlib.Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts-file {file!r} cannot be read: {error}.") from None
    return prompts or [""]


def continue_texts(
    run: Loaded,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    seed: int = 0,
    live: TextIO | None = None,
) -> list[str]:
    """Continues prompts until EOT, a stop string or max_tokens.

    Args:
      run: of `load`. prompts: texts. stop: a text ends before the first of these. seed: prompt i has seed + i.
      live: where the first prompt and its continuation are written as they come, always valid UTF-8.

    Returns:
      The continuations.
    """
    eot = run.tokenizer.eot
    ids = [run.tokenizer.begin + run.tokenizer.encode(prompt).tolist() for prompt in prompts]
    ids = check_prompts(run.model, ids, max_tokens, eot)
    writers = [_Writer(run.tokenizer, stop, live if row == 0 else None) for row in range(len(ids))]
    for rows in batches_by_length(ids):
        chunks = stream_batch(
            run.model,
            run.params,
            [ids[row] for row in rows],
            max_tokens=max_tokens,
            sampling=sampling,
            eot=eot,
            seeds=[seed + row for row in rows],
            chunk=_CHUNK if live is not None or any(stop) else 0,
        )
        if live is not None and rows[0] == 0:
            live.write(prompts[0])
            live.flush()
        ended = None
        with contextlib.suppress(StopIteration):
            while True:
                tokens, _, _ = chunks.send(ended)
                for row, new in zip(rows, tokens.tolist(), strict=True):
                    writers[row].push(new, eot)
                ended = [writers[row].ended for row in rows]
    return [writer.finish() for writer in writers]


class _Writer:
    """Collects a text, holds back what may be the beginning of a stop string, and ends it there."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], live: TextIO | None) -> None:
        self._decoder, self._stop, self._live = tokenizer.stream(), [s for s in stop if s], live
        self._text, self._shown = "", 0
        self.ended = False

    def push(self, tokens: Sequence[int], eot: int | None) -> None:
        for token in tokens:
            if self.ended:
                return
            if token == eot:
                self.ended = True
                return
            self._text += self._decoder.push(token)
            found = [at for s in self._stop if (at := self._text.find(s)) >= 0]
            if found:
                self._text, self.ended = self._text[: min(found)], True
        held = max((len(s) - 1 for s in self._stop), default=0)
        self._show(len(self._text) if self.ended else len(self._text) - held)

    def finish(self) -> str:
        """Returns the text."""
        if not self.ended:
            self._text += self._decoder.flush()
        self._show(len(self._text))
        if self._live is not None:
            self._live.write("\n")
        return self._text

    def _show(self, upto: int) -> None:
        if self._live is not None and upto > self._shown:
            self._live.write(self._text[self._shown : upto])
            self._live.flush()
            self._shown = upto
