"""A benchmark: items, what is asked of the model for each, and how answers become figures with standard errors.

Prompts follow GPT-3 (Brown et al. 2020, section 2.4): K demonstrations are drawn for each item anew, from training
examples only, and joined by blank lines. One benchmark is one file of this folder and one line of REGISTRY.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gpt_jax.data.splits import held_out
from gpt_jax.errors import UserError, choose, nearest
from gpt_jax.options import import_path
from gpt_jax.predictions import spread
from gpt_jax.score import NORMALISATIONS, Scorer, normalise, split_pair
from gpt_jax.tasks.base import REGISTRY as TASKS

# One line per family; 'name:argument' passes the argument. Other names are those of gpt_jax.tasks.
REGISTRY: dict[str, str] = {
    "lambada": "gpt_jax.benchmarks.lambada:lambada",
    "lambada_cloze": "gpt_jax.benchmarks.lambada:lambada_cloze",
    "hellaswag": "gpt_jax.benchmarks.hellaswag:hellaswag",
    "blimp": "gpt_jax.benchmarks.blimp:blimp",
    "arithmetic": "gpt_jax.benchmarks.arithmetic:arithmetic",
    "choices": "gpt_jax.benchmarks.choices:choices",
    "cloze": "gpt_jax.benchmarks.choices:cloze",
}
KINDS = ("choice", "greedy", "generate")

_POOL = 0.1  # of the items of a benchmark without training examples: demonstrations come from these, scores from others
_MARGIN = 8  # tokens: 'eot', and what a text cut within a character takes more
_RESAMPLES = 100
_MEANS = ("accuracy", "exact_match", "f1", "rouge1", "rouge2", "rougeL")  # metrics that are means over items


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      context: how its prompt ends. options: continuations; one where there is nothing to choose.
      answer: index of the right option.
      contexts: of each option, where they differ and the continuations are the same (cloze); () is `context` for all.
      group: part of the benchmark it belongs to, scored by itself too. document: what a demonstration may not share
        with it; the context if not given.
      example: of the task it was made from, if any.
    """

    context: str
    options: tuple[str, ...]
    answer: int = 0
    contexts: tuple[str, ...] = ()
    group: str = ""
    document: str = ""
    example: Any = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) of each option."""
        return list(zip(self.contexts or [self.context] * len(self.options), self.options, strict=True))

    @property
    def solved(self) -> str:
        """The text of the item with its answer: a demonstration."""
        return "".join(self.pairs[self.answer])

    @property
    def identity(self) -> str:
        return self.document or self.context or " ".join(self.options)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Items and how they are asked.

    Attributes:
      name: of the benchmark. kind: 'choice' compares the options, 'greedy' asks whether the one option is what greedy
        decoding gives, 'generate' generates a text.
      items: returns the items to score. train: returns those that demonstrations are drawn from; None: a tenth of the
        items, by their hash, which are then not scored.
      normalise: by which options are compared unless asked otherwise. unconditional: the context for 'unconditional'.
      separator: between demonstrations. demonstrations: whether it takes any.
      max_tokens, stop: of generated texts; half the model's context at most. score: (predictions, items) -> metrics,
        where a task says how.
      split: of a task that the items are.
    """

    name: str
    kind: str
    items: Callable[[], list[Item]]
    train: Callable[[], list[Item]] | None = None
    normalise: str = "token"
    unconditional: str = "Answer:"
    separator: str = "\n\n"
    demonstrations: bool = True
    max_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    score: Callable[[Sequence[Any], Sequence[Item]], dict[str, float]] | None = None
    split: str = ""

    def __post_init__(self) -> None:
        choose(f"benchmark {self.name}: kind", self.kind, KINDS)
        choose(f"benchmark {self.name}: normalise", self.normalise, NORMALISATIONS)


def load_benchmarks(specs: Sequence[Any], split: str, what: str) -> list[Benchmark]:
    """Returns the benchmarks of names and tables; `what` gave them. Raises UserError where two have one name."""
    found = [load_benchmark(spec, split) for spec in specs]
    names = [benchmark.name for benchmark in found]
    if len(set(names)) < len(names):
        raise UserError(f"{what} names a benchmark twice: {', '.join(names)}.")
    return found


def load_benchmark(spec: str | Mapping[str, Any], split: str = "") -> Benchmark:
    """Returns the benchmark that 'name' or 'name:argument' names, or a task of gpt_jax.tasks in few-shot form.

    Args:
      spec: a name, or the table of a task: {"name": ..., options...}.
      split: of a task that is scored; '': 'test', or 'valid' where there is none.

    Raises:
      UserError: an unknown name, with the closest; a split that the task has not.
    """
    from gpt_jax.benchmarks.supervised import few_shot

    if isinstance(spec, Mapping):
        return few_shot(spec, split)
    if not isinstance(spec, str):
        raise UserError(f"benchmark {spec!r} is neither a name nor a table such as {{'name': 'sst2', 'limit': 100}}.")
    name, _, argument = spec.partition(":")
    if name in REGISTRY:
        return import_path(REGISTRY[name])(argument) if argument else import_path(REGISTRY[name])()
    if spec not in TASKS and not argument:
        known = [*REGISTRY, *TASKS]
        raise UserError(f"unknown benchmark {spec!r}{nearest(spec, known)}; allowed: {', '.join(known)}.")
    return few_shot(spec, split)


def draw_demonstrations(pool: Sequence[Item], item: Item, shots: int, seed: int) -> list[Item]:
    """Draws `shots` items for an item, without replacement and never one that shares its document.

    They are of its group, or of any if the pool has none of it; the draw depends on the item's text, not on its place.
    """
    if not shots:
        return []
    text = hashlib.blake2b("\n".join(map("".join, item.pairs)).encode("utf-8"), digest_size=8).digest()
    order = np.random.default_rng((seed & 0xFFFFFFFF, int.from_bytes(text, "little"))).permutation(len(pool))
    drawn: list[Item] = []
    for own in (True, False):
        for row in order:
            if pool[row].identity != item.identity and (not own or pool[row].group == item.group):
                drawn.append(pool[row])
                if len(drawn) == shots:
                    return drawn
        if drawn:
            break
    raise UserError(f"{shots} demonstrations are asked for, but there are {len(drawn)} examples to draw them from.")


def split_items(benchmark: Benchmark, shots: int) -> tuple[list[Item], list[Item]]:
    """Returns (items to score, items to draw demonstrations from: () without shots)."""
    items = benchmark.items()
    if not shots:
        return items, []
    if not benchmark.demonstrations:
        raise UserError(f"benchmark {benchmark.name} takes no demonstrations: --shots must be 0, not {shots}.")
    if benchmark.train is not None:
        return items, benchmark.train()
    in_pool = [held_out(item.identity, _POOL) for item in items]
    kept = [item for item, inside in zip(items, in_pool, strict=True) if not inside]
    return kept, [item for item, inside in zip(items, in_pool, strict=True) if inside]


def take(items: Sequence[Item], limit: int) -> list[Item]:
    """Returns `limit` items of each group, spread over all of them; 0 is all."""
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for index, item in enumerate(items):
        groups[item.group].append(index)
    chosen = [rows[i] for rows in groups.values() for i in spread(len(rows), limit)]
    return [items[i] for i in sorted(chosen)]


def run_benchmark(
    benchmark: Benchmark,
    scorer: Scorer,
    *,
    shots: int = 0,
    limit: int = 0,
    normalisation: str = "",
    seed: int = 0,
    generate: Callable[[list[str], int, tuple[str, ...]], list[str]] | None = None,
) -> dict[str, Any]:
    """Scores a model on a benchmark.

    Args:
      scorer: of the model. shots: demonstrations of each item. limit: items of each group; 0 is all.
      normalisation: of options: sum | token | byte | unconditional; '' is the benchmark's.
      seed: of the demonstrations. generate: (prompts, max_tokens, stop strings) -> texts; None: greedily.

    Returns:
      Metrics, each with its standard error ("accuracy", "accuracy_se"); 'items', 'shots' (the mean number that fitted
      the context), 'cut' (contexts whose beginning was cut), 'split' (of a task); 'groups' {group: metrics} where there
      are some: the metrics above are then means over groups.
    """
    how = choose("normalise", normalisation or benchmark.normalise, NORMALISATIONS)
    items, prompts, shown = ask(benchmark, scorer, shots=shots, limit=limit, seed=seed)
    cut, info = scorer.cut, {"items": len(items), "shots": float(np.mean(shown))}
    if benchmark.kind == "generate":
        out = _generated(benchmark, scorer, items, prompts, generate)
    else:
        values = _scored(benchmark, scorer, items, prompts, how)
        chosen = values.pop("chosen", None)
        out = _by_group(items, values)
        if benchmark.score is not None:
            metrics = _task_metrics(benchmark, chosen.tolist(), items)
            out |= {name: value for name, value in metrics.items() if name.removesuffix("_se") not in out}
    groups = {"groups": out.pop("groups")} if "groups" in out else {}
    if benchmark.split:
        info["split"] = benchmark.split
    return {**out, **info, "cut": scorer.cut - cut, **groups}


def ask(
    benchmark: Benchmark, scorer: Scorer, *, shots: int = 0, limit: int = 0, seed: int = 0
) -> tuple[list[Item], list[str], list[int]]:
    """Returns (the items, the text before each one's context, its demonstrations that fit); see `run_benchmark`."""
    if shots < 0:
        raise UserError(f"--shots is {shots}; it must be at least 0.")
    items, pool = split_items(benchmark, shots)
    items = take(items, limit)
    if not items:
        raise UserError(f"benchmark {benchmark.name} has no items.")
    room = _new_tokens(benchmark, scorer) if benchmark.kind == "generate" else 0
    prompts, shown = [], []
    for item in items:
        drawn = draw_demonstrations(pool, item, shots, seed)
        prompt, number = fit_prompt(item, drawn, benchmark.separator, scorer, room)
        prompts.append(prompt)
        shown.append(number)
    return items, prompts, shown


def check_benchmark(benchmark: Benchmark, scorer: Scorer, *, shots: int = 0, limit: int = 0, seed: int = 0) -> None:
    """Reads the items and fits them as `run_benchmark` does, and runs no model: what it would refuse is told at once.

    Args:
      scorer: of the model; its parameters are not looked at.
    """
    items, prompts, _ = ask(benchmark, scorer, shots=shots, limit=limit, seed=seed)
    if benchmark.kind != "generate":
        pairs = [(before + c, o) for item, before in zip(items, prompts, strict=True) for c, o in item.pairs]
        try:
            scorer.fit(pairs)
        except UserError as error:
            raise UserError(f"benchmark {benchmark.name}: {error}") from None


def _new_tokens(benchmark: Benchmark, scorer: Scorer) -> int:
    """Tokens of a generated text: half of what the model reads is left to the prompt."""
    return min(benchmark.max_tokens, max(1, scorer.max_length // 2))


def fit_prompt(item: Item, drawn: Sequence[Item], separator: str, scorer: Scorer, room: int) -> tuple[str, int]:
    """Returns the text before the item's context, of as many demonstrations as fit whole, and their number.

    Args:
      room: tokens to leave free for a generated text; 0: the options are scored.
    """
    blocks = [demonstration.solved + separator for demonstration in drawn]

    def fits(before: str) -> bool:
        if room:  # as `fit_texts` cuts
            return len(scorer.tokenizer.encode(before + item.context)) <= scorer.max_length - room - _MARGIN
        pairs = [split_pair(scorer.tokenizer, before + c, o, boundary=scorer.boundary) for c, o in item.pairs]
        longest = max(len(context) + len(option) for context, option in pairs)
        return len(scorer.begin) + longest - 1 <= scorer.max_length

    # Tokens of a text are not the sum of its parts', so the whole is encoded, at most about log2 of the shots times.
    left_out = bisect.bisect_left(range(len(blocks)), True, key=lambda n: fits("".join(blocks[n:])))
    return "".join(blocks[left_out:]), len(blocks) - left_out


def _scored(
    benchmark: Benchmark, scorer: Scorer, items: Sequence[Item], prompts: Sequence[str], how: str
) -> dict[str, np.ndarray]:
    """Values of each item, by metric; "chosen" is the index of the chosen option.

    Where the right option is one of k that are equally good, an item counts 1/k; "accuracy_sum_first", of items with
    such ties, is what it is if the first of them is chosen.
    """
    pairs = [(before + c, o) for item, before in zip(items, prompts, strict=True) for c, o in item.pairs]
    scores = scorer.score(pairs)
    starts = np.cumsum([0, *[len(item.options) for item in items]])
    each = [scores[a:b] for a, b in itertools.pairwise(starts)]
    if benchmark.kind == "greedy":
        return {
            "accuracy": np.array([float(found[0].greedy) for found in each]),
            "nll": np.array([-found[0].total for found in each]),
        }
    answers = np.array([item.answer for item in items])
    out = {}
    empty = None
    if how == "unconditional":
        found = scorer.score([(benchmark.unconditional, option) for item in items for _, option in item.pairs])
        empty = [found[a:b] for a, b in itertools.pairwise(starts)]
    for name in ("sum", "token", "byte", *(["unconditional"] if empty else [])):
        values = [
            np.array([normalise(s, name, e) for s, e in zip(row, empty[i] if empty else row, strict=True)])
            for i, row in enumerate(each)
        ]
        chosen = np.array([int(np.argmax(row)) for row in values])
        best = [row == row.max() for row in values]
        right = np.array([row[answer] / max(1, row.sum()) for row, answer in zip(best, answers, strict=True)])
        if name == how:
            out = {"chosen": chosen, "accuracy": right, **out}
        out[f"accuracy_{name}"] = right
        if max(row.sum() for row in best) > 1:
            out[f"accuracy_{name}_first"] = (chosen == answers).astype(float)
    return out


def standard_error(values: np.ndarray) -> float:
    """Standard error of a mean: the sample's standard deviation over the root of their number."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _by_group(items: Sequence[Item], values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means and standard errors; of several groups their unweighted mean, and each."""

    def summary(rows: np.ndarray) -> dict[str, float]:
        out = {}
        for name, value in values.items():
            out[name], out[f"{name}_se"] = float(value[rows].mean()), standard_error(value[rows])
            if name == "nll":
                out["perplexity"] = math.exp(min(out[name], 700.0))
                out["perplexity_se"] = out["perplexity"] * out["nll_se"]
        return out

    names = list(dict.fromkeys(item.group for item in items))
    if len(names) < 2:
        return summary(np.arange(len(items)))
    membership = np.array([item.group for item in items])
    groups = {name: summary(np.flatnonzero(membership == name)) for name in names}
    whole: dict[str, Any] = {}
    for key in groups[names[0]]:
        found = np.array([group[key] for group in groups.values()])
        whole[key] = float(np.sqrt(np.sum(found**2)) / len(found) if key.endswith("_se") else found.mean())
    return whole | {"groups": groups}


def _task_metrics(benchmark: Benchmark, predictions: Sequence[Any], items: Sequence[Item]) -> dict[str, float]:
    """The task's own metrics; standard errors of items where a metric is their mean, bootstrapped ones elsewhere."""
    out = dict(benchmark.score(predictions, items))
    drawn: dict[str, list[float]] = collections.defaultdict(list)
    means = all(name.partition("/")[0] in _MEANS for name in out)
    rng = np.random.default_rng(0)
    for i in range(len(items) if means else _RESAMPLES):
        rows = [i] if means else rng.integers(0, len(items), len(items)).tolist()
        for name, value in benchmark.score([predictions[row] for row in rows], [items[row] for row in rows]).items():
            drawn[name].append(value)
    for name in list(out):
        values = np.array(drawn[name])
        out[f"{name}_se"] = standard_error(values) if means else float(np.std(values, ddof=1))
    return out


def _generated(
    benchmark: Benchmark,
    scorer: Scorer,
    items: Sequence[Item],
    prompts: Sequence[str],
    generate: Callable[[list[str], int, tuple[str, ...]], list[str]] | None,
) -> dict[str, Any]:
    whole = [before + item.context for item, before in zip(items, prompts, strict=True)]
    texts = (generate or greedy_texts(scorer))(whole, _new_tokens(benchmark, scorer), benchmark.stop)
    return _task_metrics(benchmark, [text.strip() for text in texts], items)


def greedy_texts(scorer: Scorer) -> Callable[[list[str], int, tuple[str, ...]], list[str]]:
    """Returns what generates greedily, each text up to a stop string; prompts lose their beginning where too long."""
    from gpt_jax.sample import continue_texts
    from gpt_jax.sampling import Sampling

    def generate(prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        fitted = fit_texts(scorer, prompts, max_tokens)
        return continue_texts(scorer, fitted, max_tokens=max_tokens, sampling=Sampling(0.0), stop=stop)

    return generate


def beam_texts(
    scorer: Scorer, beams: int = 4, alpha: float = 0.6
) -> Callable[[list[str], int, tuple[str, ...]], list[str]]:
    """Returns what generates by beam search (GPT-3's free-form answers: 4 beams, a length penalty of 0.6).

    Beams end at 'eot' or max_tokens; the text is cut at the first stop string.
    """
    from gpt_jax.beam import beam_search

    def generate(prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[str]:
        ids = [scorer.begin + scorer.tokenizer.encode(p).tolist() for p in fit_texts(scorer, prompts, max_tokens)]
        settings = dict(max_tokens=max_tokens, beams=beams, alpha=alpha, eot=scorer.eot)
        found = beam_search(scorer.model, scorer.params, ids, **settings)
        texts = [scorer.tokenizer.decode(hypotheses[0][0]) for hypotheses in found]
        return [text[: min([at for s in stop if (at := text.find(s)) >= 0], default=len(text))] for text in texts]

    return generate


def fit_texts(scorer: Scorer, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """Cuts the beginning of prompts so that they and `max_tokens` fit the model's context; the scorer counts them."""
    most = max(1, scorer.max_length - max_tokens - _MARGIN)
    fitted = []
    for prompt in prompts:
        ids = scorer.tokenizer.encode(prompt)
        scorer.cut += len(ids) > most
        fitted.append(scorer.tokenizer.decode(ids[-most:]) if len(ids) > most else prompt)
    return fitted
