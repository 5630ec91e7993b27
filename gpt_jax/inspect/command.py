"""The command `gpt-jax inspect`: looks into a checkpoint; numbers as JSON, figures as one HTML page to explore."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.files import atomic_write
from gpt_jax.inspect import compare, forward, heads
from gpt_jax.inspect.page import finite, inspection_page
from gpt_jax.inspect.probes import probe_task
from gpt_jax.loading import Loaded, load
from gpt_jax.objectives.base import Objective
from gpt_jax.remote import refuse_url
from gpt_jax.tasks import load_task

_SCORES = ("induction", "previous", "duplicate")
_OF_NEXT_TOKENS = ("position", "clean", "corrupt", "answers", "other")  # flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--workdir", required=True, help="the run, or one of its checkpoints")
    parser.add_argument("--step", type=int, default=None, help="checkpoint; default: the newest")
    parser.add_argument("--weights", default="auto", help="raw | ema | average | auto")
    parser.add_argument("--text", default="", help="what the model reads; default: held-out text of the run")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of it that are shown, at most")
    parser.add_argument("--texts", type=int, default=16, help="held-out texts that heads are judged on")
    parser.add_argument(
        "--position", type=int, default=-1, help="token after which a logit is taken apart; -1: the last"
    )
    parser.add_argument(
        "--clean", default="", help="activation patching: a prompt; with --corrupt, one of equal length"
    )
    parser.add_argument("--corrupt", default="", help="the prompt whose run is patched with activations of --clean's")
    parser.add_argument("--answers", nargs=2, default=[], metavar=("RIGHT", "WRONG"), help="first tokens to tell apart")
    parser.add_argument(
        "--other", default="", metavar="RUN", help="a checkpoint whose losses on the text to compare with"
    )
    parser.add_argument("--other-step", type=int, default=None, help="its step")
    parser.add_argument("--probe", default="", metavar="TASK", help="a tagging task: which layers know its tags")
    parser.add_argument("--out", default="", help="folder of inspect.json and inspect.html; default: RUN/inspect")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens that show what heads do")


def main(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs the command."""
    if overrides:
        raise UserError(f"inspect takes no --config.{next(iter(overrides))}: the run's own config is used.")
    if bool(args.clean) != bool(args.corrupt):
        raise UserError("activation patching needs both --clean and --corrupt.")
    if args.tokens < 2 or args.texts < 1:
        raise UserError(f"--tokens is {args.tokens} and --texts {args.texts}; at least 2 tokens and 1 text are needed.")
    if args.position < -1:
        raise UserError(f"--position is {args.position}; it is a token's number, from 0, or -1 for the last.")
    refuse_url(args.out, "--out", "write to a folder, then copy it to the bucket")
    if not args.out:
        refuse_url(args.workdir, "--workdir", "say with --out where pages and figures go")
    run = load(args.workdir, step=args.step, weights=args.weights)
    probed = _probe(run, args.probe) if args.probe else None
    numbers = inspect_run(run, args) | ({"probe": probed} if probed else {})
    out = pathlib.Path(args.out or pathlib.Path(args.workdir) / "inspect")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "inspect.json", json.dumps(finite(numbers), ensure_ascii=False, allow_nan=False) + "\n")
    name = f"{args.workdir.rstrip('/')}, step {run.step}"
    intro = (
        f"{run.config.objective['name']}, {run.config.model.num_layers} layers of {run.config.model.num_heads} heads, "
        f"width {run.config.model.d_model}. Attention shows where a head looks, not what it does: compare with what "
        "happens when it is cut out."
    )
    atomic_write(out / "inspect.html", inspection_page(f"Inside {name}", intro, page_data(run, numbers, name)))
    print(_lines(numbers))
    if probed:
        print(_probe_lines(args.probe, probed))
    summary = {"workdir": args.workdir, "step": run.step, **_best(numbers)}
    if "loss" in numbers:
        summary["loss"] = numbers["loss"]["mean"]
    if "difference" in numbers:
        summary["difference"] = float(np.mean(numbers["difference"]["difference"]))
    print(json.dumps({**finite(summary), "json": str(out / "inspect.json"), "html": str(out / "inspect.html")}))
    return 0


def _probe(run: Loaded, name: str) -> dict[str, Any]:
    subject = forward.subject_of(run.model, run.params, sees_left_only(run.objective))
    return probe_task(subject, run.tokenizer, load_task(name), longest=min(128, run.config.context_length))


def _probe_lines(name: str, probed: Mapping[str, Any]) -> str:
    lines = [f"probe of {name}: {probed['words']} words, most frequent tag {probed['majority']:.3f}"]
    lines.append("layer   accuracy  control  selectivity")
    for layer, values in enumerate(zip(probed["accuracy"], probed["control"], probed["selectivity"], strict=True)):
        lines.append(f"{layer:<5}   {values[0]:8.3f}  {values[1]:7.3f}  {values[2]:11.3f}")
    return "\n".join(lines)


def sees_left_only(objective: Objective) -> bool:
    """Whether an objective trains its model under the causal mask; one made of several, whether any of them does."""
    if children := getattr(objective, "children", {}):
        return any(sees_left_only(child) for child in children.values())
    return getattr(objective, "mask", "causal" if objective.generates else "bidirectional") != "bidirectional"


def inspect_run(run: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command measures, by name."""
    objective, name = run.objective, run.config.objective["name"]
    for flag in () if objective.generates else _OF_NEXT_TOKENS:
        if (value := getattr(args, flag)) not in ("", [], -1):
            raise UserError(f"--{flag} is {value!r}, but the objective {name!r} of the run predicts no next token.")
    subject = forward.subject_of(run.model, run.params, sees_left_only(objective))
    room = run.config.model.max_positions if run.config.model.positions == "learned" else 1 << 30
    texts = _texts(run, args, min(room, max(args.tokens, min(run.config.context_length, 128))))
    text = texts[0][: min(args.tokens, room)]
    attention = forward.attention_maps(subject, text)
    numbers: dict[str, Any] = {
        "tokens": [run.tokenizer.decode([int(i)]) for i in text],
        "ids": text,
        "attention": np.round(attention, 4),
        "lens": _named(run, forward.logit_lens(subject, text)),
    }
    if objective.generates:
        numbers |= _of_a_language_model(run, subject, args, texts, text)
    return numbers


def _of_a_language_model(
    run: Loaded, subject: forward.Subject, args: argparse.Namespace, texts: Sequence[np.ndarray], text: np.ndarray
) -> dict[str, Any]:
    # First what may turn out to be a mistake: the rest takes longer.
    position = args.position if args.position >= 0 else len(text) - 1
    if position >= len(text):
        raise UserError(f"--position is {args.position}; the text shown has tokens 0 to {len(text) - 1}.")
    compared: dict[str, Any] = {}
    if args.clean:
        compared["patching"] = _patching(run, subject, args)
    if args.other:
        compared["difference"] = _difference(run, subject, args, text)
    length = min(map(len, texts))
    batch = np.stack([t[:length] for t in texts])
    specials = tuple(run.tokenizer.specials.values())
    patterns = heads.head_patterns(subject, seed=args.seed, avoid=specials)
    losses = np.asarray(forward.token_losses(subject(text[None]).logits, text[None])[0])
    likeliest = int(np.argmax(np.asarray(subject(text[None]).logits[0, position])))
    part = forward.attribute_logit(subject, text, position, likeliest)
    late = len(losses) // 2
    return {
        "patterns": patterns,
        "reach": heads.reach(subject, batch),
        "importance": heads.head_importance(subject, batch),
        "zero_ablation": heads.ablate_heads(subject, batch, "zero"),
        "mean_ablation": heads.ablate_heads(subject, batch, "mean"),
        "loss": {
            "tokens": losses,
            "mean": float(losses.mean()),
            "early_minus_late": float(losses[:late].mean() - losses[late:].mean()),
        },
        "attribution": {**part, "position": position, "token": run.tokenizer.decode([likeliest])},
        **compared,
    }


def _difference(run: Loaded, subject: forward.Subject, args: argparse.Namespace, text: np.ndarray) -> dict[str, Any]:
    other = load(args.other, step=args.other_step, weights=args.weights)
    if other.tokenizer.hash != run.tokenizer.hash:
        raise UserError(f"--other {args.other!r} has another tokenizer than {args.workdir!r}: tokens do not compare.")
    if not other.objective.generates:
        name = other.config.objective["name"]
        raise UserError(f"--other {args.other!r} has the objective {name!r}, which predicts no next token.")
    theirs = forward.subject_of(other.model, other.params)
    name = f"{args.other.rstrip('/')}, step {other.step}"
    return {**compare.loss_difference(subject, theirs, text), "name": name}


def _patching(run: Loaded, subject: forward.Subject, args: argparse.Namespace) -> dict[str, Any]:
    begin = [] if run.tokenizer.eot is None else [run.tokenizer.eot]
    clean, corrupt = (np.array(begin + run.tokenizer.encode(t).tolist(), np.int32) for t in (args.clean, args.corrupt))
    answers = None
    if args.answers:
        ids = [run.tokenizer.encode(answer).tolist() for answer in args.answers]
        if not all(ids) or ids[0][0] == ids[1][0]:
            raise UserError(f"--answers are {' '.join(map(repr, args.answers))}; they need different first tokens.")
        answers = (ids[0][0], ids[1][0])
    found = compare.patch(subject, clean, corrupt, answers)
    shown = [run.tokenizer.decode([int(i)]) for i in corrupt]
    pairs = [
        (f"{a}/{b}" if a != b else a)
        for a, b in zip((run.tokenizer.decode([int(i)]) for i in clean), shown, strict=True)
    ]
    names = [run.tokenizer.decode([i]) for i in found["answers"]]
    return {**found, "answers": names, "tokens": pairs, "clean_text": args.clean, "corrupt_text": args.corrupt}


def _texts(run: Loaded, args: argparse.Namespace, length: int) -> list[np.ndarray]:
    """Token ids of the text given, or of held-out text of the run."""
    begin = [] if run.tokenizer.eot is None else [run.tokenizer.eot]
    if args.text:
        ids = np.array((begin + run.tokenizer.encode(args.text).tolist())[:length], np.int32)
        if len(ids) < 2:
            raise UserError(f"--text {args.text!r} is a single token; at least two are needed.")
        return [ids]
    from gpt_jax.data import prepare_data

    config = run.config
    try:
        data = prepare_data(
            config.data, context_length=length, batch_size=1, seed=config.seed, eval_batch_size=1, log=None
        )
    except UserError as error:
        raise UserError(f"the run's held-out text cannot be had ({error}); give --text.") from None
    stream = next((split.tokens for name, split in data.splits.items() if name.endswith("valid")), None)
    if stream is None or data.tokenizer.hash != run.tokenizer.hash:
        raise UserError("the run has no held-out text of its own tokenizer; give --text.")
    stream = np.asarray(stream[: length * args.texts * 4]).astype(np.int32)
    count = max(1, min(args.texts, len(stream) // length))
    return [stream[i * length : (i + 1) * length] for i in range(count)]


def _named(run: Loaded, lens: Mapping[str, np.ndarray]) -> dict[str, Any]:
    names = {i: run.tokenizer.decode([int(i)]) for i in np.unique(lens["ids"])}
    words = [[[names[i] for i in place] for place in layer] for layer in lens["ids"]]
    return {**{k: np.round(v, 5) for k, v in lens.items() if k != "ids"}, "ids": words}


def page_data(run: Loaded, numbers: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What script.js draws."""
    L, H = numbers["attention"].shape[:2]
    data: dict[str, Any] = {
        "name": name,
        "layers": L,
        "heads": H,
        "tokens": numbers["tokens"],
        "attention": np.round(1000 * numbers["attention"]).astype(int),  # thousandths: a third of the characters
        "lens": numbers["lens"],
        "start": {"layer": 0, "head": 0},
        "measures": {},
    }
    if "patterns" not in numbers:
        focus = -np.sum(numbers["attention"] * np.log(np.maximum(numbers["attention"], 1e-9)), -1).mean(-1)
        about = "Mean entropy of where a head looks: 0 is one token."
        data["measures"]["entropy"] = dict(values=focus, signed=False, scale=None, unit="nats", about=about)
        return data
    patterns = numbers["patterns"]
    layer, head = np.unravel_index(np.argmax(patterns["induction"]), (L, H))
    data["start"] = {"layer": int(layer), "head": int(head)}
    data["losses"] = numbers["loss"]["tokens"]
    data["repetition"] = {"first": patterns["first_loss"], "second": patterns["second_loss"]}
    about = {
        "induction": "Mean attention to what came after the same token the last time, on repeated random tokens.",
        "previous": "Mean attention to the token before.",
        "duplicate": "Mean attention to the same token the last time, on repeated random tokens.",
    }
    for score in _SCORES:
        data["measures"][score] = dict(values=patterns[score], signed=False, scale=1.0, unit="", about=about[score])
    data["measures"]["reach"] = dict(
        values=numbers["reach"], signed=False, scale=None, unit="tokens", about="Mean distance of what a head looks at."
    )
    for key, text in (
        ("importance", "E |dL/dxi|: how fast the loss moves with the head's gate (Michel et al. 2019)."),
        ("zero_ablation", "Rise of the loss when the head's output is 0."),
        ("mean_ablation", "Rise of the loss when the head's output is its mean."),
    ):
        data["measures"][key] = dict(
            values=numbers[key], signed=key != "importance", scale=None, unit="nats per token", about=text
        )
    data["attribution"] = numbers["attribution"]
    if "patching" in numbers:
        data["patching"] = numbers["patching"]
    if "difference" in numbers:
        found = numbers["difference"]
        mean = float(np.mean(found["difference"]))
        shown = {"values": found["difference"], "losses": found["losses"], "other": found["other"]}
        data["difference"] = {**shown, "name": found["name"], "mean": mean}
    return data


def _best(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The head with the highest score of each pattern: {"induction": 0.9, "induction_head": "1.3", ...}."""
    out: dict[str, Any] = {}
    for score in _SCORES if "patterns" in numbers else ():
        values = numbers["patterns"][score]
        layer, head = np.unravel_index(np.argmax(values), values.shape)
        out |= {score: float(values.max()), f"{score}_head": f"{layer}.{head}"}
    return out


def _lines(numbers: Mapping[str, Any]) -> str:
    if "patterns" not in numbers:
        return "the objective predicts no next token: attention and lens only"
    names = (*_SCORES, "reach", "importance", "zero_ablation", "mean_ablation")
    rows = ["head   " + "  ".join(name.rjust(13) for name in names)]
    tables = [numbers["patterns"][n] if n in _SCORES else numbers[n] for n in names]
    for layer in range(tables[0].shape[0]):
        for head in range(tables[0].shape[1]):
            rows.append(f"{layer}.{head}".ljust(7) + "  ".join(f"{t[layer, head]:13.4f}" for t in tables))
    return "\n".join(rows)
