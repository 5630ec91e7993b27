"""Tagging: the first sub-token of a word carries its tag, one of the row's own task; and 32 examples are learnt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import apply_of, params_of, tiny
from training import first_step, rows_of, train

from gpt_jax.data.formats import TaskInfo
from gpt_jax.data.sentencepieces import train_sentencepiece
from gpt_jax.data.task_rows import EncodedTask
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import Host
from gpt_jax.objectives.tag import Tag
from gpt_jax.tasks import Tagged, Task
from gpt_jax.testing import check_objective

TOKENIZER = ByteTokenizer(["eot"])
EOT = TOKENIZER.eot
LENGTH = 16
CONFIG = tiny(vocab_size=257, max_positions=40)


def examples(count, first=0):
    """Words of one to three letters; the tag of a word says whether the next word begins with a vowel."""
    rng = np.random.default_rng(first)
    for i in range(count):
        lengths = rng.integers(1, 4, rng.integers(2, 5))
        words = ["".join("abcde"[rng.integers(5)] for _ in range(n)) for n in lengths]
        after = [*words[1:], "b"]
        yield Tagged(tuple(words), tuple("B-V" if w[0] in "ae" else "O" for w in after), where=f"vowels:{first + i}")


def parity(count):
    """Is the number of letters odd?"""
    for i in range(count):
        words = tuple("xyz"[: 1 + (i + j) % 3] for j in range(1 + i % 4))
        yield Tagged(words, tuple(("even", "odd")[len(word) % 2] for word in words), where=f"parity:{i}")


VOWELS = Task("vowels", "tag", ("accuracy",), {"train": lambda: examples(32)}, labels=("O", "B-V"))
PARITY = Task("parity", "tag", ("accuracy",), {"train": lambda: parity(8)}, labels=("odd", "even"))
INFOS = (TaskInfo(0, "vowels", VOWELS.labels, 0), TaskInfo(1, "parity", PARITY.labels, 2))


def encoded(task, info, tokenizer=TOKENIZER, length=LENGTH):
    rows = Tag.rows({}, Host(tokenizer.specials, length, 8))
    return EncodedTask(task, info, task.examples("train"), rows, tokenizer, length)


def batch_of(length=LENGTH, per_task=4):
    parts = [
        rows_of(encoded(task, info, length=length), range(per_task))
        for task, info in zip((VOWELS, PARITY), INFOS, strict=True)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def params_for():
    rng = np.random.default_rng(3)
    head = {"kernel": rng.normal(size=(16, 4)), "bias": rng.normal(size=4)}
    return {"model": params_of(CONFIG), "tagger": jax.tree.map(np.float32, head)}


def summed(objective, batch):
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))
    prepared = objective.prepare(jax.tree.map(jnp.asarray, batch), keys, jnp.zeros((), jnp.int32))
    return jax.device_get(jax.jit(lambda p, b: objective.loss(p, b, keys, False))(params_for(), prepared))


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_the_first_sub_token_of_each_word_carries_its_tag(kind):
    text = "the cat naïve café says that the cats 日本 say that a café is naïve to the cat\n" * 40
    specials = ["eot"]
    tokenizer = TOKENIZER if kind == "byte" else train_sentencepiece([text], "bpe", 320, specials)
    words = ("the", "cats", "日本", "'s", "naïve", "unknown€", "a", "café")
    task = dataclasses.replace(VOWELS, splits={"train": lambda: [Tagged(words, ("O", "B-V") * 4)]}, labels=("O", "B-V"))
    (piece,) = encoded(task, INFOS[0], tokenizer, length=64).pieces
    heads = np.flatnonzero(piece["target_weights"])
    assert len(heads) == len(words)
    assert tokenizer.decode(piece["tokens"]) == " ".join(words)
    assert (len(piece["tokens"]) > len(" ".join(words))) == (kind == "byte")
    whole = b"".join(tokenizer.token_bytes(t) for t in piece["tokens"].tolist())
    at = 0
    for word, head in zip(words, heads.tolist(), strict=True):
        begin = whole.index(word.encode(), at)
        before = sum(len(tokenizer.token_bytes(t)) for t in piece["tokens"][:head].tolist())
        assert before <= begin < before + len(tokenizer.token_bytes(int(piece["tokens"][head])))
        at = begin + len(word.encode())
    assert piece["targets"][heads].tolist() == [0, 1] * 4
    assert piece["tokens"][0] == tokenizer.eot and not piece["target_weights"][0]


@pytest.mark.parametrize("mask", ["bidirectional", "causal"])
def test_the_loss_is_the_cross_entropy_over_the_rows_own_tags_at_first_sub_tokens(mask):
    batch, params = batch_of(), params_for()
    structure = Mask(mask, segments_BxT=batch["segment_ids"])
    hidden = np.asarray(apply_of(CONFIG)(params["model"], batch["tokens"], mask=structure).hidden, np.float64)
    expected, right, words = 0.0, 0, 0
    for row, (task, number) in enumerate([(VOWELS, i) for i in range(4)] + [(PARITY, i) for i in range(4)]):
        example, info = task.examples("train")[number], INFOS[row // 4]
        at = 1
        for word, tag in zip(example.words, example.tags, strict=True):
            logits = hidden[row, at] @ params["tagger"]["kernel"] + params["tagger"]["bias"]
            logits = logits[info.first_label : info.first_label + 2]
            expected += np.log(np.exp(logits).sum()) - logits[task.labels.index(tag)]
            right += int(logits.argmax() == task.labels.index(tag))
            words += 1
            at += len(word) + 1
    sums, metrics = summed(Tag(Transformer(CONFIG), INFOS, mask=mask), batch)
    assert float(sums["tag"]) == pytest.approx(expected, rel=1e-4)
    assert [float(x) for x in metrics["accuracy"]] == [right, words]
    assert float(metrics["tag_nll"][0]) == pytest.approx(expected, rel=1e-4)


def test_tags_at_other_tokens_cannot_affect_the_loss_and_the_width_of_the_padding_does_not_matter():
    objective, batch = Tag(Transformer(CONFIG), INFOS), batch_of()
    loss = float(summed(objective, batch)[0]["tag"])
    other = {**batch, "targets": np.where(batch["target_weights"] == 0, 1, batch["targets"])}
    assert float(summed(objective, other)[0]["tag"]) == loss
    assert float(summed(objective, batch_of(length=40))[0]["tag"]) == pytest.approx(loss, rel=1e-5)


def test_predictions_are_tags_by_word_and_words_beyond_the_row_are_outside():
    whole = encoded(VOWELS, INFOS[0], length=40)
    tags = rows_of(whole)["targets"]
    assert whole.format.predictions({"tags": tags}, whole) == [e.tags for e in whole.examples]
    second = encoded(PARITY, INFOS[1])
    assert second.format.predictions({"tags": rows_of(second)["targets"]}, second) == [e.tags for e in second.examples]
    short = encoded(VOWELS, INFOS[0], length=6)
    everywhere = np.ones((32, 6), np.int32)  # B-V
    for example, found in zip(short.examples, short.format.predictions({"tags": everywhere}, short), strict=True):
        starts = [1 + len(" ".join(example.words[:i])) + (i > 0) for i in range(len(example.words))]
        assert found == tuple("B-V" if at < 6 else "O" for at in starts)


def test_what_is_predicted_on_the_device_is_the_likeliest_tag_of_the_task():
    objective, batch = Tag(Transformer(CONFIG), INFOS), batch_of()
    tags = np.asarray(jax.jit(objective.predict)(params_for(), batch)["tags"])
    right = (tags == batch["targets"]) * batch["target_weights"]
    assert right.sum() == float(summed(objective, batch)[1]["accuracy"][0])
    assert set(tags[:4].ravel()) <= {0, 1} and set(tags[4:].ravel()) <= {2, 3}


def test_32_examples_whose_tags_depend_on_the_right_are_learnt():
    config = tiny(vocab_size=257, max_positions=LENGTH, d_model=32, d_ff=64)
    rows = encoded(VOWELS, INFOS[0])
    objective, batch = Tag(Transformer(config), INFOS[:1]), rows_of(rows)
    state, _ = train(objective, [batch] * 200, rate=1e-2)
    outputs = jax.device_get(jax.jit(objective.predict)(state.all_params, batch))
    assert rows.task.score(rows.format.predictions(outputs, rows), rows.examples)["accuracy"] > 0.99


def test_one_step_is_what_it_was():
    expected = {"accuracy": 0.5652174, "grad_norm": 1.2070781} | dict.fromkeys(
        ("loss", "loss/tag", "tag_nll"), 0.6924583
    )
    got = first_step(Tag(Transformer(CONFIG), INFOS), batch_of())
    assert got == pytest.approx(expected, rel=1e-4), got


def test_tag_keeps_the_contract():
    config = tiny(num_layers=1, vocab_size=257, max_positions=LENGTH, dropout=0.1)
    check_objective(Tag(Transformer(config), INFOS, head_dropout=0.1), batch_of())
    with pytest.raises(UserError, match="objective.mask is 'prefix'"):
        Tag(Transformer(config), INFOS, mask="prefix")
