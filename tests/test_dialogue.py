"""Dialogue: the loss on every token that chosen roles say, first and last included, and on no other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import apply_of, params_of, tiny
from training import first_step, rows_of

from gpt_jax.data.formats import TaskInfo
from gpt_jax.data.task_rows import EncodedTask, check_targets
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import Host
from gpt_jax.objectives.dialogue import Dialogue
from gpt_jax.tasks import Dialogue as Example
from gpt_jax.tasks import Task
from gpt_jax.testing import check_objective

TOKENIZER = ByteTokenizer(["eot", "user", "assistant"])
EOT = TOKENIZER.eot
CONFIG = tiny(vocab_size=259, max_positions=64)
LENGTH = 64
TURNS = (
    (("user", "hi"), ("assistant", "yes")),
    (("user", "a"), ("assistant", "b"), ("user", "c?"), ("assistant", "d!")),
    (("assistant", "ok"), ("user", "no")),
    (("user", "x"), ("user", "y"), ("assistant", "z")),
)
TASK = Task("talk", "dialogue", ("f1",), {"train": lambda: [Example(t) for t in TURNS]}, labels=("user", "assistant"))


def rows_for(length=LENGTH, **options):
    return Dialogue.rows({"template": "|{role}:"} | options, Host(TOKENIZER.specials, length, 4))


def encoded(length=LENGTH, task=TASK, **options):
    rows = rows_for(length, **options)
    return EncodedTask(task, TaskInfo(0, "talk", task.labels), task.examples("train"), rows, TOKENIZER, length)


def spelled(turns, roles):
    """By enumeration, a token at a time: ids of a dialogue, and which of them are predicted."""
    ids, said = [EOT], [False]
    for role, text in turns:
        for character in f"|{role}:":
            ids.append(ord(character))
            said.append(False)
        for character in text:
            ids.append(ord(character))
            said.append(role in roles)
        ids.append(EOT)
        said.append(role in roles)
    return ids, said


@pytest.mark.parametrize("roles", [("assistant",), ("user",), ("user", "assistant")])
def test_exactly_what_chosen_roles_say_is_predicted_with_the_end_of_each_turn(roles):
    for piece, turns in zip(encoded(length=48, roles=roles).pieces, TURNS, strict=True):
        ids, said = spelled(turns, roles)
        assert piece["tokens"].tolist() == ids[:-1]
        assert piece["targets"].tolist() == ids[1:]
        assert (piece["target_weights"] == 1).tolist() == said[1:]


def test_first_and_last_token_of_every_answer_are_predicted():
    (piece,) = [encoded(length=48).pieces[1]]
    predicted = piece["targets"][piece["target_weights"] == 1].tolist()
    assert predicted == [ord("b"), EOT, ord("d"), ord("!"), EOT]


def test_the_loss_of_packed_rows_is_minus_the_log_probability_of_what_is_said():
    batch = rows_of(encoded())
    assert batch["segment_ids"].max() > 1
    run, expected, tokens = apply_of(CONFIG), 0.0, 0
    for turns in TURNS:
        ids, said = spelled(turns, ("assistant",))
        row = np.zeros((1, 48), np.int32)
        row[0, : len(ids) - 1] = ids[:-1]
        logits = np.asarray(run(params_of(CONFIG), row, mask=Mask()).logits[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected -= sum(log_p[t, ids[t + 1]] for t in range(len(ids) - 1) if said[t + 1])
        tokens += sum(said)
    sums, metrics = summed(batch)
    assert float(sums["lm"]) == pytest.approx(expected, rel=1e-4)
    assert [float(x) for x in metrics["nll"]] == pytest.approx([expected, tokens], rel=1e-4)


def summed(batch):
    objective = Dialogue(Transformer(CONFIG))
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))
    prepared = objective.prepare(jax.tree.map(jnp.asarray, batch), keys, jnp.zeros((), jnp.int32))
    run = jax.jit(lambda p, b: objective.loss({"model": p}, b, keys, False))
    return jax.device_get(run(params_of(CONFIG), prepared))


def test_other_roles_labels_cannot_affect_the_loss():
    batch = rows_of(encoded())
    other = {**batch, "targets": np.where(batch["target_weights"] == 0, 7, batch["targets"])}
    assert float(summed(other)[0]["lm"]) == float(summed(batch)[0]["lm"])


def test_generation_goes_on_from_all_turns_before_the_last_and_its_marker():
    rows = rows_for()
    for turns in TURNS:
        ids, _ = spelled(turns[:-1], ())
        marker = [ord(c) for c in f"|{turns[-1][0]}:"]
        assert rows.prompt(Example(turns), TOKENIZER) == [*ids, *marker]


def test_what_does_not_fit_is_cut_from_the_oldest_turns():
    turns = (("assistant", "a" * 30), ("user", "question"), ("assistant", "answer"))
    task = Task("talk", "dialogue", (), {"train": lambda: [Example(turns)]})
    (piece,) = encoded(length=39, task=task).pieces
    ids, said = spelled(turns, ("assistant",))
    assert piece["tokens"].tolist() == [EOT, *ids[-39:-1]]
    assert (piece["target_weights"] == 1).tolist() == said[-39:]
    assert said[-39]  # part of the first answer is still there, and predicted


def test_markers_are_special_tokens_where_the_template_says_so():
    rows = rows_for(template="<|{role}|>", length=24)
    assert rows.marker("user", TOKENIZER) == [TOKENIZER.specials["user"]]
    assert rows.marker("assistant", TOKENIZER) == [TOKENIZER.specials["assistant"]]
    mixed = rows_for(template="<|eot|>\n<|{role}|> ")
    assert mixed.marker("user", TOKENIZER) == [EOT, ord("\n"), TOKENIZER.specials["user"], ord(" ")]
    with pytest.raises(UserError, match="no special token 'system'"):
        rows.marker("system", TOKENIZER)
    text = rows_for(template="{role}>")  # the name of a role is text, whatever it looks like
    assert text.marker("<|eot|>", TOKENIZER) == [ord(c) for c in "<|eot|>>"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "prefix"}, "earlier turns would see what they must predict"),
        ({"roles": ()}, "name one role or more"),
        ({"roles": "assistant"}, "name one role or more"),
        ({"template": "\n"}, "turns would look alike"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        rows_for(**options)


def test_a_role_that_the_task_has_not_is_refused():
    with pytest.raises(UserError, match=r"objective.roles is 'asistant' \(did you mean 'assistant'\?\)"):
        encoded(roles=("asistant",))


def test_a_role_that_no_example_has_is_refused_with_those_there_are():
    free = dataclasses.replace(TASK, labels=())  # a table of one's own declares no roles
    for roles in (("asistant",), ("user", "asistant")):
        chosen = encoded(task=free, roles=roles)
        with pytest.raises(
            UserError, match=r"is 'asistant' \(did you mean 'assistant'\?\); allowed: assistant, user\."
        ):
            check_targets(chosen.format, [chosen])
    silent = dataclasses.replace(free, splits={"train": lambda: [Example((("bot", "a"), ("user", "b")))]})
    both = [encoded(task=task, roles=("assistant", "bot")) for task in (free, silent)]
    check_targets(both[0].format, both)  # each task has one of them


def test_a_task_whose_rows_have_no_target_left_is_refused():
    turns = (("assistant", "yes"), ("user", "a question that takes all the room there is"))
    early = dataclasses.replace(TASK, splits={"train": lambda: [Example(turns)]})
    check_targets(rows_for(), [encoded(task=early)])
    with pytest.raises(UserError, match="no training example of task talk has a token to predict in its row of 12"):
        check_targets(rows_for(12), [encoded(12, task=early)])


def test_one_step_is_what_it_was():
    expected = {"grad_norm": 3.5253036} | dict.fromkeys(("loss", "loss/lm", "nll"), 5.5431247)
    got = first_step(Dialogue(Transformer(CONFIG)), rows_of(encoded()))
    assert got == pytest.approx(expected, rel=1e-4), got


def test_dialogue_keeps_the_contract():
    config = tiny(num_layers=1, vocab_size=259, max_positions=LENGTH, dropout=0.1)
    batch = {name: np.concatenate([x] * 4)[:8] for name, x in rows_of(encoded()).items() if name != "task"}
    check_objective(Dialogue(Transformer(config)), batch)
