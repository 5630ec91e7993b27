"""The command `gpt-jax context`: what a run makes of its context, and of more than that, as figures and numbers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.context import figures
from gpt_jax.context.passkey import retrieval, shortest
from gpt_jax.context.perplexity import loss_by_budget, loss_by_position, row_losses, strided_perplexity
from gpt_jax.context.streaming import SINKS, streamed_losses
from gpt_jax.errors import UserError, choose
from gpt_jax.files import atomic_write
from gpt_jax.model import Transformer
from gpt_jax.remote import refuse_url

FIGURES = ("strided", "position", "budget", "streaming", "passkey")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--step", type=int, default=None, help="checkpoint; default: the newest")
    parser.add_argument("--weights", default="auto", help="raw | ema | average | auto")
    parser.add_argument("--out", default="", metavar="DIR", help="where figures go; default: WORKDIR/context")
    parser.add_argument("--figures", default=",".join(FIGURES), help="of " + ", ".join(FIGURES))
    parser.add_argument("--tokens", type=int, default=16384, help="of the validation text that are read")
    parser.add_argument("--longest", type=float, default=4.0, help="the longest text, in trained contexts")
    parser.add_argument("--sinks", type=int, default=SINKS, help="first tokens that a stream keeps")
    parser.add_argument("--trials", type=int, default=10, help="keys in a cell of the passkey figure")
    parser.add_argument("--batch-size", type=int, default=8, help="rows that go through the model at once")
    parser.add_argument("--seed", type=int, default=0, help="of the passkeys")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the figures are made of.

    Attributes:
      model, params: the run's. tokenizer: of the run. tokens: of its validation text. context: it was trained on.
    """

    model: Transformer
    params: Any
    tokenizer: Any
    tokens: np.ndarray
    context: int
    longest: int
    sinks: int
    trials: int
    batch_size: int
    seed: int


def main(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs the command."""
    from gpt_jax.run import restore_run

    names = [name.strip() for name in args.figures.split(",") if name.strip()]
    for name in names:
        choose("--figures", name, FIGURES)
    for flag, least in (("tokens", 2), ("longest", 1), ("trials", 1), ("batch_size", 1), ("sinks", 0)):
        if not least <= getattr(args, flag) < float("inf"):
            raise UserError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be at least {least}.")
    refuse_url(args.out, "--out", "write to a folder, then copy it to the bucket")
    if not args.out:
        refuse_url(args.workdir, "--workdir", "say with --out where figures go")
    run, params, step = restore_run(args.workdir, step=args.step, weights=args.weights, overrides=overrides)
    model = getattr(run.objective, "model", None)
    if model is None or not run.objective.generates:
        raise UserError(f"the objective {run.config.objective['name']!r} of {args.workdir!r} predicts no next token.")
    context = run.config.context_length
    if "streaming" in names and model.config.positions != "learned" and args.sinks >= context:
        raise UserError(f"--sinks is {args.sinks}; a stream in a cache of {context} keeps fewer.")
    setting = Setting(
        model,
        params["model"],
        run.data.tokenizer,
        _text(run, args.tokens),
        context,
        int(context * args.longest),
        args.sinks,
        args.trials,
        args.batch_size,
        args.seed,
    )
    folder = pathlib.Path(args.out or pathlib.Path(args.workdir) / "context")
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"workdir": args.workdir, "step": step, "context": context, "folder": str(folder)}
    for name in names:
        with run.step.context():
            numbers, draw = globals()[f"_{name}"](setting)
        if numbers is None:
            print(f"{name}: {draw}")
            continue
        atomic_write(folder / f"{name}.json", json.dumps(numbers, indent=1) + "\n")
        draw(folder / f"{name}.png")
        summary = _SUMMARIES[name](numbers)
        result |= {f"{name}/{key}": value for key, value in summary.items()}
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in summary.items()))
    print(json.dumps(result))
    return 0


def _text(run: Any, count: int) -> np.ndarray:
    """The first tokens of the run's validation text."""
    found = [split for name, split in run.data.splits.items() if name.rpartition("/")[2] == "valid"]
    if not found:
        raise UserError("the run has no validation text (data.valid_path, or data.valid_fraction above 0).")
    return found[0].read(0, min(count, found[0].num_tokens))


def _octaves(least: int, most: int) -> list[int]:
    """least, 2 least, ... up to most, which is among them."""
    out = []
    while least < most:
        out.append(least)
        least *= 2
    return [*out, most]


def _longest(setting: Setting) -> int:
    """The longest text: learned positions bound it."""
    config = setting.model.config
    return min(setting.longest, config.max_positions) if config.positions == "learned" else setting.longest


Drawn = tuple[Any, Callable[[pathlib.Path], None] | str]


def _strided(s: Setting) -> Drawn:
    strides = _octaves(max(1, s.context // 16), s.context)
    rows = [
        strided_perplexity(s.model, s.params, s.tokens, size=s.context, stride=stride, batch_size=s.batch_size)
        for stride in strides
    ]
    return rows, lambda path: figures.strided(path, rows)


def scaled_models(model: Transformer, factor: float) -> dict[str, Transformer]:
    """The model under the ways to stretch its rotary positions by `factor`, by name; just itself without them."""
    config = model.config
    if config.rope_scaling != "none":
        return {f"rope, {config.rope_scaling} x {config.rope_factor:g}": model}
    if config.positions != "rope" or factor <= 1:
        return {f"{config.positions} positions as trained": model}
    named = {"rope as trained": config}
    for kind, name in (("linear", "position interpolation"), ("ntk", "NTK-aware base")):
        named[f"{name} x {factor:g}"] = dataclasses.replace(config, rope_scaling=kind, rope_factor=factor)
    return {name: Transformer(config) for name, config in named.items()}


def _position(s: Setting) -> Drawn:
    length = _longest(s)
    if len(s.tokens) <= length:
        return None, f"left out: the validation text has {len(s.tokens)} tokens, fewer than a row of {length}"
    curves = {}
    for name, model in scaled_models(s.model, length / s.context).items():
        curve = loss_by_position(model, s.params, s.tokens, length=length, batch_size=s.batch_size)
        curves[name] = {key: value.tolist() for key, value in curve.items()}
    numbers = {"context": s.context, "curves": curves}
    return numbers, lambda path: figures.by_position(path, curves, s.context)


def _budget(s: Setting) -> Drawn:
    most = min(_longest(s), len(s.tokens) - 1)
    budgets = sorted({*_octaves(1, most), min(most, s.context)})
    rows = loss_by_budget(
        s.model, s.params, s.tokens, budgets=budgets, reference=min(most, s.context), batch_size=4 * s.batch_size
    )
    return {str(budget): row for budget, row in rows.items()}, lambda path: figures.by_budget(path, rows, s.context)


def _streaming(s: Setting) -> Drawn:
    if s.model.config.positions == "learned":
        return None, f"left out: {s.model.config.max_positions} learned positions cannot stream beyond them"
    size, rows = s.context, s.batch_size
    length = (len(s.tokens) - 1) // rows
    if length < 2 * size:
        return (
            None,
            f"left out: the validation text has {len(s.tokens)} tokens, fewer than {rows} streams of {2 * size}",
        )
    text = np.stack([s.tokens[i * length : (i + 1) * length + 1] for i in range(rows)])
    piece = max(1, size // 4)
    curves = {}
    for name, sinks in ((f"{s.sinks} sinks + {size - s.sinks} newest", s.sinks), (f"{size} newest alone", 0)):
        losses = streamed_losses(s.model, s.params, text, size=size, sinks=sinks)
        curves[name] = _stream_curve(losses, size, piece)
    curves["everything, without a limit"] = _stream_curve(row_losses(s.model, s.params, text, 1), size, piece)
    numbers = {"size": size, "streams": rows, "tokens": rows * length, "piece": piece, "curves": curves}
    return numbers, lambda path: figures.streaming(path, {k: c["pieces"] for k, c in curves.items()}, size, piece)


def _stream_curve(losses: np.ndarray, size: int, piece: int) -> dict[str, Any]:
    """Mean loss of all tokens, of those after the cache is full, and of each piece."""
    cut = losses[:, : losses.shape[1] // piece * piece].reshape(len(losses), -1, piece)
    return {
        "loss": float(losses.mean()),
        "full": float(losses[:, size:].mean()),
        "pieces": cut.mean((0, 2)).tolist(),
    }


def _passkey(s: Setting) -> Drawn:
    config, most = s.model.config, max(s.context, s.longest)
    wanted = sorted({s.context // 2, 3 * s.context // 4, s.context, *_octaves(s.context, most)})
    least = shortest(s.tokenizer) + 16  # keys differ in their tokens
    room = config.max_positions - 16 if config.positions == "learned" else most  # for the answer
    lengths = [length for length in wanted if least <= length <= room]
    if not lengths:
        return None, f"left out: needle and question alone take {least} of {wanted[-1]} tokens"
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    result = retrieval(s.model, s.params, s.tokenizer, lengths=lengths, depths=depths, trials=s.trials, seed=s.seed)
    return result, lambda path: figures.passkey(path, result, s.context)


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values))


_SUMMARIES: dict[str, Callable[[Any], dict[str, float]]] = {
    "strided": lambda rows: {f"perplexity_stride_{row['stride']}": row["perplexity"] for row in (rows[0], rows[-1])},
    "position": lambda n: {
        f"{part} {name}": _mean(curve["loss"][cut])
        for name, curve in n["curves"].items()
        for part, cut in (("within", slice(n["context"])), ("beyond", slice(n["context"], None)))
        if curve["loss"][cut]
    },
    "budget": lambda rows: {f"loss_{budget}": rows[budget]["loss"] for budget in (next(iter(rows)), list(rows)[-1])},
    "streaming": lambda n: {f"full {name}": curve["full"] for name, curve in n["curves"].items()},
    "passkey": lambda n: {
        f"exact_{length}": _mean([row[i] for row in n["exact"]]) for i, length in enumerate(n["lengths"])
    },
}
