"""Golden numbers of one update of every objective: any change of what an objective computes shows here.

They pin what no oracle of another test need notice, such as a change of default, of a key's name or of the order of
draws. A new objective adds one entry to `GOLDEN`: its options, the maker of its batch, and the numbers that the failing
test prints. A change that moves a number on purpose replaces it and says why in the commit.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest
from helpers import text_batch, tiny

from gpt_jax.data.formats import TaskInfo
from gpt_jax.objectives.base import REGISTRY, Setting, build_objective
from gpt_jax.optim import make_optimizer
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step

# Below the rounding of other machines lies nothing, above it everything that a mistake changes.
TOLERANCE = 1e-5
SAME_FOR_ALL = ("lr", "skipped", "skipped_in_a_row")


@dataclasses.dataclass(frozen=True)
class Golden:
    """What one update of an objective gives.

    Attributes:
      options: the `objective` table of a config. batch: makes the batch, the same at every call.
      expected: the update's metrics, and "next/loss", the loss of the same batch after it.
      model: overrides of the tiny model. specials: ids of the tokenizer's special tokens. tasks: of the run.
    """

    options: Mapping[str, Any]
    batch: Callable[[], Any]
    expected: Mapping[str, float]
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    specials: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tasks: tuple[TaskInfo, ...] = ()


def documents():
    return text_batch(documents=True)


def two_kinds():
    return {"a": text_batch(rows=2, seed=1), "b": text_batch(rows=6, seed=2)}


def prompts():
    """Packed prompts and targets: the first half of every document is its prompt."""
    batch = documents()
    longest = np.array([[(row == s).sum() for s in row] for row in batch["segment_ids"]])
    return batch | {"prefix": (batch["segment_ids"] > 0) & (batch["positions"] < longest // 2)}


def labelled():
    """Eight texts of two tasks with two labels each; one row is padding."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(3, 12, 8)[:, None]
    places = np.broadcast_to(np.arange(12, dtype=np.int32), (8, 12))
    task = np.arange(8, dtype=np.int32) % 2
    return {
        "tokens": rng.integers(0, 37, (8, 12)).astype(np.int32),
        "segment_ids": (places < lengths).astype(np.int32),
        "positions": places,
        "label": (2 * task + rng.integers(0, 2, 8)).astype(np.int32),
        "task": task,
        "row_weights": (np.arange(8) < 7).astype(np.float32),
    }


SPECIALS = {"eot": 3, "mask": 36}

GOLDEN = {
    "causal_lm": Golden(
        {"name": "causal_lm"},
        text_batch,
        {"grad_norm": 1.4228055, "loss": 3.7605884, "loss/lm": 3.7605884, "nll": 3.7605884, "next/loss": 3.3603222},
    ),
    "causal_lm, everything": Golden(
        {"name": "causal_lm", "reweight": "perplexity", "alpha": 0.7, "z_loss": 1e-2, "label_smoothing": 0.1},
        text_batch,
        {"grad_norm": 1.3464577, "loss": 3.8759248, "loss/lm": 3.8759248, "nll": 3.6840634, "next/loss": 3.8436329},
        model={"dropout": 0.2},
    ),
    "causal_lm, doc_mask": Golden(
        {"name": "causal_lm"},
        documents,
        {"grad_norm": 1.3119348, "loss": 3.815439, "loss/lm": 3.815439, "nll": 3.815439, "next/loss": 3.4128556},
    ),
    "causal_lm, doc_mask, reweighted": Golden(
        {"name": "causal_lm", "reweight": "perplexity"},
        documents,
        {"grad_norm": 1.4778618, "loss": 3.9186869, "loss/lm": 3.9186869, "nll": 3.815439, "next/loss": 3.4633093},
    ),
    "supervised": Golden(
        {"name": "supervised", "mask": "prefix"},
        prompts,
        {"grad_norm": 1.3641062, "loss": 3.8324087, "loss/lm": 3.8324087, "nll": 3.8324087, "next/loss": 3.4349141},
    ),
    "classify": Golden(
        {"name": "classify", "coefs": {"classify": 1.0, "lm": 0.5}},
        labelled,
        {
            "accuracy": 0.71428573,
            "classify_nll": 0.65410489,
            "grad_norm": 1.7506593,
            "loss": 2.6218283,
            "loss/classify": 0.65410489,
            "loss/lm": 3.935447,
            "next/loss": 2.27669,
        },
        tasks=(
            TaskInfo(0, "a", ("no", "yes")),
            TaskInfo(1, "b", ("up", "down"), 2),
        ),
    ),
    "masked_lm": Golden(
        {"name": "masked_lm", "rate": 0.3},
        text_batch,
        {
            "accuracy": 0,
            "grad_norm": 2.4650991,
            "loss": 3.9134014,
            "loss/mlm": 3.9134014,
            "mlm_nll": 3.9134014,
            "next/loss": 3.2279577,
        },
        specials=SPECIALS,
    ),
    "masked_lm, spans, every term": Golden(
        {
            "name": "masked_lm",
            "rate": 0.5,
            "select": "spans",
            "coefs": {"mlm": 1.0, "next_masked": 0.5, "edit": 0.1},
            "edit_after": 0.0,
        },
        documents,
        {
            "accuracy": 0.074074075,
            "edit_distance": 0.85416669,
            "grad_norm": 2.400269,
            "loss": 4.2764258,
            "loss/edit": 0.96026218,
            "loss/mlm": 3.853766,
            "loss/next_masked": 0.65326715,
            "mlm_nll": 3.853766,
            "next/loss": 4.171659,
        },
        model={"dropout": 0.2},
        specials=SPECIALS,
    ),
    "masked_lm, fair": Golden(
        {"name": "masked_lm", "rate": 0.5, "corruption": "fair"},
        text_batch,
        {
            "accuracy": 0,
            "grad_norm": 2.6105914,
            "loss": 4.0247655,
            "loss/mlm": 4.0247655,
            "mlm_nll": 4.0247655,
            "next/loss": 3.4891469,
        },
        specials=SPECIALS,
    ),
    "mixture": Golden(
        {
            "name": "mixture",
            "tasks": {"a": {"name": "causal_lm", "rows": 2}, "b": {"name": "causal_lm", "rows": 6, "coef": 0.5}},
        },
        two_kinds,
        {
            "a/nll": 3.9586406,
            "b/nll": 3.8052721,
            "grad_norm": 3.1327164,
            "loss": 5.8612766,
            "loss/a/lm": 3.9586406,
            "loss/b/lm": 3.8052721,
            "next/loss": 5.3545904,
        },
        model={"dropout": 0.2},
    ),
    "replaced_token": Golden(
        {"name": "replaced_token", "rate": 0.3},
        documents,
        {
            "accuracy": 0,
            "fake_rate": 0.30769232,
            "grad_norm": 25.190351,
            "loss": 37.622292,
            "loss/mlm": 4.0300469,
            "loss/rtd": 0.67184484,
            "mlm_nll": 4.0300469,
            "rtd_accuracy": 0.69230771,
            "rtd_precision": 0.5,
            "rtd_recall": 0.625,
            "next/loss": 36.757099,
        },
        model={"dropout": 0.2},
        specials=SPECIALS,
    ),
    "sum": Golden(
        {
            "name": "sum",
            "terms": {"plain": {"name": "causal_lm"}, "hard": {"name": "causal_lm", "reweight": "focal", "coef": 2.0}},
        },
        text_batch,
        {
            "grad_norm": 4.286561,
            "hard/nll": 3.7605884,
            "loss": 11.316433,
            "loss/hard/lm": 3.7779224,
            "loss/plain/lm": 3.7605884,
            "plain/nll": 3.7605884,
            "next/loss": 10.10815,
        },
    ),
}


def one_update(golden: Golden) -> dict[str, float]:
    """Metrics of one AdamW update on one device, from the initial parameters moved into general position."""
    batch = golden.batch()
    setting = Setting(
        model=tiny(**golden.model),
        specials=golden.specials,
        tasks=golden.tasks,
        steps=10,
        batch_size=8,
        context_length=12,
    )
    objective = build_objective(golden.options, setting)
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    step = build_train_step(objective, make_optimizer("adamw", 0.01), spec, mesh=make_mesh(devices=jax.devices()[:1]))
    state = step.init(seed=0)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + np.float32(0.2) * rng.normal(size=x.shape).astype(x.dtype), state.all_params)
    state = step.with_params(state, noisy)
    state, metrics = step(state, batch)
    _, after = step(state, batch)
    found = metrics | {"next/loss": after["loss"]}
    return {name: float(value) for name, value in found.items() if name not in SAME_FOR_ALL}


@pytest.mark.parametrize("name", GOLDEN)
def test_one_update_gives_the_golden_numbers(name):
    got = one_update(GOLDEN[name])
    expected = GOLDEN[name].expected
    printed = "{" + ", ".join(f'"{k}": {v:.8g}' for k, v in got.items()) + "}"
    assert got == pytest.approx(expected, rel=TOLERANCE, abs=1e-7), f"{name} gives {printed}"


def test_every_objective_has_golden_numbers():
    assert {golden.options["name"] for golden in GOLDEN.values()} == set(REGISTRY)
