"""The command `gpt-jax augment`: synthetic examples for a classification task, or unlabelled text, as files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.augment.base import Filter, Generator, as_rows, augment_task, per_label
from gpt_jax.augment.controls import EDA, Copy, distributional_neighbours
from gpt_jax.augment.finetune import RATES, Recipe
from gpt_jax.augment.report import fidelity, figures, write_report
from gpt_jax.data.readers import local_path
from gpt_jax.errors import UserError, choose
from gpt_jax.files import atomic_write
from gpt_jax.remote import is_url, refuse_url
from gpt_jax.tasks import Task, load_task
from gpt_jax.tasks.base import parse_specs, task_paths

METHODS = ("copy", "eda", "lm", "lm_prefix", "mlm", "mlm_embedded", "text")
_ROWS = ("augmented.jsonl", "train.jsonl")
_LEAST = {  # of the flags that count something
    "per_class": 0,
    "count": 1,
    "oversample": 1,
    "steps": 1,
    "length": 2,
    "prefix_words": 1,
    "documents": 1,
    "max_tokens": 1,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--method", required=True, help=" | ".join(METHODS) + " ('text' writes unlabelled documents)")
    parser.add_argument("--out", required=True, help="folder for augmented.jsonl, train.jsonl and report.md")
    parser.add_argument("--task", default="", help="a classification task: its name, or {'name': ..., options}")
    parser.add_argument("--from", dest="base", default="", metavar="RUN", help="pre-trained run of lm, mlm and text")
    parser.add_argument(
        "--per-class", type=int, default=0, help="originals used of each class, drawn by --seed; 0: all"
    )
    parser.add_argument("--count", type=int, default=100, help="synthetic examples of each class")
    parser.add_argument(
        "--oversample",
        type=int,
        default=1,
        help="candidates, in multiples of --count; the best by the filters stay, without a filter the first",
    )
    parser.add_argument("--steps", type=int, default=100, help="steps of tuning the generator on the originals")
    parser.add_argument("--learning-rate", type=float, default=0.0, help="of that tuning; 0: 1e-3, or 0.02 of Muon")
    parser.add_argument("--length", type=int, default=64, help="tokens of an example at most")
    parser.add_argument("--prefix-words", type=int, default=3, help="lm_prefix: words of an original that begin a text")
    parser.add_argument("--rate", type=float, default=1 / 7, help="mlm: part of the tokens replaced")
    parser.add_argument("--alpha", type=float, default=0.05, help="eda: part of the words changed")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the draws")
    parser.add_argument("--top-p", type=float, default=0.9, help="lm, text: nucleus sampling; 1 is off")
    parser.add_argument("--classifier", default="", metavar="RUN", help="filter: its confidence in the label")
    parser.add_argument("--least", type=float, default=0.0, help="least confidence")
    parser.add_argument("--rtd", default="", metavar="RUN", help="filter: its discriminator's replaced tokens")
    parser.add_argument("--reference", default="", metavar="RUN", help="filter: perplexity under it, within --band")
    parser.add_argument(
        "--band", default="0.05,0.9", metavar="LOW,HIGH", help="quantiles of the candidates' perplexity"
    )
    parser.add_argument("--oracle", default="", metavar="RUN", help="report: a classifier of all data, for fidelity")
    parser.add_argument("--documents", type=int, default=100, help="text: how many")
    parser.add_argument("--max-tokens", type=int, default=200, help="text: of a document")
    parser.add_argument("--seed", type=int, default=0, help="of the originals and of all draws")


def main(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs the command."""
    if overrides:
        raise UserError(f"augment takes no --config.{next(iter(overrides))}: its settings are flags.")
    choose("--method", args.method, METHODS)
    for name, least in _LEAST.items():
        if (value := getattr(args, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")
    refuse_url(args.out, "--out", "write to a folder, then copy it to the bucket")
    out = pathlib.Path(args.out)
    if args.method == "text":
        summary = _text(args, out)
    else:
        summary = _examples(args, out)
    print(json.dumps(summary))
    return 0


def _examples(args: argparse.Namespace, out: pathlib.Path) -> dict[str, Any]:
    if not args.task:
        raise UserError("--task is missing: the classification task to augment.")
    specs = parse_specs(args.task, "--task")
    if len(specs) != 1:
        raise UserError(f"--task is {args.task!r}; it takes one task.")
    task = load_task(specs[0])
    if task.kind != "classify" or not task.labels:
        raise UserError(f"task {task.name} is of kind {task.kind!r}; augment takes 'classify', with labels.")
    check_replaced(out, task_paths(specs[0], [*task.splits]))
    rng = random.Random(args.seed)
    train = draw(task, single_texts(task), args.per_class, rng)
    generator = make_generator(args, task, train)
    chosen, counts = augment_task(
        train,
        generator,
        per_class=per_label(task.labels, args.count),
        rng=rng,
        filters=make_filters(args, task),
        refused=held_out_texts(task),
        oversample=args.oversample,
    )
    provenance = {
        "generator": generator.name,
        "task": task.name,
        "from": args.base,
        "seed": args.seed,
        **{name: value for name in ("classifier", "rtd", "reference") if (value := getattr(args, name))},
    }
    out.mkdir(parents=True, exist_ok=True)
    rows = as_rows(chosen, provenance, train)
    real = [{"label": e.label, "text": e.text, "score": 1.0, "provenance": {"original": e.where}} for e in train]
    for name, of in zip(_ROWS, (rows, [*real, *rows]), strict=True):
        write_rows(out / name, of)
    texts, originals = [e.text for e in chosen], [e.text for e in train]
    measured = {"synthetic": figures(texts, originals), "originals": figures(originals)}
    if args.oracle:
        oracle = task_classifier(args.oracle, task, "--oracle")
        for name, examples in (("synthetic", chosen), ("originals", train)):
            measured[name] = {"fidelity": fidelity(examples, oracle.probabilities, oracle.labels), **measured[name]}
    atomic_write(out / "report.md", write_report(chosen, train, counts, provenance, measured))
    return {"out": str(out), "originals": len(train), **dataclasses.asdict(counts), **measured["synthetic"]}


def _text(args: argparse.Namespace, out: pathlib.Path) -> dict[str, Any]:
    from gpt_jax.augment.corpus import check_out, generate_documents, in_band, write_corpus
    from gpt_jax.augment.filters import PerplexityBand, reference_nll
    from gpt_jax.loading import load

    check_out(out)
    run = load(_needed(args.base, "--from"))
    texts = generate_documents(
        run,
        args.documents,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    generated = len(texts)
    if args.reference:
        texts = in_band(texts, PerplexityBand(reference_nll(load(args.reference)), *_band(args.band)))
    provenance = {"from": args.base, "step": run.step, "seed": args.seed, "reference": args.reference}
    out.mkdir(parents=True, exist_ok=True)
    store = write_corpus(texts, run, out, provenance)
    return {"out": str(out), "store": str(store), "generated": generated, "documents": len(texts), **figures(texts)}


def check_replaced(out: pathlib.Path, read: Sequence[str]) -> None:
    """Raises UserError where a file that is to be written is one that the task is read from, or rows of another origin.

    Args:
      read: paths of the task's files.
    """
    own = [local_path(path) for path in read if not is_url(path)]
    for path in (out / name for name in (*_ROWS, "report.md")):
        if path.exists() and any(file.exists() and path.samefile(file) for file in own):
            raise UserError(f"--out {str(out)!r} would replace {path.name}, which the task is read from; give another.")
    for path in (out / name for name in _ROWS):
        if path.exists() and not _made_here(path):
            raise UserError(
                f"--out {str(out)!r} holds a {path.name} that augment did not write (its rows have no 'provenance'); "
                "give another folder."
            )


def _made_here(path: pathlib.Path) -> bool:
    """Whether augment wrote a file of rows: the first one tells."""
    with open(path, encoding="utf-8", errors="replace") as stream:
        first = stream.readline()
    try:
        return not first or "provenance" in json.loads(first)
    except (TypeError, ValueError):
        return False


def single_texts(task: Task) -> list[Any]:
    """The training examples that are one text, not a pair."""
    examples = [e for e in task.examples("train") if not e.text_b]
    if not examples:
        raise UserError(f"task {task.name} has only pairs of texts; augment takes single ones.")
    return examples


def draw(task: Task, examples: Sequence[Any], per_class: int, rng: random.Random) -> list[Any]:
    """Returns so many examples of each class, drawn at random; all of them if 0.

    Raises:
      UserError: a class has fewer.
    """
    if not per_class:
        return list(examples)
    out = []
    for label in task.labels:
        own = [e for e in examples if e.label == label]
        if len(own) < per_class:
            raise UserError(f"--per-class is {per_class}, but class {label!r} of task {task.name} has {len(own)}.")
        out += rng.sample(own, per_class)
    return out


def held_out_texts(task: Task) -> list[str]:
    """The texts of the splits that no synthetic example may equal."""
    return [e.text for split in task.splits if split != "train" for e in task.examples(split)]


def make_generator(args: argparse.Namespace, task: Task, train: Sequence[Any]) -> Generator:
    if args.method == "copy":
        return Copy()
    if args.method == "eda":
        return EDA(distributional_neighbours(e.text for e in task.examples("train")), args.alpha)
    from gpt_jax.augment.generators import LabelLM, MaskedSubstitution
    from gpt_jax.loading import load

    run = load(_needed(args.base, "--from"))
    optimizer = run.config.optimizer.name if run.config.optimizer.name in RATES else "adamw"
    rate = args.learning_rate or RATES[optimizer]
    recipe = Recipe(args.steps, min(8, len(train)), args.length, rate, optimizer=optimizer)
    if args.method.startswith("mlm"):
        options = dict(rate=args.rate, temperature=args.temperature, embedded=args.method == "mlm_embedded")
        return MaskedSubstitution(run, task.labels, recipe, **options)
    sampler = dict(temperature=args.temperature, top_p=args.top_p, per_class=max(16, args.count))
    words = args.prefix_words if args.method == "lm_prefix" else 0
    return LabelLM(run, task.labels, recipe, prefix_words=words, **sampler)


def make_filters(args: argparse.Namespace, task: Task) -> list[Filter]:
    from gpt_jax.augment.filters import Confidence, PerplexityBand, Replaced, reference_nll, replaced_rate
    from gpt_jax.loading import load

    filters: list[Filter] = []
    if args.reference:
        filters.append(PerplexityBand(reference_nll(load(args.reference)), *_band(args.band)))
    if args.rtd:
        filters.append(Replaced(replaced_rate(load(args.rtd))))
    if args.classifier:
        found = task_classifier(args.classifier, task, "--classifier")
        filters.append(Confidence(found.probabilities, found.labels, args.least))
    return filters


def write_rows(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def task_classifier(workdir: str, task: Task, flag: str) -> Any:
    """A trained classifier that has the task's labels, named by a flag."""
    from gpt_jax.classifier import load_classifier

    found = load_classifier(workdir)
    if set(found.labels) != set(task.labels):
        raise UserError(f"{flag} {workdir!r} has the labels {', '.join(found.labels)}, not those of task {task.name}.")
    return found


def _needed(value: str, flag: str) -> str:
    if not value:
        raise UserError(f"{flag} is missing: the pre-trained run that this method starts from.")
    return value


def _band(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise UserError(f"--band is {text!r}; two quantiles are needed, such as 0.05,0.9.") from None
    return low, high
