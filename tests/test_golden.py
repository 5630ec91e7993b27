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
from gpt_jax.objectives.base import REGISTRY, Host, Setting, build_objective
from gpt_jax.objectives.denoising import Denoising, special_names
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


def texts(rows=8):
    """Texts of 4 to 12 tokens in rows of 12, as the data of a task delivers them; the last row is padding."""
    rng = np.random.default_rng(5)
    places = np.broadcast_to(np.arange(12, dtype=np.int32), (rows, 12))
    return {
        "tokens": rng.integers(0, 37, (rows, 12)).astype(np.int32),
        "segment_ids": (places < rng.integers(4, 13, (rows, 1))).astype(np.int32),
        "positions": places,
        "row_weights": (np.arange(rows) < rows - 1).astype(np.float32),
    }


def labelled():
    """Texts of two tasks with two labels each."""
    task = np.arange(8, dtype=np.int32) % 2
    label = 2 * task + np.random.default_rng(6).integers(0, 2, 8).astype(np.int32)
    return texts() | {"label": label, "task": task}


def tagged():
    """Texts of two tasks, every second token the first of a word."""
    batch = texts()
    task = np.arange(8, dtype=np.int32) % 2
    first = batch["segment_ids"] * (batch["positions"] % 2) * batch.pop("row_weights")[:, None]
    tags = 2 * task[:, None] + np.random.default_rng(6).integers(0, 2, (8, 12))
    return batch | {"targets": tags.astype(np.int32), "target_weights": first.astype(np.float32), "task": task}


def questions():
    """Texts whose answer is a span of the part that may be pointed at."""
    batch = texts()
    start = np.array([2, 1, 3, 2, 1, 2, 3, 1], np.int32)
    pointable = (batch["segment_ids"] > 0) & (batch["positions"] > 0)
    return batch | {"pointable": pointable, "start": start, "end": start + np.array([0, 1] * 4, np.int32)}


def choices():
    """Eight questions with three choices of four, two of them where the answer is among the first."""
    batch = {name: x.reshape(8, 4, 12) for name, x in texts(32).items() if name != "row_weights"}
    mask = np.ones((8, 4), bool)
    mask[:, 3] = np.arange(8) % 2
    answer = np.array([0, 1, 2, 3, 0, 1, 2, 3], np.int32)
    return batch | {"choice_mask": mask, "answer": answer, "row_weights": np.ones(8, np.float32)}


def pairs():
    """A chosen and a rejected answer in each row, of uneven lengths; the last row is padding."""
    batch = {name: x.reshape(8, 2, 12) for name, x in texts(16).items() if name != "row_weights"}
    answers = (batch["segment_ids"] > 0) & (batch["positions"] >= 2)
    rows = (np.arange(8) < 7).astype(np.float32)
    targets = np.roll(batch["tokens"], -1, axis=2)
    return batch | {"targets": targets, "answer_weights": answers.astype(np.float32), "row_weights": rows}


def rollout():
    """Two groups of four answers, drawn by a policy that has moved on since."""
    batch, rng = texts(), np.random.default_rng(8)
    answers = (batch["segment_ids"] > 0) & (batch["positions"] >= 2) & (batch["positions"] < 5)
    one = {name: rng.normal(-3.6, 0.3, (8, 12)).astype(np.float32) for name in ("behaviour", "reference")}
    group = {name: np.repeat(rng.normal(size=(2, 4)), 4, 0).astype(np.float32) for name in ("rewards", "kl")}
    del batch["row_weights"]
    return batch | {
        "targets": np.roll(batch["tokens"], -1, axis=1),
        "target_weights": answers.astype(np.float32),
        "prefix": batch["positions"] < 2,
        **{f"{name}_logprobs": x for name, x in one.items()},
        **{f"group_{name}": x for name, x in group.items()},
        "member": np.tile(np.arange(4, dtype=np.int32), 2),
        "rewards": rng.normal(size=(8, 1)).astype(np.float32),
    }


TASKS = (TaskInfo(0, "a", ("no", "yes")), TaskInfo(1, "b", ("up", "down"), 2))
MASK = {"eot": 3, "mask": 36}
SENTINELS = {name: 29 + i for i, name in enumerate(special_names(3, modes=True))}
DENOISING = {"name": "denoising", "denoisers": (("r", 2, 0.3), ("s", 0, 0.25)), "sentinels": 3}


def spans():
    """Texts with spans cut out or the end cut off, as the data delivers them."""
    options = {name: value for name, value in DENOISING.items() if name != "name"}
    made = Denoising.rows(options, Host(SENTINELS, 12))
    rng = np.random.default_rng(7)
    rows = [made.make(rng.integers(0, 29, made.raw_length).astype(np.int32), rng) for _ in range(8)]
    return {name: np.stack([row[name] for row in rows]).astype(kind) for name, kind in made.arrays.items()}


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
            "accuracy": 0.5714286,
            "classify_nll": 0.71806085,
            "grad_norm": 2.1618698,
            "loss": 2.6500254,
            "loss/classify": 0.71806085,
            "loss/lm": 3.8639288,
            "next/loss": 2.2170489,
        },
        tasks=TASKS,
    ),
    "tag": Golden(
        {"name": "tag"},
        tagged,
        {
            "accuracy": 0.42857143,
            "grad_norm": 1.6512505,
            "loss": 0.74027377,
            "loss/tag": 0.74027377,
            "tag_nll": 0.74027377,
            "next/loss": 0.86327237,
        },
        tasks=TASKS,
    ),
    "span_qa": Golden(
        {"name": "span_qa"},
        questions,
        {
            "grad_norm": 2.0721614,
            "loss": 1.8144391,
            "loss/span_qa": 1.8144391,
            "span_accuracy": 0,
            "span_nll": 1.8144391,
            "next/loss": 1.4252402,
        },
    ),
    "multiple_choice": Golden(
        {"name": "multiple_choice"},
        choices,
        {
            "accuracy": 0.125,
            "grad_norm": 2.6104655,
            "loss": 1.4438438,
            "loss/multiple_choice": 1.4438438,
            "multiple_choice_nll": 1.4438438,
            "next/loss": 0.92343134,
        },
    ),
    "dialogue": Golden(
        {"name": "dialogue"},
        prompts,
        {"grad_norm": 1.3119349, "loss": 3.815439, "loss/lm": 3.815439, "nll": 3.815439, "next/loss": 3.4128561},
    ),
    "replaced_token": Golden(
        {"name": "replaced_token"},
        documents,
        {
            "accuracy": 0,
            "fake_rate": 0.1923077,
            "grad_norm": 38.986115,
            "loss": 37.910934,
            "loss/mlm": 4.0205417,
            "loss/rtd": 0.67780787,
            "mlm_nll": 4.0205417,
            "rtd_accuracy": 0.65384614,
            "rtd_precision": 0.30000001,
            "rtd_recall": 0.60000002,
            "next/loss": 34.204548,
        },
        model={"dropout": 0.2},
        specials=MASK,
    ),
    "replaced_token, edit": Golden(
        {"name": "replaced_token", "rate": 0.4, "coefs": {"mlm": 1.0, "rtd": 50.0, "edit": 0.5}, "edit_after": 0.0},
        text_batch,
        {
            "accuracy": 0,
            "edit_distance": 1,
            "fake_rate": 0.34615386,
            "grad_norm": 15.562066,
            "loss": 38.545151,
            "loss/edit": 0.97756839,
            "loss/mlm": 4.0042109,
            "loss/rtd": 0.68104309,
            "mlm_nll": 4.0042109,
            "rtd_accuracy": 0.69230771,
            "rtd_precision": 0.66666669,
            "rtd_recall": 0.22222222,
            "next/loss": 37.070984,
        },
        specials=MASK,
    ),
    "masked_lm": Golden(
        {"name": "masked_lm"},
        documents,
        {
            "accuracy": 0.1,
            "grad_norm": 3.1728036,
            "loss": 3.7802157,
            "loss/mlm": 3.7802157,
            "mlm_nll": 3.7802157,
            "next/loss": 3.5850396,
        },
        specials=MASK,
    ),
    "masked_lm, fair, next_masked": Golden(
        {"name": "masked_lm", "corruption": "fair", "rate": 0.4, "coefs": {"mlm": 1.0, "next_masked": 0.5}},
        text_batch,
        {
            "accuracy": 0,
            "grad_norm": 3.2416191,
            "loss": 4.5430412,
            "loss/mlm": 4.0499859,
            "loss/next_masked": 0.98611033,
            "mlm_nll": 4.0499859,
            "next/loss": 4.0227132,
        },
        specials=MASK,
    ),
    "distillation": Golden(
        {"name": "distillation", "teacher": {"num_layers": 1, "d_ff": 24}},
        text_batch,
        {
            "agreement": 0.01923077,
            "grad_norm": 0.9373762,
            "kl": 0.59843099,
            "loss": 2.1958001,
            "loss/distill": 0.63101166,
            "loss/lm": 3.7605884,  # causal_lm's, of the same parameters
            "nll": 3.7605884,
            "next/loss": 1.970925,
        },
    ),
    "dpo": Golden(
        {"name": "dpo"},
        pairs,
        {
            "accuracy": 0.42857143,
            "chosen_log_ratio": -1.0163438,
            "grad_norm": 0.91623861,
            "loss": 0.71040404,
            "loss/dpo": 0.71040404,
            "margin": -0.0029686391,
            "rejected_log_ratio": -0.98665732,
            "next/loss": 0.48380455,
        },
    ),
    "policy_gradient": Golden(
        {"name": "policy_gradient", "group": 4},
        rollout,
        {
            "clipped": 0,
            "entropy": 3.3188927,
            "grad_norm": 15.07296,
            "kl": 3.2215991,
            "length": 2.75,
            "loss": 1.2432886,
            "loss/policy": 1.2432886,
            "reward": 0.41833588,
            "reward/exact_match": 0.2919423,
            "reward_std": 0.83931333,
            "next/loss": -0.25873137,
        },
    ),
    "policy_gradient, grpo": Golden(
        {"name": "policy_gradient", "group": 4, "algorithm": "grpo"},
        rollout,
        {
            "clipped": 0.77272725,
            "entropy": 3.3188927,
            "grad_norm": 1.7963856,
            "kl": 3.2215991,
            "length": 2.75,
            "loss": 0.37309,
            "loss/kl": 1.1586905,
            "loss/policy": 0.32674238,
            "reward": 0.41833588,
            "reward/exact_match": 0.2919423,
            "reward_std": 0.83931333,
            "next/loss": -0.070947707,
        },
    ),
    "policy_gradient, dr_grpo, weighted": Golden(
        {"name": "policy_gradient", "group": 4, "algorithm": "dr_grpo", "kl": "weighted", "length": "token"},
        rollout,
        {
            "clipped": 0.77272725,
            "entropy": 3.3188927,
            "grad_norm": 1.6592437,
            "kl": 3.2215991,
            "length": 2.75,
            "loss": 0.37361398,
            "loss/kl": 0.24769731,
            "loss/policy": 0.36370608,
            "reward": 0.41833588,
            "reward/exact_match": 0.2919423,
            "reward_std": 0.83931333,
            "next/loss": 0.0024686824,
        },
    ),
    "denoising": Golden(
        DENOISING,
        spans,
        {
            "denoising_nll": 3.54615,
            "denoising_nll_r": 3.4253531,
            "denoising_nll_s": 4.2709308,
            "grad_norm": 5.3484402,
            "loss": 3.54615,
            "loss/denoising": 3.54615,
            "next/loss": 2.847842,
        },
        specials=SENTINELS,
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
