"""The low-resource experiment: the same classifier with and without synthetic examples, on the same splits.

Every arm of a split has the same originals, seed, steps and batch size (half of a batch is synthetic), so that what is
compared is what the examples are, not how long the classifier was trained. All fine-tunings share one compiled update.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gpt_jax.augment.base import Counts, Filter, Synthetic, augment_task, per_label
from gpt_jax.augment.command import draw, held_out_texts, single_texts
from gpt_jax.augment.controls import EDA, Copy
from gpt_jax.augment.filters import Confidence, Replaced, replaced_rate
from gpt_jax.augment.finetune import FineTuner, Recipe
from gpt_jax.augment.report import fidelity, figures
from gpt_jax.classifier import TextClassifier
from gpt_jax.config import to_dict
from gpt_jax.data.cache import content_hash
from gpt_jax.data.formats import TaskInfo
from gpt_jax.errors import UserError
from gpt_jax.loading import Loaded
from gpt_jax.objectives.base import Host, Setting, build_objective, rows_of
from gpt_jax.tasks import Task

ARMS = ("none", "copy", "eda", "lm", "mlm", "mlm_embedded", "lm+filter", "mlm+rtd")

MEASURED = ("synthetic", "fidelity", "distinct_2", "self_bleu_4", "copied")  # of an arm's synthetic texts, in the table


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is compared.

    Attributes:
      per_class: originals of each class. count: synthetic examples of each class. oversample: candidates before a
        filter, in multiples of count. splits: how often all is repeated, with other originals.
      generator: recipe of the generators. test_limit: test examples, spread over all; 0 is all.
    """

    per_class: int = 10
    count: int = 40
    oversample: int = 5
    splits: int = 15
    generator: Recipe = dataclasses.field(default_factory=Recipe)
    test_limit: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Models:
    """Pre-trained runs: of the classifier, and of the generators and the discriminator where an arm needs them.

    `oracle`, a classifier trained on all data, only measures: the share of synthetic labels that it agrees with.
    """

    base: Loaded
    mlm: Loaded | None = None
    rtd: Loaded | None = None
    oracle: TextClassifier | None = None


class Experiment:
    """Runs arms on splits, each result written as it comes: a second start goes on where the first was stopped.

    Args:
      task: of kind classify. objective: the classifier's table of a config. recipe: of the classifier. models: see
        there. protocol: see there. neighbours: of words, for EDA. out: folder for results.jsonl.
    """

    def __init__(
        self,
        task: Task,
        objective: Mapping[str, Any],
        recipe: Recipe,
        models: Models,
        protocol: Protocol,
        neighbours: Mapping[str, Sequence[str]],
        out: pathlib.Path,
        log: Callable[[str], None] = print,
    ):
        self.task, self.models, self.protocol, self.out, self.log = task, models, protocol, out, log
        tokenizer, config = models.base.tokenizer, models.base.config
        setting = Setting(config.model, tokenizer.specials, tasks=(TaskInfo(0, "augment", task.labels),))
        self.objective = build_objective(objective, setting)
        self.rows = rows_of(objective, Host(tokenizer.specials, recipe.length, recipe.batch_size))
        start = {"model": models.base.params}
        self.tuner = FineTuner(self.objective, self.rows, tokenizer, start, recipe, task.labels)
        self.predict = jax.jit(self.objective.predict)
        self.neighbours = neighbours
        test = [e for e in task.examples("test" if "test" in task.splits else "valid") if not e.text_b]
        limit = protocol.test_limit or len(test)
        self.test = [test[i * len(test) // limit] for i in range(min(limit, len(test)))]
        self.pool, self.refused = single_texts(task), held_out_texts(task)
        self.generators: dict[str, Any] = {}
        protocol = {**dataclasses.asdict(protocol), "splits": 0}  # more splits may follow
        runs = [run and [run.step, to_dict(run.config)] for run in (models.base, models.mlm, models.rtd)]
        data = [task.name, task.labels, [(e.text, e.label) for e in (*self.pool, *self.test)]]
        same = content_hash([dict(objective), dataclasses.asdict(recipe), protocol, runs, data])
        # A hash of all that an arm's results rest on but the code.
        self.recipes = {arm: content_hash([same, self.neighbours if arm == "eda" else {}]) for arm in ARMS}

    def run(self, arms: Sequence[str]) -> list[dict[str, Any]]:
        """Runs what is not in results.jsonl yet; returns all rows of these arms."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "results.jsonl"
        rows = read_results(path)
        if any(row.get("recipe") != self.recipes[row["arm"]] for row in rows if row["arm"] in arms):
            raise UserError(f"{path} has results of another recipe or protocol: give another --out, or delete it.")
        done = {(row["split"], row["arm"]) for row in rows}
        for split in range(self.protocol.splits):
            for arm in arms:
                if (split, arm) in done:
                    continue
                row = {"recipe": self.recipes[arm], "split": split, "arm": arm, **self.one(split, arm)}
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
                self.log(f"split {split} | {arm.ljust(10)} | accuracy {row['accuracy']:.4f}")
        return [row for row in rows if row["arm"] in arms and row["split"] < self.protocol.splits]

    def one(self, split: int, arm: str) -> dict[str, Any]:
        """Trains and tests one arm on one split: {"accuracy", "generated", figures of the synthetic texts}."""
        seed = self.protocol.seed * 1000 + split
        train = draw(self.task, self.pool, self.protocol.per_class, random.Random(seed))
        if arm == "none":
            params, extra = self.tuner.fit(train, seed), {}
        else:
            synthetic, counts = self.synthesise(arm, train, seed)
            shares = [dataclasses.replace(train[0], text=s.text, label=s.label) for s in synthetic]
            params = self.tuner.fit(train, seed, shares)
            found = figures([s.text for s in synthetic], [e.text for e in train])
            if oracle := self.models.oracle:
                found["fidelity"] = fidelity(synthetic, oracle.probabilities, oracle.labels)
            extra = {"generated": counts.generated, "synthetic": len(synthetic), **found}
        table = self.classifier(params).probabilities([e.text for e in self.test])
        right = [self.task.labels[i] == e.label for i, e in zip(table.argmax(1).tolist(), self.test, strict=True)]
        return {"accuracy": float(np.mean(right)), **extra}

    def synthesise(self, arm: str, train: Sequence[Any], seed: int) -> tuple[list[Synthetic], Counts]:
        """The synthetic examples of an arm: the same for the same originals and seed; fewer where no more are found."""
        method, _, filtered = arm.partition("+")
        filters = self.filters(filtered, train, seed)
        return augment_task(
            train,
            self.generator(method),
            per_class=per_label(self.task.labels, self.protocol.count),
            rng=random.Random(f"{seed} {method}"),
            filters=filters,
            refused=self.refused,
            oversample=self.protocol.oversample if filters else 1,
            exact=False,
        )

    def generator(self, method: str) -> Any:
        if method not in self.generators:
            self.generators[method] = self._make(method)
        return self.generators[method]

    def _make(self, method: str) -> Any:
        from gpt_jax.augment.generators import LabelLM, MaskedSubstitution

        protocol, labels = self.protocol, self.task.labels
        if method == "copy":
            return Copy()
        if method == "eda":
            return EDA(self.neighbours)
        if method == "lm":
            return LabelLM(self.models.base, labels, protocol.generator, per_class=protocol.count)
        return MaskedSubstitution(self.models.mlm, labels, protocol.generator, embedded=method == "mlm_embedded")

    def filters(self, name: str, train: Sequence[Any], seed: int) -> list[Filter]:
        """LAMBADA's filter is a classifier trained on the originals; the discriminator's needs no training."""
        if name == "filter":
            classifier = self.classifier(self.tuner.fit(train, seed))
            return [Confidence(classifier.probabilities, self.task.labels)]
        if name == "rtd":
            return [Replaced(self.replaced)]
        return []

    @functools.cached_property
    def replaced(self) -> Callable[[Sequence[str]], np.ndarray]:
        return replaced_rate(self.models.rtd)

    def classifier(self, params: Any) -> TextClassifier:
        return TextClassifier(
            self.task.labels, lambda batch: self.predict(params, batch), self.rows, self.models.base.tokenizer
        )


def read_results(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of results.jsonl; a torn last line is left out and cut off."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines))
    return [json.loads(line) for line in lines]


def compare(rows: Sequence[Mapping[str, Any]], baseline: str = "none", resamples: int = 10_000) -> list[dict[str, Any]]:
    """Summarises arms: mean and standard deviation over splits, and the difference to the baseline on the same splits.

    Returns:
      A row per arm: arm, splits, mean, sd, difference, and low and high, the 95% interval of the difference by
      bootstrap over the splits (paired). Splits that the baseline lacks are left out of the difference. Beside them the
      means over the splits of what is known of the synthetic texts (`MEASURED`).
    """
    by_arm: dict[str, dict[int, float]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["split"]] = row["accuracy"]
    rng, out = np.random.default_rng(0), []
    for arm, found in by_arm.items():
        values = np.array(list(found.values()))
        row = {"arm": arm, "splits": len(values), "mean": float(values.mean())}
        row["sd"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        common = [split for split in found if split in by_arm.get(baseline, {})]
        if arm != baseline and common:
            gaps = np.array([found[split] - by_arm[baseline][split] for split in common])
            means = gaps[rng.integers(0, len(gaps), (resamples, len(gaps)))].mean(1)
            low, high = np.quantile(means, [0.025, 0.975])
            row |= {"difference": float(gaps.mean()), "low": float(low), "high": float(high)}
        for name in MEASURED:
            known = [row[name] for row in rows if row["arm"] == arm and name in row]
            if known:
                row[name] = float(np.mean(known))
        out.append(row)
    return out


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The comparison as Markdown."""
    known = [name for name in MEASURED if any(name in row for row in summary)]
    lines = ["".join(f"| {name} " for name in ("arm", "splits", "accuracy", "sd", "against none (95%)", *known)) + "|"]
    lines += ["|---|---:|---:|---:|---|" + "---:|" * len(known)]
    for row in summary:
        gap = f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})" if "difference" in row else ""
        cells = [f"{row[name]:.{0 if name == 'synthetic' else 3}f}" if name in row else "" for name in known]
        cells = [row["arm"], str(row["splits"]), f"{row['mean']:.4f}", f"{row['sd']:.4f}", gap, *cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
