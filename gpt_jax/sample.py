"""The command `gpt-jax sample`: continues prompts from a run, streaming where there is one to read it."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from gpt_jax.context.truncation import POLICIES, truncate
from gpt_jax.errors import UserError, choose
from gpt_jax.generation import MAX_ROWS, batches_by_length, check_prompts, stream_batch
from gpt_jax.loading import Loaded, load
from gpt_jax.remote import refuse_url
from gpt_jax.sampling import Sampling

_CHUNK = 8  # tokens between two looks at the stop strings and the terminal
# Of flags that some ways to answer do not read: None tells that one was not given.
_DEFAULTS = {
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 0.95,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "num_samples": 1,
    "max_tokens": 100,
}
Fit = Callable[[list[int]], list[int]]
_SAMPLER = ("top_k", "top_p", "min_p", "repetition_penalty")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--workdir", required=True, help="the run, or one of its checkpoints")
    parser.add_argument("--step", type=int, default=None, help="checkpoint; default: the newest")
    parser.add_argument("--weights", default="auto", help="raw | ema | average | auto")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given more than once")
    parser.add_argument("--prompts-file", default="", metavar="FILE", help="prompts, one a line; '-' is standard input")
    parser.add_argument("--interactive", action="store_true", help="read a prompt a line and answer each as it comes")
    parser.add_argument(
        "--max-tokens", type=int, help="tokens generated per prompt; default: 100, or what fits learned positions"
    )
    parser.add_argument(
        "--overflow",
        default="",
        help="cuts prompts longer than the context: left | right | head_tail",
    )
    parser.add_argument("--num-samples", type=int, help="continuations of each prompt; default: 1")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: 0.8")
    parser.add_argument("--top-k", type=int, help="keep the k most likely tokens; default: 0, off")
    parser.add_argument("--top-p", type=float, help="nucleus sampling; 1 is off; default: 0.95")
    parser.add_argument("--min-p", type=float, help="drop tokens below min-p times the most likely one; default: 0")
    parser.add_argument("--repetition-penalty", type=float, help="default: 1, off")
    parser.add_argument("--beams", type=int, default=0, help="beam search with so many beams in place of sampling")
    parser.add_argument("--length-penalty", type=float, default=0.6, help="beams: log P / ((5 + n) / 6)^this")
    parser.add_argument(
        "--contrastive", type=float, metavar="ALPHA", help="contrastive search of this weight (0.6) among --top-k (4)"
    )
    parser.add_argument("--choice", action="append", default=[], help="answer with one of the texts so given")
    parser.add_argument("--normalise", default="sum", help="of choices: sum | token | byte | unconditional")
    parser.add_argument("--logprobs", action="store_true", help="with --json: each new token's log-probability")
    parser.add_argument("--html", default="", metavar="FILE", help="write a page with every token's probability")
    parser.add_argument("--stop", action="append", default=[], help="end a text before this string")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones follow")
    parser.add_argument("--json", action="store_true", help="print one JSON line with the texts, nothing else")


def main(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs the command."""
    if overrides:
        raise UserError(f"sample takes no --config.{next(iter(overrides))}: the run's own config is used.")
    given = {name: getattr(args, name) for name in _DEFAULTS if getattr(args, name) is not None}
    args = argparse.Namespace(**{**vars(args), **_DEFAULTS, **given})
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    for flag, value in (("--num-samples", args.num_samples), ("--max-tokens", args.max_tokens)):
        if value < 1:
            raise UserError(f"{flag} is {value}; it must be at least 1.")
    if args.interactive and (args.json or args.html or args.prompt or args.prompts_file or args.num_samples > 1):
        raise UserError("--interactive takes its prompts from standard input: one text each, no --json, no --html.")
    if args.beams < 0 or (args.beams and (args.interactive or args.num_samples > max(1, args.beams))):
        raise UserError(
            f"--beams is {args.beams}; it goes without --interactive, and with --num-samples of at most as many."
        )
    if args.choice and (args.beams or args.interactive or args.html or args.stop):
        raise UserError("--choice goes without --beams, --interactive, --html and --stop.")
    if args.contrastive is not None and (args.beams or args.choice or args.interactive):
        raise UserError("--contrastive goes without --beams, --choice and --interactive.")
    unread = {
        "--choice": (*_SAMPLER, "num_samples", "max_tokens"),
        "--beams": ("temperature", *_SAMPLER),
        "--contrastive": ("temperature", "top_p", "min_p", "repetition_penalty", "num_samples"),
    }
    for flag, names in unread.items():
        asked = getattr(args, flag[2:])
        for name in names if asked or (asked == 0.0 and flag == "--contrastive") else ():
            if name in given:
                raise UserError(f"{flag} goes without --{name.replace('_', '-')}, which is {given[name]}.")
    if args.choice and args.logprobs:
        raise UserError("--choice goes without --logprobs: it prints the probability of each choice.")
    if args.logprobs and not args.json:
        raise UserError("--logprobs is for --json; --html shows them on a page.")
    refuse_url(args.html, "--html", "write the page to a folder, then copy it to the bucket")
    prompts = [] if args.interactive else read_prompts(args.prompt, args.prompts_file)
    run = load(args.workdir, step=args.step, weights=args.weights)
    if not run.objective.generates:
        name = run.config.objective["name"]
        raise UserError(
            f"the run in {args.workdir!r} has the objective {name!r}, which does not teach it to continue a text; "
            "start one that does from its weights (init.from)."
        )
    if run.bidirectional_prompt:
        for flag in ("beams", "choice", "contrastive", "html", "logprobs"):
            if getattr(args, flag) not in (None, 0, False, "", []):
                raise UserError(
                    f"--{flag} reads a prompt from left to right, but the run in {args.workdir!r} was trained to see "
                    "all of it at once (objective.mask=prefix)."
                )

    if args.overflow:
        choose("--overflow", args.overflow, POLICIES)
    if args.html:
        _make_room(args.html)
    settings = dict(sampling=sampling, stop=args.stop)
    if args.interactive:
        for number, line in enumerate(_typed_lines()):
            try:
                settings |= _room(run, [line], args.max_tokens, "max_tokens" in given, args.overflow)
                settings |= dict(seed=args.seed + number)
                continue_texts(run, [line], live=sys.stdout, **settings)
            except UserError as error:  # of this line: the next one may be shorter
                print(f"gpt-jax: {error}", file=sys.stderr, flush=True)
        return 0
    if args.choice:
        return _print_choices(run, prompts, args, sampling)
    room = _room(run, prompts, args.max_tokens, "max_tokens" in given, args.overflow)
    repeated = [prompt for prompt in prompts for _ in range(args.num_samples)]
    searches = args.beams or args.contrastive is not None
    live = sys.stdout if len(repeated) == 1 and not (args.json or searches or args.html) else None
    if searches:
        rows = _search(run, prompts, args, given.get("top_k", 4), **room)
    else:
        settings |= dict(room, seed=args.seed)
        found = continue_prompts(run, repeated, live=live, **settings)
        rows = [{"prompt": p, "text": text, "ids": new} for p, (text, new) in zip(repeated, found, strict=True)]
    ids = [row.pop("ids") for row in rows]
    if args.logprobs or args.html:
        looks = [_look(run, row["prompt"], new, room["fit"]) for row, new in zip(rows, ids, strict=True)]
        if args.html:
            from gpt_jax.sample_page import write_page

            write_page(args.html, f"{args.workdir}, step {run.step}", looks, run.tokenizer)
        if args.logprobs:
            for row, (tokens, begin) in zip(rows, looks, strict=True):
                row["tokens"] = [run.tokenizer.decode([t.id], "show") for t in tokens[begin:]]
                row["logprobs"] = [math.log(t.probability) for t in tokens[begin:]]
    if args.json:
        print(json.dumps({"workdir": args.workdir, "step": run.step, "samples": rows}, ensure_ascii=False))
    elif live is None:
        for row in rows:
            print(f"{row['prompt']}{row['text']}\n---")
    if args.html and not args.json:
        print(f"page: {args.html}")
    return 0


def _make_room(page: str) -> None:
    """Makes the folder of a page before there are texts to lose."""
    path = pathlib.Path(page)
    if path.is_dir():
        raise UserError(f"--html is {page!r}, which is a folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--html is {page!r}, which cannot be written: {error}.") from None


def _look(run: Loaded, prompt: str, new: list[int], fit: Fit) -> tuple[list[Any], int]:
    """What the model thinks of each token of a prompt and its continuation, and where the latter begins."""
    from gpt_jax.sample_page import look_at

    before = fit(_prompt_ids(run, prompt))
    return look_at(run.model, run.params, before + new) if before + new else [], len(before)


def _prompt_ids(run: Any, prompt: str) -> list[int]:
    return run.tokenizer.begin + run.tokenizer.encode(prompt).tolist()


def _room(run: Loaded, prompts: Sequence[str], max_tokens: int, given: bool, overflow: str) -> dict[str, Any]:
    """How prompts and new tokens fit into the context: {"max_tokens", "fit": what cuts a prompt's ids}.

    Raises:
      UserError: a prompt that does not fit learned positions, and no policy to cut it by.
    """
    learned = run.model.config.positions == "learned"
    context = run.model.config.max_positions if learned else run.config.context_length
    lengths = [len(_prompt_ids(run, prompt)) for prompt in prompts]
    if not given and (learned or overflow):
        max_tokens = max(1, min(max_tokens, max(context - max(lengths), context // 2 if overflow else 1)))
    begin, room = run.tokenizer.begin, context - max_tokens
    if overflow and room <= len(begin):
        raise UserError(f"--max-tokens is {max_tokens}, which leaves nothing of the context of {context} for a prompt.")
    longest, how = max(lengths), f"--overflow={' | '.join(POLICIES)} cuts it"
    if learned and longest > room and not overflow:
        raise UserError(
            f"a prompt of {longest} tokens and max_tokens={max_tokens} do not fit the model's {context} learned "
            f"positions; {how}."
        )
    if longest > context and not overflow:
        print(f"gpt-jax: a prompt has {longest} tokens, the context of training {context}; {how}.", file=sys.stderr)

    def fit(ids: list[int]) -> list[int]:
        if not overflow or len(ids) <= room:
            return ids
        return [*begin, *truncate(ids[len(begin) :], room - len(begin), overflow)]

    return {"max_tokens": max_tokens, "fit": fit}


def _search(
    run: Loaded, prompts: Sequence[str], args: argparse.Namespace, k: int, max_tokens: int, fit: Fit
) -> list[dict[str, Any]]:
    """The best `num_samples` texts of each prompt by beam search, or the one of contrastive search among k candidates.

    What is after a stop string is cut off.
    """
    from gpt_jax.beam import beam_search
    from gpt_jax.contrastive import contrastive_search

    ids, settings = [fit(_prompt_ids(run, prompt)) for prompt in prompts], dict(max_tokens=max_tokens)
    settings |= dict(eot=run.tokenizer.eot)
    if args.beams:
        settings |= dict(beams=args.beams, alpha=args.length_penalty, results=args.num_samples)
        found = beam_search(run.model, run.params, ids, **settings)
    else:
        new = contrastive_search(run.model, run.params, ids, k=k, alpha=args.contrastive, **settings)
        found = [[(row, None)] for row in new]
    rows = []
    for prompt, hypotheses in zip(prompts, found, strict=True):
        for new, score in hypotheses:
            writer = _Writer(run.tokenizer, _prompt_ids(run, prompt), args.stop, None)
            writer.push(new, None)
            row = {"prompt": prompt, "text": writer.finish(), "ids": writer.ids}
            rows.append(row if score is None else {**row, "score": score})
    return rows


def _print_choices(run: Loaded, prompts: Sequence[str], args: argparse.Namespace, sampling: Sampling) -> int:
    from gpt_jax.choice import choose_texts

    options = dict(temperature=sampling.temperature, seed=args.seed, overflow=args.overflow or "error")
    found = choose_texts(run, prompts, args.choice, normalisation=args.normalise, **options)
    rows = [{"prompt": p, "text": t, "probabilities": q} for p, (t, q) in zip(prompts, found, strict=True)]
    if args.json:
        print(json.dumps({"workdir": args.workdir, "step": run.step, "samples": rows}, ensure_ascii=False))
        return 0
    for row in rows:
        shown = ", ".join(f"{choice!r} {p:.3f}" for choice, p in row["probabilities"].items())
        print(f"{row['prompt']}{row['text']}\n({shown})\n---")
    return 0


def _typed_lines() -> Iterator[str]:
    """Lines of standard input; on a terminal with a mark that asks for one."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = _valid(sys.stdin.readline, "standard input")
        if not line:
            return
        yield line.rstrip("\n")


def _valid(read: Callable[[], str], source: str) -> str:
    try:
        text = read()
        text.encode("utf-8")  # some locales let bytes through that are no text
    except UnicodeError as error:
        raise UserError(f"{source} is not valid UTF-8 ({error.reason}); a prompt is text.") from None
    return text


def read_prompts(given: Sequence[str], file: str) -> list[str]:
    """Prompts of the flags, of a file or of standard input; one empty prompt if there are none."""
    prompts = [_valid(lambda prompt=prompt: prompt, "--prompt") for prompt in given]
    if file == "-":
        prompts += _lines(_valid(sys.stdin.read, "standard input"), "standard input")
    elif file:
        try:
            text = pathlib.Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts-file {file!r} cannot be read: {error}.") from None
        prompts += _lines(text, f"--prompts-file {file!r}")
    return prompts or [""]


def _lines(text: str, source: str) -> list[str]:
    """Lines that end with a line feed alone: other characters that break lines may be part of a prompt."""
    if not text:
        raise UserError(f"{source} is empty: it holds no prompt.")
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def continue_texts(
    run: Loaded,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    seed: int = 0,
    live: TextIO | None = None,
    fit: Fit | None = None,
) -> list[str]:
    """Continues prompts until EOT, a stop string or max_tokens: the texts of `continue_prompts`."""
    settings = dict(max_tokens=max_tokens, sampling=sampling, stop=stop, seed=seed, live=live, fit=fit)
    return [text for text, _ in continue_prompts(run, prompts, **settings)]


def continue_prompts(
    run: Loaded,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    seed: int = 0,
    live: TextIO | None = None,
    fit: Fit | None = None,
) -> list[tuple[str, list[int]]]:
    """Continues prompts until EOT, a stop string or max_tokens.

    Args:
      run: of `load`, or a Scorer: what has model, params and tokenizer. prompts: texts; more than MAX_ROWS are
        batched continuously (not where a prompt's tokens see each other). stop: a text ends before the first of these.
        seed: prompt i has seed + i.
      live: where the first prompt and its continuation are written as they come, always valid UTF-8.
      fit: what cuts the ids of a prompt that is too long; None: nothing does.

    Returns:
      The continuation of each and its tokens, those of a stop string included.
    """
    eot = run.tokenizer.eot
    ids = [_prompt_ids(run, prompt) for prompt in prompts]
    ids = check_prompts(run.model, [fit(row) for row in ids] if fit else ids, max_tokens, eot)
    writers = [_Writer(run.tokenizer, prompt, stop, live if row == 0 else None) for row, prompt in enumerate(ids)]
    both_ways = getattr(run, "bidirectional_prompt", False)
    if len(ids) > MAX_ROWS and live is None and not both_ways:
        from gpt_jax.continuous import generate_continuously

        def ended(row: int, new: list[int]) -> bool:
            writers[row].push(new, eot)
            return writers[row].ended

        seeds = [seed + row for row in range(len(ids))]
        settings = dict(max_tokens=max_tokens, sampling=sampling, eot=eot, seeds=seeds)
        for _ in generate_continuously(run.model, run.params, ids, ended=ended, **settings):
            pass
        return [(writer.finish(), writer.ids) for writer in writers]
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
            bidirectional_prompt=both_ways,
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
    return [(writer.finish(), writer.ids) for writer in writers]


class _Writer:
    """Collects a text, holds back what may be the beginning of a stop string, and ends it there."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str], live: TextIO | None) -> None:
        self._decoder, self._stop, self._live = tokenizer.stream(before=prompt), [s for s in stop if s], live
        self._text, self._shown = "", 0
        self.ended, self.ids = False, []

    def push(self, tokens: Sequence[int], eot: int | None) -> None:
        for token in tokens:
            if self.ended:
                return
            if token == eot:
                self.ended = True
                return
            self.ids.append(token)
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
