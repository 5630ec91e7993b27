"""Classification: labels of a row's own task only, the same whatever the padding, and the auxiliary language model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import params_of, tiny

from gpt_jax.data.task_rows import EncodedTask, load_tasks
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import Host
from gpt_jax.objectives.classify import Classify
from gpt_jax.testing import check_objective

TOKENIZER = ByteTokenizer(["eot", "sep", "cls"])
CONFIG = tiny(vocab_size=259, max_positions=32)
TASKS, INFOS = load_tasks(("toy_tasks:colours", "toy_tasks:pairs"), "classify", "")


def batch_of(length=24, per_task=4):
    rows = Classify.rows({}, Host(TOKENIZER.specials, length, 8))
    parts = []
    for task, info in zip(TASKS, INFOS, strict=True):
        encoded = EncodedTask(task, info, task.examples("train"), rows, TOKENIZER, length)
        parts.append(encoded.build(np.zeros(per_task, np.int64), np.arange(per_task)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def params_for(objective):
    rng = np.random.default_rng(3)
    head = {"kernel": rng.normal(size=(16, objective.num_labels)), "bias": rng.normal(size=objective.num_labels)}
    return {"model": params_of(CONFIG), "classifier": jax.tree.map(np.float32, head)}


def summed(objective, batch):
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))
    prepared = objective.prepare(jax.tree.map(jnp.asarray, batch), keys, jnp.zeros((), jnp.int32))
    return jax.jit(lambda p, b: objective.loss(p, b, keys, False))(params_for(objective), prepared)


@pytest.mark.parametrize(("pooling", "mask"), [("last", "causal"), ("mean", "bidirectional")])
def test_the_loss_is_the_cross_entropy_over_the_labels_of_the_rows_own_task(pooling, mask):
    objective, batch = Classify(Transformer(CONFIG), INFOS, pooling=pooling, mask=mask), batch_of()
    params, expected, right = params_for(objective), 0.0, 0
    for row in range(8):
        used = int((batch["segment_ids"][row] > 0).sum())
        hidden = (
            Transformer(CONFIG)
            .apply({"params": params["model"]}, batch["tokens"][row : row + 1, :used], mask=Mask(mask))
            .hidden[0]
        )
        pooled = np.asarray(hidden[-1] if pooling == "last" else hidden.mean(0), np.float64)
        info = INFOS[batch["task"][row]]
        own = slice(info.first_label, info.first_label + len(info.labels))
        logits = (pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"])[own]
        label = batch["label"][row] - info.first_label
        expected += np.log(np.exp(logits).sum()) - logits[label]
        right += int(logits.argmax() == label)
    sums, metrics = summed(objective, batch)
    assert float(sums["classify"]) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["accuracy"][0]) == right and float(metrics["accuracy"][1]) == 8


def test_the_width_of_the_padding_does_not_matter():
    objective = Classify(Transformer(CONFIG), INFOS)
    narrow, wide = (float(summed(objective, batch_of(length))[0]["classify"]) for length in (30, 32))
    assert narrow == pytest.approx(wide, rel=1e-5)


def test_the_auxiliary_term_is_the_language_model_of_the_rows_text():
    objective, batch = Classify(Transformer(CONFIG), INFOS, coefs={"classify": 1.0, "lm": 0.5}), batch_of()
    expected = 0.0
    for row in range(8):
        ids = batch["tokens"][row][batch["segment_ids"][row] > 0]
        logits = Transformer(CONFIG).apply({"params": params_of(CONFIG)}, ids[None]).logits[0]
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        expected -= sum(log_p[t, ids[t + 1]] for t in range(len(ids) - 1))
    assert float(summed(objective, batch)[0]["lm"]) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="needs mask='causal'"):
        Classify(Transformer(CONFIG), INFOS, coefs={"lm": 0.5}, mask="bidirectional")


def test_predictions_are_names_of_the_tasks_own_labels():
    objective, batch = Classify(Transformer(CONFIG), INFOS), batch_of()
    labels = np.asarray(jax.jit(objective.predict)(params_for(objective), batch)["label"])
    rows = Classify.rows({}, Host(TOKENIZER.specials, 24, 8))
    for number, (task, info) in enumerate(zip(TASKS, INFOS, strict=True)):
        encoded = EncodedTask(task, info, task.examples("train")[:4], rows, TOKENIZER, 24)
        own = labels[4 * number : 4 * number + 4] - info.first_label
        assert (own >= 0).all() and (own < len(info.labels)).all()
        names = rows.predictions({"label": labels[4 * number : 4 * number + 4]}, encoded)
        assert set(names) <= set(task.labels)


@pytest.mark.parametrize("coefs", [{"classify": 1.0}, {"classify": 1.0, "lm": 0.5}])
def test_classify_keeps_the_contract(coefs):
    config = tiny(vocab_size=259, max_positions=24, dropout=0.1)
    check_objective(Classify(Transformer(config), INFOS, coefs=coefs, head_dropout=0.1), batch_of())
