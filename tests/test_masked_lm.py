"""Masked language modelling: maskers against counts, distributions and a sequential oracle; the loss against NumPy."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import params_of, text_batch, tiny
from scipy.stats import chi2, chisquare

from gpt_jax.cli import main
from gpt_jax.edit_distance import levenshtein
from gpt_jax.errors import UserError
from gpt_jax.eval_step import build_eval_step
from gpt_jax.model import Transformer
from gpt_jax.objectives import masking
from gpt_jax.objectives.base import Setting, build_objective
from gpt_jax.objectives.masked_lm import MaskedLM, edit_distances
from gpt_jax.optim import make_optimizer
from gpt_jax.sharding import make_mesh, unbox
from gpt_jax.step import build_train_step, gradients, row_keys
from gpt_jax.testing import check_objective

VOCAB, MASK, EOT = 37, 36, 3
MODEL = Transformer(tiny(num_layers=1))
PARAMS = {"model": params_of(MODEL.config)}


def masked_lm(model=MODEL, **options):
    return MaskedLM(model, mask_token=MASK, specials=(EOT,), **options)


@functools.cache
def compiled_prepare(objective):
    return jax.jit(lambda batch, keys: objective.prepare(batch, keys, jnp.int32(0)))


def prepare(batch, seed=0, **options):
    """The prepared batch in NumPy, with `counts`: how often each token is selected and predicted, [B, T]."""
    objective = masked_lm(**options)
    out = jax.device_get(
        compiled_prepare(_Hashed(objective))(batch, row_keys(seed, 0, jnp.arange(len(batch["tokens"]))))
    )
    counts = np.zeros(batch["tokens"].shape)
    for row, (slots, weights) in enumerate(zip(out["slots"], out["weights"]["mlm"], strict=True)):
        assert len(set(slots)) == len(slots)
        counts[row, slots] = weights
    return out | {"counts": counts}


class _Hashed:
    """An objective as a key of a cache: its options are a dict and have no hash."""

    def __init__(self, objective):
        self.objective, self.prepare = objective, objective.prepare

    def __hash__(self):
        return hash(repr(self.objective))

    def __eq__(self, other):
        return repr(self.objective) == repr(other.objective)


def ragged(rows, length, seed=0, vocab=VOCAB - 1):
    """Rows of 0, 1, ..., `length` tokens (then again) and padding after them; some tokens are EOT."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    lengths = np.arange(rows) % (length + 1)
    real = np.arange(length) < lengths[:, None]
    batch = {
        "tokens": np.where(real, tokens, 0),
        "targets": np.roll(tokens, -1, 1),
        "segment_ids": real.astype(np.int32),
    }
    return batch | {"target_weights": real.astype(np.float32)}, lengths


def long_batch(rows=1024, length=1024, vocab=VOCAB - 1):
    tokens = np.random.default_rng(1).integers(0, vocab, (rows, length)).astype(np.int32)
    return {"tokens": tokens, "targets": tokens, "target_weights": np.ones((rows, length), np.float32)}


# --- which tokens are selected ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["tokens", "spans", "replacement"])
@pytest.mark.parametrize(("rate", "most"), [(0.15, 0), (0.5, 7)])
def test_a_row_has_exactly_the_number_of_selected_tokens_that_its_length_gives(select, rate, most):
    batch, lengths = ragged(rows=82, length=40)
    out = prepare(batch, select=select, rate=rate, max_predictions=most)
    possible = ((batch["tokens"] != EOT) & (batch["segment_ids"] > 0)).sum(1)
    for row, length in enumerate(lengths):
        wanted = min(most or 10**9, max(1, round(rate * int(length))), int(length))
        if select == "replacement":
            assert out["counts"][row].sum() == (wanted if possible[row] else 0)
        else:
            assert out["counts"][row].sum() == min(wanted, possible[row])
            assert set(out["counts"][row]) <= {0, 1}


def test_each_token_is_as_likely_to_be_selected_as_another():
    for select in ("tokens", "replacement", "iid"):
        out = prepare(long_batch(4096, 20), select=select)
        counts = out["counts"].sum(0)
        ordinary = (long_batch(4096, 20)["tokens"] != EOT).sum(0)
        expected = ordinary * (0.15 if select == "iid" else counts.sum() / ordinary.sum())
        assert np.abs((counts - expected) / np.sqrt(expected)).max() < 4.5
    assert counts.sum() == pytest.approx(0.15 * ordinary.sum(), abs=4 * math.sqrt(0.1275 * ordinary.sum()))


def test_neither_specials_nor_padding_are_selected_and_nothing_unselected_changes():
    batch, _ = ragged(rows=82, length=40)
    ordinary = (batch["tokens"] != EOT) & (batch["segment_ids"] > 0)
    for options in (
        dict(rate=1.0, shares=(0.4, 0.4, 0.2)),
        dict(select="spans"),
        dict(select="spans", span=3),
        dict(select="replacement"),
        dict(select="iid", rate=0.6),
        dict(corruption="fair", rate=0.5),
        dict(corruption="literal"),
    ):
        out = prepare(batch, **options, loss_on="selected")
        selected = out["counts"] > 0
        assert not selected[~ordinary].any()
        np.testing.assert_array_equal(out["inputs"][~selected], batch["tokens"][~selected])
        assert (out["inputs"] != batch["tokens"]).any()
        assert not (out["inputs"][selected] == EOT).any()  # nor is a special token drawn
        if options.get("rate") == 1.0 or options.get("corruption") == "literal":
            np.testing.assert_array_equal(selected, ordinary)
        np.testing.assert_array_equal(out["labels"], np.take_along_axis(batch["tokens"], out["slots"], 1))


def test_selected_tokens_are_replaced_in_the_proportions_80_10_10():
    batch = long_batch()
    out = prepare(batch)
    selected = out["counts"] > 0
    n = selected.sum()
    assert n == 1024 * round(0.15 * 1024)
    before, after = batch["tokens"][selected], out["inputs"][selected]
    ordinary = VOCAB - 2
    for share, expected in (
        ((after == MASK).mean(), 0.8),
        ((after == before).mean(), 0.1 + 0.1 / ordinary),  # a random token may be the true one
        (((after != MASK) & (after != before)).mean(), 0.1 * (1 - 1 / ordinary)),
    ):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    drawn = after[(after != MASK) & (after != before)]
    assert chisquare(np.bincount(drawn, minlength=VOCAB)[np.delete(np.arange(VOCAB), [MASK, EOT])]).pvalue > 1e-4


def test_electras_masker_replaces_85_percent_and_keeps_the_rest():
    batch = long_batch(512)
    out = prepare(batch, select="replacement", shares=(0.85, 0.0, 0.15))
    selected = out["counts"] > 0
    share = (out["inputs"] == MASK)[selected].mean()
    assert abs(share - 0.85) < 4 * math.sqrt(0.85 * 0.15 / selected.sum())
    np.testing.assert_array_equal((out["inputs"] != batch["tokens"]), out["inputs"] == MASK)
    # 154 draws of 1024 with replacement: 1024 (1 - (1 - 1/1024)^154) different ones. (EOT, 1 in 36, is left out.)
    different = [1 - (1 - 1 / e) ** 154 for e in (batch["tokens"] != EOT).sum(1)]
    expected = sum(d * e for d, e in zip(different, (batch["tokens"] != EOT).sum(1), strict=True))
    assert selected.sum() == pytest.approx(expected, rel=0.005)


# --- spans ------------------------------------------------------------------------------------------------------------


def test_lengths_of_spans_are_geometric_up_to_ten():
    lengths = np.asarray(masking.span_lengths(row_keys(0, 0, jnp.arange(200)), 1000)).ravel()
    p = 0.2 * 0.8 ** np.arange(10)
    assert chisquare(np.bincount(lengths, minlength=11)[1:], len(lengths) * p / p.sum()).pvalue > 1e-4
    assert np.arange(1, 11) @ (p / p.sum()) == pytest.approx(3.8, abs=0.01)  # SpanBERT's figure


def test_spans_are_those_of_the_loop_that_adds_them_one_by_one():
    select = jax.jit(lambda priority, *others: masking.first(masking.span_priority(priority, *others[:2]), others[2]))
    rng = np.random.default_rng(0)
    for _ in range(200):
        T, count = 30, int(rng.integers(1, 20))
        order, lengths = rng.permutation(T) / T, rng.integers(1, 11, T)
        eligible = rng.random(T) < 0.9
        stretch = np.cumsum((rng.random(T) < 0.15) | ~eligible)
        priority = np.where(eligible, order, 2.0)
        chosen = []
        for start in np.argsort(order):  # the loop: whole spans in random order, cut where the budget or a stretch ends
            for t in range(start, min(T, start + lengths[start])):
                if eligible[start] and stretch[t] == stretch[start] and t not in chosen:
                    chosen.append(t)
        chosen = chosen[:count]
        got = np.flatnonzero(select(priority[None], lengths[None], stretch[None], np.array([len(chosen)]))[0])
        np.testing.assert_array_equal(got, sorted(chosen))


@pytest.mark.parametrize("span", [1, 3, 12])
def test_spans_of_a_chosen_length_are_whole_but_for_the_last_one(span):
    batch = {k: np.full_like(v, 5) if k in ("tokens", "targets") else v for k, v in long_batch(64, 128).items()}
    hidden = prepare(batch, select="spans", span=span, rate=0.2)["counts"] > 0
    assert (hidden.sum(axis=1) == 26).all()  # round(0.2 * 128)
    for row in hidden:  # spans that touch or overlap make a longer run, a row's end a shorter one
        edges = np.flatnonzero(np.diff(np.r_[0, row.astype(int), 0]))
        runs, at_the_end = edges[1::2] - edges[::2], edges[1::2][-1] == len(row)
        assert (runs < span).sum() <= 1 + at_the_end, runs
    if span == 1:
        twin = prepare(batch, select="tokens", rate=0.2)["counts"] > 0
        np.testing.assert_array_equal(hidden, twin)


def test_spans_end_with_their_document_and_before_a_special_token():
    batch = long_batch(256, 64)
    segments = 1 + np.arange(64)[None, :] // np.array([5, 9, 16, 40] * 64)[:, None]
    batch |= {"segment_ids": segments.astype(np.int32)}
    spans, tokens = (prepare(batch, select=select)["counts"] > 0 for select in ("spans", "tokens"))

    def runs(selected):
        joined = selected[:, 1:] & selected[:, :-1]
        return selected.sum() / (selected.sum() - joined.sum())

    # A span that began in one document would run on into the next as often as into the next token.
    ordinary = batch["tokens"] != EOT
    inner = ordinary[:, 1:] & ordinary[:, :-1] & (segments[:, 1:] == segments[:, :-1])
    border = ordinary[:, 1:] & ordinary[:, :-1] & ~inner
    both = spans[:, 1:] & spans[:, :-1]
    assert both[inner].mean() > 0.09
    assert both[border].mean() < 0.04  # as two unrelated tokens: 0.15^2
    assert runs(spans) > 2.5 > 1.3 > runs(tokens)


# --- the article's variants -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [1, 3])
def test_the_fair_variant_masks_some_and_replaces_the_rest_by_other_tokens(masks):
    batch = long_batch(2048, 64)
    out = prepare(batch, corruption="fair", masks=masks, loss_on="selected")
    selected = out["counts"] > 0
    masked = out["inputs"] == MASK
    assert (selected.sum(1) == 10).all() and (masked.sum(1) == masks).all() and not (masked & ~selected).any()
    rest = selected & ~masked
    before, after = batch["tokens"][rest], out["inputs"][rest]
    assert (before != after).all()
    places = np.delete(np.arange(VOCAB), [MASK, EOT])
    table = np.histogram2d(before, after, bins=np.arange(VOCAB + 1))[0][np.ix_(places, places)]
    expected = table.sum(1, keepdims=True) / (len(places) - 1)
    statistic = np.sum(((table - expected) ** 2 / expected)[~np.eye(len(places), dtype=bool)])
    assert chi2.sf(statistic, len(places) * (len(places) - 2)) > 1e-4


def test_the_literal_variant_leaves_no_information_in_the_input():
    batch = long_batch(2048, 64)
    out = prepare(batch, corruption="literal")
    ordinary, masked = batch["tokens"] != EOT, out["inputs"] == MASK
    assert (masked.sum(1) == 1).all()
    np.testing.assert_array_equal(out["counts"], ordinary & ~masked)  # the loss is on what is not [MASK]
    places = np.delete(np.arange(VOCAB), [MASK, EOT])
    rest = ordinary & ~masked
    table = np.histogram2d(batch["tokens"][rest], out["inputs"][rest], bins=np.arange(VOCAB + 1))[0]
    table = table[np.ix_(places, places)]  # true tokens x tokens in their place: independent
    expected = np.full_like(table, table.sum() / table.size)
    assert chi2.sf(np.sum((table - expected) ** 2 / expected), table.size - 1) > 1e-4


def test_the_loss_is_on_the_tokens_that_are_named():
    batch, _ = ragged(rows=41, length=40)
    ordinary = (batch["tokens"] != EOT) & (batch["segment_ids"] > 0)
    for corruption in ("bert", "fair"):
        by = {
            where: prepare(batch, corruption=corruption, loss_on=where) for where in ("selected", "non_mask", "all", "")
        }
        selected = by["selected"]["counts"] > 0
        masked = by["selected"]["inputs"] == MASK
        assert masked.any() and (selected & ~masked).any()
        np.testing.assert_array_equal(by["non_mask"]["counts"] > 0, selected & ~masked)
        np.testing.assert_array_equal(by["all"]["counts"] > 0, ordinary)
        default = "selected" if corruption == "bert" else "non_mask"
        np.testing.assert_array_equal(by[""]["counts"], by[default]["counts"])
        np.testing.assert_array_equal(
            np.take_along_axis(selected, by["all"]["slots"], 1), by["all"]["selected"]
        )  # what the metrics are measured on


# --- loss and gradient ------------------------------------------------------------------------------------------------


def run(objective, batch, params=PARAMS, step=3):
    frozen = jax.tree.map(lambda x: None, params)
    fn = jax.jit(lambda p, b: gradients(objective, p, frozen, b, step=jnp.int32(step), seed=0, microbatches=1))
    return jax.device_get(fn(params, batch))


@pytest.mark.parametrize("documents", [False, True])
def test_the_loss_is_the_mean_nll_of_the_selected_tokens_given_both_sides(documents):
    batch = text_batch(documents=documents, vocab=VOCAB - 1)
    keys = row_keys(0, 3, jnp.arange(8))
    objective = masked_lm(rate=0.4)
    loss, metrics, _ = run(objective, batch)
    out = jax.device_get(jax.jit(lambda b: objective.prepare(b, keys, 3))(batch))
    segments = batch["segment_ids"] if documents else (batch["target_weights"] > 0).astype(int)
    logits = oracle.forward(
        PARAMS["model"],
        MODEL.config,
        out["inputs"],
        kind="bidirectional",
        segments=segments,
        positions=batch.get("positions"),
    )
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll, correct, n = 0.0, 0, 0
    for row in range(8):
        for slot, weight in zip(out["slots"][row], out["weights"]["mlm"][row], strict=True):
            if weight:
                true = batch["tokens"][row, slot]
                nll, n = nll - log_p[row, slot, true], n + 1
                correct += log_p[row, slot].argmax() == true
    assert n == sum(max(1, round(0.4 * int(w))) for w in (segments > 0).sum(1)) - _short(batch, segments)
    assert float(loss) == pytest.approx(nll / n, rel=1e-5)
    assert metrics["mlm_nll"] == pytest.approx(nll / n, rel=1e-5) and metrics["accuracy"] == pytest.approx(correct / n)
    assert "nll" not in metrics  # it would be turned into a perplexity of the text


def _short(batch, segments):
    """How many tokens fewer are selected because too few of a row may be."""
    lengths, possible = (segments > 0).sum(1), ((segments > 0) & (batch["tokens"] != EOT)).sum(1)
    return sum(max(0, max(1, round(0.4 * int(n))) - int(p)) for n, p in zip(lengths, possible, strict=True))


def test_labels_of_tokens_that_are_not_selected_have_no_effect():
    batch = text_batch(vocab=VOCAB - 1)
    objective = masked_lm(rate=0.3)
    out = jax.device_get(objective.prepare(batch, row_keys(0, 3, jnp.arange(8)), 3))
    unused = out["weights"]["mlm"] == 0
    assert unused.any()

    @jax.jit
    def value(params, prepared):
        return jax.value_and_grad(lambda p: objective.loss(p, prepared, None, False)[0]["mlm"])(params)

    first = value(PARAMS, out)
    other = out | {"labels": np.where(unused, (out["labels"] + 1) % VOCAB, out["labels"]), "targets": out["tokens"]}
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(value(PARAMS, other)), strict=True):
        np.testing.assert_array_equal(a, b)
    used = out | {"labels": (out["labels"] + 1) % VOCAB}
    assert float(value(PARAMS, used)[0]) != float(first[0])


def test_predictions_depend_on_the_right_but_on_no_other_document_nor_padding():
    batch = text_batch(documents=True, vocab=VOCAB - 1)
    objective = masked_lm(rate=0.3)
    out = jax.device_get(objective.prepare(batch, row_keys(0, 3, jnp.arange(8)), 3))
    predict = jax.jit(lambda prepared: objective.token_logits(PARAMS, prepared))
    before = np.asarray(predict(out))
    for row in (0, 1, 3):
        slot = out["slots"][row, 0]
        here = out["segment_ids"][row] == out["segment_ids"][row, slot]
        right = np.flatnonzero(here)[-1]
        assert right > slot
        for place, depends in ((right, True), (np.flatnonzero(~here)[-1], False)):
            changed = out["inputs"].copy()
            changed[row, place] = (changed[row, place] + 1) % VOCAB
            after = np.asarray(predict(out | {"inputs": changed}))
            assert (after[row, 0] != before[row, 0]).any() == depends


# --- what can be learnt -----------------------------------------------------------------------------------------------

CYCLE = 12  # tokens of a language in which each is followed by the next


def cycles(rows, length, seed):
    tokens = (np.random.default_rng(seed).integers(0, CYCLE, (rows, 1)) + np.arange(length)) % CYCLE
    tokens = tokens.astype(np.int32)
    return {"tokens": tokens, "targets": tokens, "target_weights": np.ones(tokens.shape, np.float32)}


def learn(objective, batches, steps, rate=1e-2):
    """Metrics on a batch that was not trained on, after a learning rate that falls to 0."""
    mesh = make_mesh(devices=jax.devices()[:1])
    spec = objective.batch_spec(32, 24)
    optimizer = make_optimizer("adamw", lambda count: rate * (1 - count / steps), weight_decay=0.0)
    step = build_train_step(objective, optimizer, spec, mesh=mesh)
    state = step.init(0)
    for i in range(steps):
        state, _ = step(state, batches(32, 24, i))
    sums = build_eval_step(step, objective.batch_spec(512, 24))(state.eval_params(), batches(512, 24, 10**6), 0)
    return {name: float(total / weight) for name, (total, weight) in jax.device_get(sums).items()}


def on_cycles(**options):
    config = tiny(vocab_size=CYCLE + 1, num_layers=1, d_model=32, d_ff=64, positions="rope", init_std=0.1)
    return MaskedLM(Transformer(config), mask_token=CYCLE, **options)


def test_a_cyclic_language_is_learnt():
    assert learn(on_cycles(), cycles, 400)["accuracy"] > 0.99


@pytest.mark.slow
def test_the_literal_objective_learns_nothing_beyond_the_frequencies_and_the_fair_one_does():
    literal = learn(on_cycles(corruption="literal"), cycles, 150)
    assert math.log(CYCLE) - 0.02 <= literal["mlm_nll"] < math.log(CYCLE) + 0.1
    fair = learn(on_cycles(corruption="fair"), cycles, 300)
    assert fair["mlm_nll"] < 0.4 and fair["accuracy"] > 0.85


@pytest.mark.slow
def test_whether_the_next_token_is_masked_cannot_be_learnt():
    def noise(rows, length, seed):
        tokens = np.random.default_rng(seed).integers(0, CYCLE, (rows, length)).astype(np.int32)
        return {"tokens": tokens, "targets": tokens, "target_weights": np.ones(tokens.shape, np.float32)}

    options = dict(select="iid", shares=(1.0, 0.0, 0.0), coefs={"mlm": 0.0, "next_masked": 1.0})
    entropy = -0.15 * math.log(0.15) - 0.85 * math.log(0.85)
    assert entropy == pytest.approx(0.4227, abs=1e-4)
    loss = learn(on_cycles(**options), noise, 100, rate=1e-3)["loss/next_masked"]
    # 512 x 23 questions, each -log p with standard deviation 0.62: 0.0057 of their mean.
    assert loss == pytest.approx(entropy, abs=4 * 0.0057)


def test_the_question_of_the_next_mask_is_asked_of_what_stands_before_it():
    objective = masked_lm(coefs={"mlm": 1.0, "next_masked": 0.5}, rate=0.4)
    batch = text_batch(documents=True, vocab=VOCAB - 1)
    out = jax.device_get(objective.prepare(batch, row_keys(0, 3, jnp.arange(8)), 3))
    head = unbox(jax.jit(lambda key: objective.init(key, batch))(jax.random.key(0)))["next_masked"]
    params = PARAMS | {"next_masked": jax.tree.map(lambda x: x + 0.1, head)}
    scores = jax.jit(lambda prepared: objective._next_masked(params, prepared, None))
    before, changed = np.asarray(scores(out)), out["inputs"].copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % VOCAB
    after = np.asarray(scores(out | {"inputs": changed}))
    asked = out["weights"]["next_masked"]
    differ = (before != after) & (asked > 0)
    assert not differ[:, :6].any() and differ[:, 6:].any()
    segments, ordinary = batch["segment_ids"], batch["tokens"] != EOT
    for row in range(8):
        for t in range(12):
            expected = t < 11 and segments[row, t] == segments[row, t + 1] > 0 and ordinary[row, t + 1]
            assert asked[row, t] == expected
    sums, _ = objective.loss(params, out, None, False)
    following = np.roll(out["inputs"] == MASK, -1, axis=1)
    p = 1 / (1 + np.exp(-before.astype(np.float64)))
    expected = -np.sum(asked * np.log(np.where(following, p, 1 - p)))
    assert float(sums["next_masked"]) == pytest.approx(expected, rel=1e-5)


# --- the edit distance as a regulariser -------------------------------------------------------------------------------


def spans_of(slots, used):
    """The places of each run of adjacent slots, as lists of indices into the slots."""
    out = []
    for i in np.flatnonzero(used):
        if out and slots[i] == slots[out[-1][-1]] + 1:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def made_up_spans():
    """Logits, labels, slots and used slots of rows of two spans (4 and 2 tokens), of three single tokens, of none."""
    slots = np.array([[2, 3, 4, 5, 8, 9, 0], [1, 4, 9, 0, 2, 3, 5], [0, 1, 2, 3, 4, 5, 6]], np.int32)
    used = np.arange(7) < np.array([6, 3, 0])[:, None]
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 7, 9)).astype(np.float32), rng.integers(0, 9, (3, 7)).astype(np.int32), slots, used


def test_the_hard_edit_distance_is_that_of_the_likeliest_tokens_span_by_span():
    logits, labels, slots, used = made_up_spans()
    shifted = labels.copy()  # the first span is right but for a shift by one: two edits, not four
    shifted[0, 1:4], labels[0, :4] = [1, 2, 3], [1, 2, 3, 4]
    for likeliest in (logits.argmax(-1), shifted):
        sure = np.where(np.arange(9) == likeliest[..., None], 50.0, 0.0).astype(np.float32)
        soft, hard = (np.asarray(x) for x in edit_distances(sure, labels, slots, used, gamma=0.0))
        expected = [
            sum(levenshtein(likeliest[row, span], labels[row, span]) for span in spans_of(slots[row], used[row]))
            for row in range(3)
        ]
        np.testing.assert_allclose(hard, np.array(expected) / [6, 3, 1], rtol=1e-6)
        np.testing.assert_allclose(soft, hard, atol=1e-5)
    assert hard[0] < (shifted != labels)[0, :6].mean()


def test_the_soft_edit_distance_of_single_tokens_is_the_chance_that_they_are_wrong():
    logits, labels, slots, used = made_up_spans()
    p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    right = np.take_along_axis(p, labels[..., None], -1)[..., 0]
    soft, _ = edit_distances(logits, labels, slots, used, gamma=0.01)
    assert float(soft[1]) == pytest.approx((1 - right[1, :3]).mean(), rel=1e-5)
    assert float(soft[2]) == 0

    def total(logits):
        return jnp.sum(edit_distances(logits, labels, slots, used, gamma=0.1)[0])

    grads = np.asarray(jax.jit(jax.grad(total))(logits))
    assert np.isfinite(grads).all()
    np.testing.assert_array_equal((grads != 0).any(-1), used)


def test_the_regulariser_of_a_config_begins_after_a_tenth_of_the_run():
    setting = Setting(model=MODEL.config, specials={"eot": 3, "mask": 36}, steps=200)
    objective = build_objective({"name": "masked_lm", "select": "spans", "coefs": {"mlm": 1.0, "edit": 0.1}}, setting)
    coef = objective.coefs["edit"]
    assert [round(float(coef(step)), 6) for step in (0, 19, 20, 199)] == [0, 0, 0.1, 0.1]
    frozen = jax.tree.map(lambda x: None, PARAMS)
    at = jax.jit(lambda b, step: gradients(objective, PARAMS, frozen, b, step=step, seed=0, microbatches=1)[:2])
    (early, metrics), (late, later) = (jax.device_get(at(text_batch(vocab=VOCAB - 1), step)) for step in (3, 30))
    assert float(early) == pytest.approx(metrics["loss/mlm"], rel=1e-6)
    assert float(late) == pytest.approx(later["loss/mlm"] + 0.1 * later["loss/edit"], rel=1e-6)
    assert later["loss/edit"] > 0 and later["edit_distance"] > 0


# --- contract, figures, errors ----------------------------------------------------------------------------------------

VARIANTS = {
    "bert": dict(z_loss=1e-3, label_smoothing=0.1),
    "spans_and_all_terms": dict(select="spans", coefs={"mlm": 1.0, "next_masked": 0.5, "edit": 0.1}),
    "electra": dict(select="replacement", shares=(0.85, 0.0, 0.15)),
    "fair": dict(corruption="fair", rate=0.5),
    "all": dict(corruption="fair", loss_on="all"),
    "literal": dict(corruption="literal"),
}


@pytest.mark.parametrize("name", ["bert", *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS if v != "bert")])
def test_every_variant_keeps_the_contract(name):
    objective = masked_lm(Transformer(tiny(num_layers=1, dropout=0.2)), **VARIANTS[name])
    report = check_objective(objective, text_batch(documents=True, uneven=False, vocab=VOCAB - 1))
    assert not report.skipped and not report.without_gradient


@pytest.mark.slow
@pytest.mark.parametrize("config", ["masked_lm", "replaced_token"])
def test_a_run_is_evaluated_alike_twice_has_no_perplexity_and_writes_no_samples(config, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {i}th line of a text, not the {i + 1}th" for i in range(400)))
    tiny_flags = ["--config.model.num_layers=1", "--config.model.d_model=32", "--config.model.num_heads=2"]
    data_flags = [f"--config.data.path={tmp_path}/text.txt", "--config.data.tokenizer.kind=byte"]
    data_flags += [
        "--config.batch_size=8",
        "--config.context_length=32",
        "--config.steps=3",
        "--config.log.tensorboard=False",
    ]
    workdir = str(tmp_path / "run")
    assert main(["train", f"--config={config}", f"--workdir={workdir}", *tiny_flags, *data_flags]) == 0
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["eval", f"--workdir={workdir}"]) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    values = {name: value for name, value in evaluated.items() if name.startswith("valid/")}
    assert {"valid/mlm_nll", "valid/accuracy", "valid/loss"} <= set(values)
    assert {name: trained[name] for name in values} == values
    assert not any(word in name for name in trained for word in ("perplexity", "bits_per_byte"))
    assert not list((tmp_path / "run" / "samples").glob("*"))
    assert main(["sample", f"--workdir={workdir}", "--prompt=the"]) == 1
    assert f"the objective '{config}', which does not teach it" in capsys.readouterr().err


def test_a_config_takes_its_special_tokens_from_the_tokenizer():
    setting = Setting(model=MODEL.config, specials={"eot": 3, "mask": 36})
    objective = build_objective({"name": "masked_lm", "rate": 0.2}, setting)
    assert (objective.mask_token, objective.specials, objective.rate) == (36, (3, 36), 0.2)
    with pytest.raises(UserError, match=r"no special token 'mask'.*data\.tokenizer\.specials"):
        build_objective({"name": "masked_lm"}, Setting(model=MODEL.config, specials={"eot": 3}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(corruption="brt"), r"objective\.corruption is 'brt' \(did you mean 'bert'\?\)"),
        (dict(select="span"), r"objective\.select is 'span' \(did you mean 'spans'\?\)"),
        (dict(loss_on="mask"), r"objective\.loss_on is 'mask'"),
        (dict(rate=0.0), r"objective\.rate is 0\.0"),
        (dict(rate=1.5), r"objective\.rate is 1\.5"),
        (dict(span=3), r"objective\.span is 3 with select='tokens'"),
        (dict(max_predictions=-1), r"objective\.max_predictions is -1"),
        (dict(shares=(0.8, 0.1)), r"objective\.shares is \(0\.8, 0\.1\)"),
        (dict(shares=(0.8, 0.3, -0.1)), r"objective\.shares is \(0\.8, 0\.3, -0\.1\)"),
        (dict(shares=(0.8, 0.1, 0.2)), r"objective\.shares is \(0\.8, 0\.1, 0\.2\)"),
        (dict(masks=0), r"objective\.masks is 0"),
        (dict(corruption="fair", max_predictions=1), r"objective\.masks is 1, but a row has at most 1 selected"),
        (dict(corruption="fair", masks=5, max_predictions=4), r"objective\.masks is 5, but .* max_predictions=4"),
        (dict(loss_on="non_mask", shares=(1.0, 0.0, 0.0)), r"'non_mask' and objective\.shares \(1\.0, 0\.0, 0\.0\)"),
        (dict(edit_gamma=-0.1), r"objective\.edit_gamma is -0\.1"),
        (dict(label_smoothing=1.0), r"objective\.label_smoothing is 1\.0"),
        (dict(mask_token=37), r"special token 37 is not in the model's vocabulary of 37"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        MaskedLM(MODEL, **{"mask_token": MASK} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("select", ["tokens", "spans", "iid"])
def test_rows_too_short_to_learn_from_are_refused(select):
    options = dict(corruption="fair", select=select, rate=0.5, masks=4)
    spec = {"name": "masked_lm", **options}
    setting = Setting(model=MODEL.config, specials={"eot": 3, "mask": 36}, context_length=8 if select != "iid" else 4)
    with pytest.raises(UserError, match=r"masks is 4, but a row has at most 4 selected tokens.*context_length=[48]"):
        build_objective(spec, setting)
    assert build_objective(spec | {"loss_on": "all"}, setting)
    assert build_objective(spec, dataclasses.replace(setting, context_length=10))
    short, long = (prepare(long_batch(8, length), **options)["counts"].sum() for length in (setting.context_length, 10))
    assert short == 0 < long
