"""Multiple choice: a softmax over the choices that are there, each read alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import apply_of, params_of, tiny
from training import first_step, rows_of, train

from gpt_jax.data.formats import TaskInfo
from gpt_jax.data.task_rows import EncodedTask
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import Host
from gpt_jax.objectives.multiple_choice import MultipleChoice
from gpt_jax.tasks import MultipleChoice as Example
from gpt_jax.tasks import Task
from gpt_jax.testing import check_objective

TOKENIZER = ByteTokenizer(["eot", "sep", "cls"])
CONFIG = tiny(vocab_size=259, max_positions=24)
LENGTH = 14


def repeats(count):
    """Which word begins as the prompt does? Two to four choices."""
    rng = np.random.default_rng(0)
    for i in range(count):
        letters = rng.permutation(list("abcdef"))[: 2 + i % 3]
        choices = tuple(letter + "xyz"[: rng.integers(1, 4)] for letter in letters)
        answer = int(rng.integers(len(choices)))
        yield Example(f"{choices[answer][0]}?", choices, answer, where=f"repeats:{i}")


TASK = Task("repeats", "multiple_choice", ("accuracy",), {"train": lambda: repeats(32)})


def encoded(task=TASK, length=LENGTH, **options):
    rows = MultipleChoice.rows(options, Host(TOKENIZER.specials, length, 8))
    return EncodedTask(task, TaskInfo(0, task.name), task.examples("train"), rows, TOKENIZER, length)


def params_for():
    rng = np.random.default_rng(3)
    head = {"kernel": rng.normal(size=(16, 1))}
    return {"model": params_of(CONFIG), "scorer": jax.tree.map(np.float32, head)}


def summed(objective, batch):
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))
    prepared = objective.prepare(jax.tree.map(jnp.asarray, batch), keys, jnp.zeros((), jnp.int32))
    return jax.device_get(jax.jit(lambda p, b: objective.loss(p, b, keys, False))(params_for(), prepared))


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_the_loss_is_the_softmax_over_the_choices_of_each_example(mask):
    params, expected, right = params_for(), 0.0, 0
    run = apply_of(CONFIG)
    for example in TASK.examples("train")[:8]:
        scores = []
        for choice in example.choices:
            text = TOKENIZER.encode(example.prompt).tolist(), TOKENIZER.encode(choice).tolist()
            ids = [TOKENIZER.eot, *text[0], TOKENIZER.specials["sep"], *text[1], TOKENIZER.specials["cls"]]
            row = np.zeros((1, LENGTH), np.int32)
            row[0, : len(ids)] = ids
            hidden = run(params["model"], row, mask=Mask(mask, segments_BxT=(np.arange(LENGTH) < len(ids))[None] * 1))
            last = np.asarray(hidden.hidden[0, len(ids) - 1], np.float64)
            scores.append(float(last @ params["scorer"]["kernel"][:, 0]))
        expected += np.log(np.exp(scores).sum()) - scores[example.answer]
        right += int(np.argmax(scores) == example.answer)
    sums, metrics = summed(MultipleChoice(Transformer(CONFIG), mask=mask), rows_of(encoded(), range(8)))
    assert float(sums["multiple_choice"]) == pytest.approx(expected, rel=1e-4)
    assert [float(x) for x in metrics["accuracy"]] == [right, 8]


def test_what_stands_in_the_place_of_a_missing_choice_and_the_padding_do_not_matter():
    objective, batch = MultipleChoice(Transformer(CONFIG)), rows_of(encoded(), range(8))
    loss = float(summed(objective, batch)[0]["multiple_choice"])
    absent = ~batch["choice_mask"]
    assert absent.any()
    other = {**batch, "tokens": np.where(absent[..., None], 77, batch["tokens"])}
    other["segment_ids"] = np.where(absent[..., None], 1, batch["segment_ids"])
    assert float(summed(objective, other)[0]["multiple_choice"]) == loss
    wide = rows_of(encoded(length=20), range(8))
    assert float(summed(objective, wide)[0]["multiple_choice"]) == pytest.approx(loss, rel=1e-5)
    roomy = rows_of(encoded(max_choices=6), range(8))
    found = summed(MultipleChoice(Transformer(CONFIG), max_choices=6), roomy)[0]["multiple_choice"]
    assert float(found) == pytest.approx(loss, rel=1e-5)


def test_too_long_a_pair_keeps_the_end_of_the_prompt_and_half_a_row_of_the_choice():
    task = Task("long", "multiple_choice", (), {"train": lambda: [Example("p" * 9 + "q" * 9, ("c" * 50, "d"), 1)]})
    tokens = rows_of(encoded(task, length=13))["tokens"][0]
    shown = [TOKENIZER.decode(row[row > 0], specials="show") for row in tokens]
    assert shown == ["<|eot|>qqqqq<|sep|>ccccc<|cls|>", "<|eot|>" + "q" * 9 + "<|sep|>d<|cls|>", "", ""]


def test_more_choices_than_there_is_room_for_are_refused():
    with pytest.raises(UserError, match=r"repeats:1: an example has 3 choices; objective.max_choices is 2"):
        encoded(max_choices=2)
    with pytest.raises(UserError, match="max_choices is 1; it must be at least 2"):
        MultipleChoice(Transformer(CONFIG), max_choices=1)


def test_32_examples_are_learnt():
    config = tiny(vocab_size=259, max_positions=LENGTH, d_model=32, d_ff=64)
    rows = encoded()
    objective, batch = MultipleChoice(Transformer(config)), rows_of(rows)
    state, _ = train(objective, [batch] * 150, rate=1e-2)
    outputs = jax.device_get(jax.jit(objective.predict)(state.all_params, batch))
    assert rows.task.score(rows.format.predictions(outputs, rows), rows.examples) == {"accuracy": 1.0}


def test_one_step_is_what_it_was():
    expected = {"accuracy": 0.25, "grad_norm": 1.0504756}
    expected |= dict.fromkeys(("loss", "loss/multiple_choice", "multiple_choice_nll"), 1.0290923)
    got = first_step(MultipleChoice(Transformer(CONFIG)), rows_of(encoded(), range(8)))
    assert got == pytest.approx(expected, rel=1e-4), got


def test_multiple_choice_keeps_the_contract():
    config = tiny(num_layers=1, vocab_size=259, max_positions=LENGTH, dropout=0.1)
    check_objective(MultipleChoice(Transformer(config), head_dropout=0.1), rows_of(encoded(), range(8)))
