"""Span QA: answers are recovered from every window that holds them, windows cover contexts, and spans are learnt."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import apply_of, params_of, tiny
from training import first_step, rows_of, train

from gpt_jax.data.formats import TaskInfo
from gpt_jax.data.sentencepieces import train_sentencepiece
from gpt_jax.data.task_rows import EncodedTask
from gpt_jax.data.tokenizer import ByteTokenizer, CharTokenizer
from gpt_jax.errors import UserError
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import Host
from gpt_jax.objectives.span_qa import SpanQA, best_spans, encode_context
from gpt_jax.tasks import SpanQA as Example
from gpt_jax.tasks import Task
from gpt_jax.testing import check_objective

SPECIALS = ["eot", "sep", "cls"]
BYTES = ByteTokenizer(SPECIALS)
CONFIG = tiny(vocab_size=259, max_positions=40)
INFO = TaskInfo(0, "spans")
TEXT = "A naïve cat — « Félix » — ate 10,000 日本 mice (€5 each) in Zürich; then it slept 🐈 well.\n"


def bpe():
    return train_sentencepiece([TEXT.replace("🐈", "")] * 40, "bpe", 330, SPECIALS)


def task_of(examples):
    return Task("spans", "span_qa", ("exact_match", "f1"), {"train": lambda: list(examples)})


def encoded(examples, tokenizer=BYTES, length=32, **options):
    rows = SpanQA.rows(options, Host(tokenizer.specials, length, 8))
    task = task_of(examples)
    return EncodedTask(task, INFO, task.examples("train"), rows, tokenizer, length)


def letters(count, seed=0):
    """Which letters stand between the brackets?"""
    rng = np.random.default_rng(seed)
    for i in range(count):
        before, answer, after = ("".join("wxyz"[rng.integers(4)] for _ in range(rng.integers(1, 5))) for _ in range(3))
        text = f"{before}[{answer}]{after}"
        yield Example(str(i), "in?", text, ((answer, text.index("[") + 1),), where=f"letters:{i}")


def batch_of(length=24, count=8):
    return rows_of(encoded(letters(count), length=length))


def params_for():
    rng = np.random.default_rng(3)
    head = {"kernel": rng.normal(size=(16, 2))}
    return {"model": params_of(CONFIG), "pointers": jax.tree.map(np.float32, head)}


def summed(objective, batch):
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))
    prepared = objective.prepare(jax.tree.map(jnp.asarray, batch), keys, jnp.zeros((), jnp.int32))
    return jax.device_get(jax.jit(lambda p, b: objective.loss(p, b, keys, False))(params_for(), prepared))


def minimal_tokens(context, start, end, tokenizer):
    """By brute force: the first and last token that have bytes of context[start:end]."""
    begin, stop = len(context[:start].encode()), len(context[:end].encode())
    touched, at = [], 0
    for number, token in enumerate(tokenizer.encode(context).tolist()):
        size = len(tokenizer.token_bytes(token))
        if at < stop and at + size > begin:
            touched.append(number)
        at += size
    return touched[0], touched[-1]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokens_and_characters_of_any_span_are_those_of_its_bytes(kind):
    tokenizer = BYTES if kind == "byte" else bpe()
    context = encode_context(TEXT, tokenizer)
    spelled = [tokenizer.token_bytes(t) for t in context.ids.tolist()]
    assert kind == "byte" or max(map(len, spelled)) > 3
    assert any(len(piece) == 1 and piece[0] > 0x7F for piece in spelled)  # inside a character
    for start, end in itertools.combinations(range(len(TEXT) + 1), 2):
        first, last = context.tokens_of(start, end)
        assert (first, last) == minimal_tokens(TEXT, start, end, tokenizer)
        low, high = context.characters_of(first, last)
        assert low <= start and high >= end
        if kind == "byte":
            assert (low, high) == (start, end)
        piece = b"".join(spelled[first : last + 1])  # the characters that these tokens touch, and no others
        assert piece in TEXT[low:high].encode()
        assert len(TEXT[low:high].encode()) - len(piece) < 2 * 4


@pytest.mark.parametrize(("stride", "length"), [(3, 20), (7, 20), (100, 20), (5, 33), (1, 15)])
def test_windows_cover_the_context_in_order_and_overlap_by_the_stride(stride, length):
    example = Example("0", "who", TEXT * 2, (("cat", TEXT.index("cat")),))
    tokens = BYTES.encode(example.context)
    pieces = encoded([example], length=length, doc_stride=stride).pieces
    room = length - len("who") - 3
    step = min(stride, room)
    for number, piece in enumerate(pieces):
        ids = piece["tokens"].tolist()
        window = ids[len("who") + 2 : -1]
        assert ids[: len("who") + 2] == [BYTES.eot, *BYTES.encode("who").tolist(), BYTES.specials["sep"]]
        assert ids[-1] == BYTES.specials["cls"] and len(ids) <= length
        assert window == tokens[number * step : number * step + room].tolist()
        assert np.flatnonzero(piece["pointable"]).tolist() == list(range(len("who") + 2, len(ids)))
    assert (len(pieces) - 1) * step + room >= len(tokens)
    assert len(pieces) == 1 or (len(pieces) - 2) * step + room < len(tokens)  # none is superfluous


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_answers_are_recovered_exactly_from_every_window_that_holds_them(kind):
    tokenizer = BYTES if kind == "byte" else bpe()
    words = [word for word in TEXT.replace("(", " ").replace(")", " ").split() if word.isalpha()]
    examples = [Example(w, "who?", TEXT, ((w, TEXT.index(w)),)) for w in words]
    length = 40 if kind == "byte" else 24
    rows = encoded(examples, tokenizer, length, doc_stride=5)
    batch = rows_of(rows)
    held, recovered, cls = 0, 0, (batch["segment_ids"] > 0).sum(1) - 1
    for number, example in enumerate(examples):
        mine = np.flatnonzero(rows.owners == number)
        ((answer, at),) = example.answers
        span = minimal_tokens(TEXT, at, at + len(answer), tokenizer)
        before = len(tokenizer.encode("who?")) + 2
        for place, row in enumerate(mine.tolist()):
            used = int((batch["segment_ids"][row] > 0).sum())
            begin, end = 5 * place, 5 * place + used - before - 1
            inside = begin <= span[0] and span[1] < end
            labels = (int(batch["start"][row]), int(batch["end"][row]))
            if not inside:
                assert labels == (used - 1, used - 1)  # cls: not in this window
                continue
            held += 1
            assert labels == (span[0] - begin + before, span[1] - begin + before)
            # The prediction of that window's labels, the other windows being less likely.
            score = np.full(len(rows.owners), -5.0, np.float32)
            score[row] = 0.0
            found = {name: np.where(batch["start"] == cls, before, batch[name]) for name in ("start", "end")}
            outputs = {"score": score, **found}
            found = rows.format.predictions(outputs, rows)[number]
            low, high = encode_context(TEXT, tokenizer).characters_of(*span)
            assert found == TEXT[low:high].strip()
            recovered += found == answer
    assert held > len(examples)
    assert recovered == held or (kind == "bpe" and recovered > 0.8 * held)  # a token may reach beyond the answer


def test_of_several_answers_the_first_inside_the_window_is_the_label():
    text = "aaaa bbbb cccc dddd eeee ffff"
    example = Example("0", "q", text, (("cccc dddd eeee ffff", 10), ("ffff", 25), ("dddd", 15)))
    rows = encoded([example], length=4 + 12, doc_stride=12)
    batch = rows_of(rows)
    found = [
        BYTES.decode(batch["tokens"][row][batch["start"][row] : batch["end"][row] + 1], specials="show")
        for row in range(3)
    ]
    assert found == ["<|cls|>", "dddd", "ffff"]


def test_long_questions_are_cut_and_leave_room_for_the_context():
    example = Example("0", "q" * 50, "context", (("text", 3),))
    piece = encoded([example], length=17, doc_stride=4).pieces[0]
    assert BYTES.decode(piece["tokens"], specials="show") == "<|eot|>qqqqqqq<|sep|>context<|cls|>"
    (piece,) = encoded([example], length=32, max_question=3).pieces
    assert BYTES.decode(piece["tokens"], specials="show") == "<|eot|>qqq<|sep|>context<|cls|>"


def test_a_tokenizer_that_does_not_spell_the_context_is_refused():
    lossy = CharTokenizer("abc ", SPECIALS, unknown="unk")
    with pytest.raises(UserError, match="does not keep the text of file:3 as it is"):
        encoded([Example("0", "a", "a b d", (("b", 2),), where="file:3")], lossy)


@pytest.mark.parametrize("longest", [1, 3, 50])
def test_the_best_span_is_that_of_a_search_over_all(longest):
    rng = np.random.default_rng(longest)
    start, end = rng.integers(-6, 0, (2, 20, 9)).astype(np.float32)  # whole numbers: ties
    start[:, 4], end[3:, 6:] = -1e30, -1e30
    score, first, last = map(np.asarray, jax.jit(best_spans, static_argnums=2)(start, end, longest))
    for row in range(20):
        pairs = [(i, j) for i in range(9) for j in range(i, min(i + longest, 9))]
        best = max(pairs, key=lambda pair: (start[row, pair[0]] + end[row, pair[1]], -pair[0], -pair[1]))
        assert (first[row], last[row]) == best
        assert score[row] == start[row, best[0]] + end[row, best[1]]


@pytest.mark.parametrize("mask", ["bidirectional", "causal"])
def test_the_loss_is_that_of_two_softmaxes_over_the_window_and_cls(mask):
    batch, params, expected = batch_of(), params_for(), 0.0
    structure = Mask(mask, segments_BxT=batch["segment_ids"])
    hidden = np.asarray(apply_of(CONFIG)(params["model"], batch["tokens"], mask=structure).hidden, np.float64)
    for row in range(8):
        used = int((batch["segment_ids"][row] > 0).sum())
        logits = hidden[row, 5:used] @ params["pointers"]["kernel"]  # the window and cls
        for column, name in enumerate(("start", "end")):
            at = int(batch[name][row]) - 5
            expected += 0.5 * (np.log(np.exp(logits[:, column]).sum()) - logits[at, column])
    sums, metrics = summed(SpanQA(Transformer(CONFIG), mask=mask), batch)
    assert float(sums["span_qa"]) == pytest.approx(expected, rel=1e-4)
    assert [float(x) for x in metrics["span_nll"]] == pytest.approx([expected, 8], rel=1e-4)


def test_rows_of_padding_and_the_width_of_the_padding_do_not_matter():
    objective, batch = SpanQA(Transformer(CONFIG)), batch_of()
    loss = float(summed(objective, batch)[0]["span_qa"])
    assert float(summed(objective, batch_of(length=40))[0]["span_qa"]) == pytest.approx(loss, rel=1e-5)
    padded = {name: np.concatenate([x, np.zeros((4, *x.shape[1:]), x.dtype)]) for name, x in batch.items()}
    sums, metrics = summed(objective, padded)
    assert float(sums["span_qa"]) == pytest.approx(loss, rel=1e-5) and float(metrics["span_accuracy"][1]) == 8


def test_predictions_never_point_at_the_question_or_at_cls():
    objective, batch = SpanQA(Transformer(CONFIG), max_answer=4), batch_of()
    params = params_for()
    outputs = jax.device_get(jax.jit(objective.predict)(params, batch))
    used = (batch["segment_ids"] > 0).sum(1)
    assert (outputs["start"] >= 5).all() and (outputs["end"] < used - 1).all()
    assert (outputs["start"] <= outputs["end"]).all() and (outputs["end"] < outputs["start"] + 4).all()
    assert (outputs["score"] < 0).all()  # a log-probability


def test_32_examples_are_learnt_to_the_last_character():
    config = tiny(vocab_size=259, max_positions=24, d_model=32, d_ff=64)
    rows = encoded(letters(32), length=24)
    objective, batch = SpanQA(Transformer(config)), rows_of(rows)
    state, metrics = train(objective, [batch] * 150, rate=1e-2)
    assert metrics[-1]["span_accuracy"] > 0.99
    outputs = jax.device_get(jax.jit(objective.predict)(state.all_params, batch))
    scores = rows.task.score(rows.format.predictions(outputs, rows), rows.examples)
    assert scores == {"exact_match": 100.0, "f1": 100.0}


def test_one_step_is_what_it_was():
    expected = {"span_accuracy": 0.0, "grad_norm": 1.4238995} | dict.fromkeys(
        ("loss", "loss/span_qa", "span_nll"), 2.3541689
    )
    got = first_step(SpanQA(Transformer(CONFIG)), batch_of())
    assert got == pytest.approx(expected, rel=1e-4), got


def test_span_qa_keeps_the_contract():
    config = tiny(num_layers=1, vocab_size=259, max_positions=24, dropout=0.1)
    check_objective(SpanQA(Transformer(config), head_dropout=0.1), batch_of())


@pytest.mark.parametrize("options", [{"doc_stride": 0}, {"max_question": 0}, {"max_answer": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UserError, match=f"objective.{next(iter(options))} is .*; it must be at least 1"):
        SpanQA.rows(options, Host(BYTES.specials, 32, 8))
