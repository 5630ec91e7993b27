"""Scoring: sums against the plain forward pass, alone and in any batch; where a text is cut; what each normalisation
prefers on models whose probabilities are known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import VOCAB, params_of, tiny

from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.model import Transformer
from gpt_jax.score import Score, Scorer, normalise, rolling_windows, split_pair
from gpt_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def model():
    config = tiny(positions="rope", max_positions=24)
    return Transformer(config), params_of(config)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    return model.apply({"params": params}, tokens).logits


def plain(model, params, ids):
    """log P of every token but the first, in float64 from the forward pass of one row (padded: it is causal)."""
    padded = np.zeros((1, 40), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(forward(model, params, padded)[0, : len(ids)], np.float64)
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return logp[np.arange(len(ids) - 1), ids[1:]], logp.argmax(-1)[:-1] == np.asarray(ids[1:])


def random_pairs(count, seed=0, longest=20):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        n = int(rng.integers(2, longest))
        ids, cut = rng.integers(0, VOCAB, n).tolist(), int(rng.integers(1, n))
        pairs.append((ids[:cut], ids[cut:]))
    return pairs


def test_scores_are_those_of_the_plain_forward_pass_whatever_the_batch(model):
    pairs = random_pairs(40)
    scorer = Scorer(*model)
    together = scorer.score_ids(pairs)
    for index in (0, 7, 23, 39):
        context, continuation = pairs[index]
        expected, hits = plain(*model, context + continuation)
        n = len(continuation)
        np.testing.assert_allclose(together[index].logprobs, expected[-n:], atol=1e-4)
        assert together[index].greedy == bool(hits[-n:].all())
        alone = scorer.score_ids([pairs[index]])[0]
        np.testing.assert_allclose(alone.logprobs, together[index].logprobs, atol=1e-5)
    assert scorer.cut == 0


def test_a_continuation_that_greedy_decoding_gives_is_greedy(model):
    from gpt_jax.generation import generate

    new = generate(*model, [[3, 1, 4]], max_tokens=5, temperature=0.0)[0]
    other = [*new[:-1], (new[-1] + 1) % VOCAB]
    greedy, changed = Scorer(*model).score_ids([([3, 1, 4], new), ([3, 1, 4], other)])
    assert greedy.greedy and not changed.greedy


def test_a_mesh_changes_nothing(model):
    pairs = random_pairs(19, seed=1)
    expected = Scorer(*model).score_ids(pairs)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    for a, b in zip(Scorer(*model, mesh=mesh).score_ids(pairs), expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert a.greedy == b.greedy


@pytest.mark.parametrize("attention", ["splash", "cudnn"])
def test_a_model_of_another_device_is_scored_here(model, attention):
    configs = [dataclasses.replace(model[0].config, dtype="bfloat16", attention=name) for name in ("auto", attention)]
    found = [Scorer(Transformer(config), model[1]).score_ids(random_pairs(3)) for config in configs]
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(mine.logprobs, theirs.logprobs)


def test_pieces_of_the_logits_change_nothing(model, monkeypatch):
    pairs = random_pairs(9, seed=2)
    expected = Scorer(*model).score_ids(pairs)
    monkeypatch.setattr("gpt_jax.score._LOGIT_BYTES", 1)
    for a, b in zip(Scorer(*model).score_ids(pairs), expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_few_programs_serve_many_lengths(model):
    from gpt_jax.score import _score

    _score.clear_cache()
    Scorer(*model).score_ids(random_pairs(600, seed=3, longest=25))
    assert _score._cache_size() <= 2  # 16 and 24 tokens


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_a_context_too_long_loses_its_beginning_or_is_refused(model):
    context, continuation = [5] * 10 + list(range(20)), [7, 8, 9]
    scorer = Scorer(*model)
    score = scorer.score_ids([(context, continuation)])[0]
    expected, _ = plain(*model, (context + continuation)[-25:])
    np.testing.assert_allclose(score.logprobs, expected[-3:], atol=1e-4)
    assert scorer.cut == 1
    with pytest.raises(UserError, match="context of 30 tokens and its continuation of 3 do not fit the 24"):
        Scorer(*model, overflow="error").score_ids([(context, continuation)])


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (([1], list(range(25))), "continuation has 25 tokens; the model reads 24"),
        (([1], []), "continuation is empty"),
        (([], [1]), "context is empty"),
        (([1], [VOCAB]), f"token {VOCAB} is not in the model's vocabulary of {VOCAB}"),
    ],
)
def test_what_cannot_be_scored_is_told(model, pair, said):
    with pytest.raises(UserError, match=said):
        Scorer(*model).score_ids([pair])


# -- where a text is cut ----------------------------------------------------------------------------------------------


class Merging(ByteTokenizer):
    """Bytes, but 'ab' and 'c ' are one token each (256, 257)."""

    def __init__(self):
        super().__init__()
        self.vocab_size = 258

    def _encode(self, text):
        raw, out, i = text.encode(), [], 0
        while i < len(raw):
            two = raw[i : i + 2]
            found = {b"ab": 256, b"c ": 257}.get(two)
            out.append(found if found is not None else raw[i])
            i += 1 + (found is not None)
        return np.asarray(out, np.int32)


def test_a_token_across_the_boundary_belongs_to_the_continuation():
    tokenizer = Merging()
    x, b, d, space = (ord(c) for c in "xbd ")
    assert split_pair(tokenizer, "xa", "bd") == ([x], [256, d])
    assert split_pair(tokenizer, "xa", "bd", "separate") == ([x, ord("a")], [b, d])
    assert split_pair(tokenizer, "xx", "bd") == ([x, x], [b, d])
    # White space at the context's end is the beginning of a word: it is scored with it.
    assert split_pair(tokenizer, "x ", "d") == ([x], [space, d])
    assert split_pair(tokenizer, "x ", "d", "separate") == ([x, space], [d])
    assert split_pair(tokenizer, "a", "b") == ([], [256])
    with pytest.raises(UserError, match="boundary is 'middle'"):
        split_pair(tokenizer, "a", "b", "middle")
    with pytest.raises(UserError, match="nothing to score"):
        split_pair(tokenizer, "a", "")


# -- whole texts -----------------------------------------------------------------------------------------------------


def test_windows_are_those_of_the_harness_and_score_each_token_once():
    # The example of lm-evaluation-harness: tokens 0 to 9, a context of 4.
    windows = rolling_windows(range(10), -1, 4)
    assert [(c + n[:-1], n) for c, n in windows] == [
        ([-1, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]
    for length in range(1, 8):
        for stride in range(1, length + 1):
            for n in range(0, 17):
                found = rolling_windows(range(n), -1, length, stride)
                assert [t for _, new in found for t in new] == list(range(n))
                for context, new in found:
                    assert 1 <= len(context) and len(context) + len(new) - 1 <= length
                    assert context[-1] == new[0] - 1  # it ends just before what it predicts
    with pytest.raises(UserError, match="stride is 5"):
        rolling_windows(range(10), -1, 4, 5)


def test_a_stride_of_one_is_the_brute_force(model):
    ids = np.random.default_rng(5).integers(1, VOCAB, 31).tolist()
    scorer = Scorer(*model, max_length=8)
    total = sum(s.total for s in scorer.score_ids(rolling_windows(ids, 0, 8, 1)))
    text = [0, *ids]
    brute = sum(plain(*model, text[max(0, end - 8) : end + 1])[0][-1] for end in range(1, len(text)))
    assert total == pytest.approx(brute, abs=1e-4)


# -- normalisations ---------------------------------------------------------------------------------------------------


def planted(bias):
    """A model that ignores its input: softmax(bias) at every position."""
    config = tiny(vocab_size=257, max_positions=64, tie_embeddings=False, vocab_multiple=257)
    params = jax.tree.map(jnp.zeros_like, params_of(config))
    # final norm of a zero stream is its bias: one unit times the head's column
    params["final_norm"]["bias"] = params["final_norm"]["bias"].at[0].set(1.0)
    params["head"] = params["head"].at[:, 0].set(jnp.asarray(bias))
    return Scorer(Transformer(config), params, ByteTokenizer(["eot"]))


def choice(scores, how, unconditional=None):
    unconditional = unconditional or [None] * len(scores)
    return [normalise(s, how, u) for s, u in zip(scores, unconditional, strict=True)]


def test_under_a_uniform_model_the_token_score_is_the_same_and_the_sum_prefers_the_short():
    scorer = planted(np.zeros(257))
    options = [" a", " quite long option", " middling"]
    scores = scorer.score([("Question?", option) for option in options])
    np.testing.assert_allclose(choice(scores, "token"), -np.log(257), rtol=1e-5)
    # The space before an option is scored, but no part of its length: as in lm-evaluation-harness.
    expected = [-np.log(257) * len(o) / len(o.lstrip()) for o in options]
    np.testing.assert_allclose(choice(scores, "byte"), expected, rtol=1e-5)
    sums = choice(scores, "sum")
    np.testing.assert_allclose(sums, [-len(o) * np.log(257) for o in options], rtol=1e-5)
    assert int(np.argmax(sums)) == 0
    empty = scorer.score([("Answer:", option) for option in options])
    np.testing.assert_allclose(choice(scores, "unconditional", empty), 0.0, atol=1e-4)


def test_the_unconditional_ratio_cancels_an_options_prior():
    bias = np.zeros(257)
    bias[ord("z")] = 3.0  # a letter that the model likes everywhere
    scorer = planted(bias)
    p = np.exp(bias) / np.exp(bias).sum()
    scores = scorer.score([("Q:", "zz"), ("Q:", "ab")])
    assert scores[0].total == pytest.approx(2 * np.log(p[ord("z")]), abs=1e-4)
    assert scores[1].total == pytest.approx(2 * np.log(p[ord("a")]), abs=1e-4)
    assert scores[0].greedy and not scores[1].greedy
    empty = scorer.score([("A:", "zz"), ("A:", "ab")])
    np.testing.assert_allclose(choice(scores, "unconditional", empty), 0.0, atol=1e-4)


def test_bytes_and_tokens_differ_where_characters_are_long():
    score = Score(np.asarray([-1.0, -2.0, -3.0]), False, bytes=12)
    assert normalise(score, "sum") == -6 and normalise(score, "token") == -2 and normalise(score, "byte") == -0.5
    with pytest.raises(UserError, match="normalise is 'mean'"):
        normalise(score, "mean")


def test_whole_texts_and_empty_ones():
    bias = np.zeros(257)
    bias[ord("a")] = 2.0
    p = np.exp(bias) / np.exp(bias).sum()
    long, none, one = planted(bias).rolling(["ab" * 70, "", "é"])
    assert long.tokens == 140 and long.bytes == 140
    assert long.total == pytest.approx(70 * (np.log(p[ord("a")]) + np.log(p[ord("b")])), rel=1e-5)
    assert none.tokens == 0 and none.total == 0
    assert one.tokens == 2 and one.bytes == 2
    scores = planted(bias).score([("a", "aa"), ("a", " aa"), ("a", "  aa"), ("a", "\naa")])
    assert [score.bytes for score in scores] == [2, 2, 3, 3]  # the space that delimits does not count, others do
