"""Supervised text to text: -log P(target | prompt), whatever the packing, the padding and the prompt's labels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_tasks
from helpers import params_of, tiny

from gpt_jax.data.formats import TaskInfo
from gpt_jax.data.task_rows import EncodedTask
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import Host, bidirectional_prompt
from gpt_jax.objectives.supervised import Supervised
from gpt_jax.predictions import generate_predictions
from gpt_jax.testing import check_objective

TOKENIZER = ByteTokenizer(["eot"])
EOT = TOKENIZER.eot
CONFIG = tiny(vocab_size=257, max_positions=40)


def rows_of(mask="causal", length=24, **options):
    return Supervised.rows({"mask": mask, **options}, Host({"eot": EOT}, length, 4))


def batch_of(rows, task=None, count=None):
    task = task or toy_tasks.reverse()
    encoded = EncodedTask(task, TaskInfo(0, task.name), task.examples("train"), rows, TOKENIZER, rows.length)
    n = count or encoded.rows_per_epoch
    return encoded.build(np.zeros(n, np.int64), np.arange(n))


def summed(objective, batch):
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))
    prepared = objective.prepare(jax.tree.map(jnp.asarray, batch), keys, jnp.zeros((), jnp.int32))
    sums, metrics = jax.jit(lambda p, b: objective.loss({"model": p}, b, keys, False))(params_of(CONFIG), prepared)
    return float(sums["lm"]), [float(x) for x in metrics["nll"]]


def log_likelihood(prompt, target, mask):
    """log P(target EOT | EOT prompt), one token after the other, of the example alone."""
    ids = np.array([[EOT, *TOKENIZER.encode(prompt), *TOKENIZER.encode(target), EOT]], np.int32)
    first = 1 + len(TOKENIZER.encode(prompt))
    prefix = np.arange(ids.shape[1] - 1)[None] < first
    structure = Mask("prefix", prefix_BxT=prefix) if mask == "prefix" else Mask()
    logits = Transformer(CONFIG).apply({"params": params_of(CONFIG)}, ids[:, :-1], mask=structure).logits[0]
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(log_p[t, ids[0, t + 1]] for t in range(first - 1, ids.shape[1] - 1))


@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_the_loss_of_packed_rows_is_minus_the_log_probability_of_every_target(mask):
    task = toy_tasks.reverse(train=8)
    expected = -sum(log_likelihood(e.source, e.target, mask) for e in task.examples("train"))
    total, (nll, tokens) = summed(Supervised(Transformer(CONFIG), mask=mask), batch_of(rows_of(mask), task))
    assert total == pytest.approx(expected, rel=1e-4)
    assert nll == pytest.approx(expected, rel=1e-4)
    assert tokens == sum(len(e.target) + 1 for e in task.examples("train"))


def test_the_labels_of_prompts_cannot_affect_the_loss():
    batch = batch_of(rows_of())
    other = {**batch, "targets": np.where(batch["target_weights"] == 0, 7, batch["targets"])}
    assert not np.array_equal(batch["targets"], other["targets"])
    objective = Supervised(Transformer(CONFIG))
    assert summed(objective, batch) == summed(objective, other)


@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_the_width_of_the_padding_does_not_matter(mask):
    task = toy_tasks.reverse(train=1)
    objective = Supervised(Transformer(CONFIG), mask=mask)
    narrow, wide = (summed(objective, batch_of(rows_of(mask, length), task))[0] for length in (12, 40))
    assert narrow == pytest.approx(wide, rel=1e-5)


def test_loss_on_all_predicts_the_prompt_too():
    batch = batch_of(rows_of(loss_on="all"))
    assert ((batch["target_weights"] == 1) == (batch["segment_ids"] > 0)).all()
    with pytest.raises(UserError, match="the prompt's tokens see each other"):
        Supervised(Transformer(CONFIG), mask="prefix", loss_on="all")


def test_a_prompt_that_is_too_long_is_cut_the_same_way_in_training_and_generation(monkeypatch):
    rows, seen = rows_of(length=24, max_new=6), []
    monkeypatch.setattr("gpt_jax.generation.generate", lambda model, params, prompts, **_: seen.extend(prompts) or [[]])
    task = toy_tasks.reverse(train=1)
    example = dataclasses.replace(
        task.examples("train")[0], source="a long text of more than twenty-four bytes", target="x"
    )
    encoded = EncodedTask(task, TaskInfo(0, task.name), [example], rows, TOKENIZER, rows.length)
    generate_predictions(Supervised(Transformer(CONFIG)), {"model": None}, encoded, [example])
    trained = rows.row(rows.prompt(example, TOKENIZER), [ord("x"), EOT])["tokens"]
    assert seen[0][0] == trained[0] == EOT
    assert len(seen[0]) == 18
    assert TOKENIZER.decode(seen[0][1:]) == "twenty-four bytes"


@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_supervised_keeps_the_contract(mask):
    config = tiny(vocab_size=257, max_positions=24, dropout=0.1)
    batch = batch_of(rows_of(mask), toy_tasks.reverse(train=60), count=8)
    batch.pop("task")
    check_objective(Supervised(Transformer(config), mask=mask), batch)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"name": "supervised", "mask": "prefix"}, True),
        ({"name": "supervised"}, False),
        ({"name": "denoising"}, True),  # its default
        ({"name": "denoising", "mask": "causal"}, False),
        ({"name": "causal_lm"}, False),
    ],
)
def test_a_spec_tells_whether_prompts_are_read_in_both_directions(spec, expected):
    assert bidirectional_prompt(spec) is expected
