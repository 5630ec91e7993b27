"""Denoising: rows put together again, counted and tested for uniformity; the loss against the NumPy model."""

import dataclasses
import functools
import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import VOCAB, params_of, relative, tiny
from scipy import stats

from gpt_jax.data.rows import ChangedRows
from gpt_jax.data.store import Split
from gpt_jax.errors import UserError
from gpt_jax.objectives import Setting, build_objective
from gpt_jax.objectives.base import Host
from gpt_jax.objectives.denoising import (
    MODES,
    RECIPES,
    Denoising,
    composition,
    draw_spans,
    noise_counts,
    reassemble,
    special_names,
)
from gpt_jax.optim import make_optimizer
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step
from gpt_jax.testing import check_objective

EACH = sorted(set(itertools.chain(*RECIPES.values())))
TEXT = 1000  # ordinary tokens; specials after them
SPECIALS = {name: TEXT + i for i, name in enumerate(special_names(200, modes=True))}


def rows_of(context_length, specials=SPECIALS, **options):
    return Denoising.rows(options, Host(specials, context_length))


def draw(rows, seed=0, vocab=TEXT):
    """A text without specials, and its row."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, vocab, rows.raw_length).astype(np.int32)
    return text, rows.make(text, rng)


def apart(row, specials=SPECIALS):
    """(mode tokens, inputs, outputs) of a row without sep and eot, from its arrays alone."""
    size = int(row["segment_ids"].sum())
    cut = int(row["prefix"].sum())
    both = np.append(row["tokens"][:size], row["targets"][size - 1])
    inputs, outputs = both[:cut], both[cut:]
    head = inputs[:1] if inputs[0] in [specials.get(f"mode_{m}") for m in MODES] else inputs[:0]
    inputs = inputs[len(head) :]
    if inputs[-1] == specials["sep"]:
        assert outputs[-1] == specials["eot"]
        inputs, outputs = inputs[:-1], outputs[:-1]
    return head, inputs, outputs


def sentinels_of(specials=SPECIALS):
    return [i for name, i in specials.items() if name.startswith("sentinel")]


def restored(row, specials=SPECIALS):
    """The text of a row."""
    _, inputs, outputs = apart(row, specials)
    if row["mode"][0] == MODES.index("s"):
        return np.concatenate([inputs, outputs])
    return reassemble(inputs, outputs, sentinels_of(specials))


# --- the text survives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("denoiser", EACH)
@pytest.mark.parametrize("sentinels", [64, 3, 1])
def test_what_was_corrupted_can_be_put_together_again(denoiser, sentinels):
    for context_length in (16, 61, 256):
        rows = rows_of(context_length, denoisers=(denoiser,), sentinels=sentinels, mode_tokens="always")
        for seed in range(20):
            text, row = draw(rows, seed)
            np.testing.assert_array_equal(restored(row), text)
            assert apart(row)[0].tolist() == [SPECIALS[f"mode_{denoiser[0]}"]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_keeps_the_text_and_the_arrays_agree(recipe):
    rows = rows_of(128, recipe=recipe)
    for seed in range(60):
        text, row = draw(rows, seed)
        np.testing.assert_array_equal(restored(row), text)
        assert {name: (a.shape, a.dtype) for name, a in row.items()} == {
            name: ((128,), np.dtype(kind)) for name, kind in rows.arrays.items()
        }
        size, cut = int(row["segment_ids"].sum()), int(row["prefix"].sum())
        at = np.arange(128)
        np.testing.assert_array_equal(row["tokens"][1:size], row["targets"][: size - 1])
        np.testing.assert_array_equal(row["target_weights"], (at >= cut - 1) & (at < size))
        np.testing.assert_array_equal(row["prefix"], at < cut)
        np.testing.assert_array_equal(row["segment_ids"], at < size)
        np.testing.assert_array_equal(row["positions"], np.where(at < size, at, 0))
        assert len(apart(row)[0]) == (recipe == "ul2")


def test_spans_are_marked_by_their_sentinels_in_order():
    _, row = draw(rows_of(64, recipe="t5"))
    _, inputs, outputs = apart(row)
    marks = [[SPECIALS[f"sentinel_{k}"] for k in range(3)]]
    for part in (inputs, outputs):
        assert [t for t in part if t >= TEXT] == marks[0]
    assert outputs[0] == marks[0][0] and outputs[-1] < TEXT
    one = draw(rows_of(64, recipe="t5", sentinels=1))[1]
    assert [t for t in apart(one)[1] if t >= TEXT] == [SPECIALS["sentinel_0"]] * 3


def test_parts_that_do_not_fit_are_not_put_together():
    for inputs, outputs in (([1, 9, 2], [9, 3, 9, 4]), ([1, 9, 2], [3, 9]), ([1], [3]), ([9], [])):
        with pytest.raises(ValueError, match="do not fit"):
            reassemble(np.array(inputs), np.array(outputs, int), [9])


# --- how much ---------------------------------------------------------------------------------------------------------


def test_the_counts_are_those_of_t5():
    """T5 gives 568 tokens to inputs of 512: 483 kept, 28 sentinels, an end; targets of 85, 28 and an end, 114."""
    assert noise_counts(568, 3.0, 0.15) == (85, 28)
    rows = rows_of(512 + 114 - 1, recipe="t5")  # the last token is a target only
    assert rows.raw_length == 568
    _, row = draw(rows)
    assert row["prefix"].sum() == 512 and row["target_weights"].sum() == 114 and row["segment_ids"].all()


@pytest.mark.parametrize("denoiser", EACH)
def test_one_denoiser_fills_its_rows_with_the_longest_text_that_fits(denoiser):
    _, mean, rate = denoiser
    for context_length in (16, 17, 18, 19, 20, 63, 64, 100, 255, 256, 512):
        rows = rows_of(context_length, denoisers=(denoiser,))
        _, row = draw(rows, context_length)
        assert row["segment_ids"].all()
        n = rows.raw_length
        if denoiser[0] == "s":
            assert n == context_length + 1
            continue
        # T5's counts: one more token than this text has would not fit.
        noise = max(1, round((n + 1) * rate))
        assert n + 1 + 2 * max(1, round(noise / mean)) + 2 > context_length + 1


@pytest.mark.parametrize("denoiser", [d for d in EACH if d[0] != "s"])
def test_rate_and_mean_span_are_as_set(denoiser):
    _, mean, rate = denoiser
    rows = rows_of(1024, denoisers=(denoiser,))
    noise, lengths = [], []
    for seed in range(20):
        _, inputs, outputs = apart(draw(rows, seed)[1])
        marks = np.flatnonzero(np.isin(outputs, sentinels_of()))
        lengths.append(np.diff(np.append(marks, len(outputs))) - 1)
        noise.append(lengths[-1].sum())
        assert len(inputs) - len(marks) + noise[-1] == rows.raw_length
    assert np.abs(np.array(noise) / rows.raw_length - rate).max() * rows.raw_length <= 0.5 + 1e-9
    # A whole number of spans: the mean is off by at most half a span, or by one that had no room.
    spans = len(lengths[0])
    assert noise[0] / (spans + 1) < mean < noise[0] / max(spans - 0.5, 0.5)


def test_ul2_shares_the_shortest_text_and_pads_the_other_rows():
    rows = rows_of(256, recipe="ul2")
    alone = [rows_of(256, denoisers=(d,), mode_tokens="always").raw_length for d in RECIPES["ul2"]]
    assert rows.raw_length == min(alone) < max(alone)
    drawn = [draw(rows, seed)[1] for seed in range(200)]
    sizes = np.array([row["segment_ids"].sum() for row in drawn])
    assert sizes.max() == 256 and sizes.min() < 256
    for row, size in zip(drawn, sizes, strict=True):
        assert (row["target_weights"][size:] == 0).all() and (row["tokens"][size:] == 0).all()


# --- uniform, by chi-square -------------------------------------------------------------------------------------------


def chi_square(counts, expected):
    """p-value of counts against expected ones."""
    return stats.chisquare(counts, expected).pvalue


def test_compositions_are_uniform():
    rng = np.random.default_rng(0)
    counts = Counter(tuple(composition(rng, 6, 3).tolist()) for _ in range(5000))
    assert set(counts) == {c for c in itertools.product(range(1, 7), repeat=3) if sum(c) == 6}
    assert chi_square(list(counts.values()), [5000 / 10] * 10) > 1e-4


def test_spans_are_uniform_over_all_ways_to_place_them():
    """Every mask of 7 tokens with 3 of them in 2 runs that do not touch: among them both ends and neither."""

    def runs(mask):
        return sum(1 for value, _ in itertools.groupby(mask) if value)

    possible = {m for m in itertools.product((0, 1), repeat=7) if sum(m) == 3 and runs(m) == 2}
    rng, counts = np.random.default_rng(1), Counter()
    for _ in range(6000):
        mask = np.zeros(7, int)
        for start, size in zip(*draw_spans(rng, 7, 3, 2), strict=True):
            mask[start : start + size] += 1
        counts[tuple(mask.tolist())] += 1
    assert set(counts) == possible and len(possible) == 20
    assert chi_square(list(counts.values()), [300] * 20) > 1e-4


@pytest.mark.parametrize(("rate", "longest"), [(0.25, 11), (0.5, 24)])
def test_the_end_that_s_cuts_off_is_uniform_with_the_mean_of_its_rate(rate, longest):
    """Of 25 tokens: 1 to 11 at rate .25 (12.5 rounds to 12), every cut there is at .5."""
    rows = rows_of(24, denoisers=(("s", 0, rate),))
    sizes = Counter(int(draw(rows, seed)[1]["target_weights"].sum()) for seed in range(3000))
    assert set(sizes) == set(range(1, longest + 1))
    assert chi_square(list(sizes.values()), [3000 / longest] * longest) > 1e-4


@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1, 1, 1), (4, 1, 2, 1, 1, 3, 2)])
def test_denoisers_are_drawn_by_weight(weights):
    mixture = [(*d, w) for d, w in zip(RECIPES["ul2"], weights, strict=True)]
    rows = rows_of(512, denoisers=tuple(mixture))
    noise_of = {}
    for i, (mode, mean, rate) in enumerate(RECIPES["ul2"]):
        if mode != "s":
            noise, spans = noise_counts(rows.raw_length, mean, rate)
            noise_of[MODES.index(mode), noise + spans + 1] = i
    assert len(noise_of) == 6  # the number of targets tells the denoiser
    counts = np.zeros(7)
    text = np.arange(rows.raw_length, dtype=np.int32)
    for seed in range(2800):
        row = rows.make(text, np.random.default_rng(seed))
        mode = int(row["mode"][0])
        counts[2 if mode == 1 else noise_of[mode, int(row["target_weights"].sum())]] += 1
    assert chi_square(counts, 2800 * np.array(weights) / sum(weights)) > 1e-4


def test_a_row_is_a_function_of_seed_epoch_and_number_and_an_epoch_holds_all_the_text():
    tokens = np.random.default_rng(0).integers(0, TEXT, 500).astype("<u2")
    split = Split(tokens, np.zeros(1, "<u8"), 0, None)
    rows = rows_of(32, recipe="ul2")
    maker = ChangedRows(split, 32, rows, seed=3)
    n = maker.rows_per_epoch
    assert n == math.ceil(500 / rows.raw_length)
    whole = maker.build(np.zeros(n, int), np.arange(n))
    for i in (n - 1, 0, 3):  # alone, in another order, from a maker of its own
        alone = ChangedRows(split, 32, rows, seed=3).build(np.zeros(1, int), np.array([i]))
        for name in whole:
            np.testing.assert_array_equal(alone[name][0], whole[name][i])
    stream = np.concatenate([restored({name: a[i] for name, a in whole.items()}) for i in range(n)])[:500]
    start = maker._stream.offset(0)
    np.testing.assert_array_equal(np.roll(stream, start), tokens)
    for other in (
        maker.build(np.ones(n, int), np.arange(n)),
        ChangedRows(split, 32, rows, 4).build(np.zeros(n, int), np.arange(n)),
    ):
        assert (other["target_weights"] != whole["target_weights"]).any()


# --- the objective ----------------------------------------------------------------------------------------------------

SMALL = {name: VOCAB - 12 + i for i, name in enumerate(special_names(7, modes=True))}
CONFIG = tiny(num_layers=1, max_positions=24, tie_embeddings=False)


@functools.cache
def small_batch(recipe="ul2", rows=8, length=24, seed=1):
    """Rows of random text over 25 ordinary tokens and 12 specials."""
    maker = rows_of(length, SMALL, recipe=recipe, sentinels=7)
    drawn = [draw(maker, seed * rows + i, VOCAB - 12)[1] for i in range(rows)]
    return {name: np.stack([row[name] for row in drawn]) for name in drawn[0]}


@functools.cache
def objective(recipe="ul2", config=CONFIG, **options):
    return build_objective({"name": "denoising", "recipe": recipe, **options}, Setting(config))


@pytest.mark.parametrize("mask", ["prefix", "causal"])
def test_the_loss_is_the_mean_nll_of_the_targets_under_the_numpy_model(mask):
    batch, params = small_batch(), params_of(CONFIG)
    prefix = {"prefix": batch["prefix"].sum(1)} if mask == "prefix" else {}
    logits = oracle.forward(params, CONFIG, batch["tokens"], segments=batch["segment_ids"], kind=mask, **prefix)
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    weights = batch["target_weights"]
    made = objective(mask=mask)
    run = jax.jit(lambda p, b: made.loss({"model": p}, made.prepare(b, None, 0), None, False))
    sums, metrics = jax.device_get(run(params, batch))
    assert float(sums["denoising"]) == pytest.approx(np.nansum(weights * nll), rel=1e-5)
    assert set(sums) == {"denoising"}
    assert set(metrics) == {"denoising_nll", *(f"denoising_nll_{m}" for m in MODES)}  # no "nll": no bits per byte
    for name, here in [
        ("denoising_nll", 1.0),
        *((f"denoising_nll_{m}", batch["mode"] == i) for i, m in enumerate(MODES)),
    ]:
        total, count = metrics[name]
        assert float(count) == (weights * here).sum() > 0
        assert float(total) == pytest.approx(np.nansum(weights * here * nll), rel=1e-5)


def influence(mask, config=CONFIG):
    """[T, T]: how far the loss of target t depends on input token s, one row of different tokens, padded at its end."""
    length, cut, size = 12, 6, 10
    at = np.arange(length)
    batch = {
        "tokens": at[None].astype(np.int32),
        "targets": ((at * 5 + 3) % VOCAB)[None].astype(np.int32),
        "target_weights": np.ones((1, length), np.float32),
        "segment_ids": (at < size)[None].astype(np.int32),
        "positions": np.where(at < size, at, 0)[None].astype(np.int32),
        "prefix": (at < cut)[None],
        "mode": np.zeros((1, length), np.int32),
    }
    made = objective("t5", config, mask=mask)
    params = params_of(config)

    def losses(embedding):
        def one(weights):
            model = {**params, "embedding": embedding}
            return made.loss({"model": model}, batch | {"weights": {"denoising": weights}}, None, False)[0]["denoising"]

        return jax.vmap(one)(jnp.eye(length)[:, None])

    jacobian = jax.jit(jax.jacrev(losses))(jnp.asarray(params["embedding"]))
    return np.abs(np.asarray(jacobian)).sum(-1)[:size, :length], cut, size


def test_inputs_see_each_other_and_no_target_sees_a_later_one():
    depends, cut, size = influence("prefix")
    t, s = np.indices(depends.shape)
    seen = ((s <= t) | (s < cut)) & (s < size)
    assert (depends[~seen] == 0).all()
    assert (depends[seen] > 0).all()  # also an early input on a late one
    assert seen[0, cut - 1] and not seen[cut - 1, cut] and not seen[cut, cut + 1]


def test_under_causal_attention_nothing_sees_what_comes_after_it():
    depends, _, size = influence("causal")
    t, s = np.indices(depends.shape)
    assert (depends[s > t] == 0).all() and (depends[(s <= t) & (s < size)] > 0).all()


@pytest.mark.parametrize("mask", ["prefix", pytest.param("causal", marks=pytest.mark.slow)])
def test_it_keeps_the_contract(mask):
    check_objective(objective(mask=mask), dict(small_batch()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_of_the_targets_alone_give_the_loss_and_gradient_of_all(recipe):
    batch, params = small_batch(recipe), params_of(CONFIG)
    every = objective(recipe)
    few = build_objective({"name": "denoising", "recipe": recipe}, Setting(CONFIG, SMALL, context_length=24))
    assert every.most_targets == 0 and batch["target_weights"].sum(1).max() <= few.most_targets <= 24
    assert few.most_targets < 24 or recipe == "prefix_lm"

    def run(made):
        def loss(params):
            return made.loss({"model": params}, made.prepare(batch, None, 0), None, False)[0]["denoising"]

        return jax.jit(jax.value_and_grad(loss))(params)

    (a, grads_a), (b, grads_b) = run(every), run(few)
    assert float(a) == pytest.approx(float(b), rel=1e-6) and float(a) > 0
    assert relative(grads_b, grads_a) < 1e-5


GOLDEN = {
    "denoising_nll": 3.6146955,
    "denoising_nll_r": 3.6022096,
    "denoising_nll_s": 3.6344347,
    "denoising_nll_x": 3.6150832,
    "loss/denoising": 3.6146955,
    "loss": 3.6146955,
    "grad_norm": 1.4966452,
}


def test_golden_numbers_of_one_update():
    made = objective(config=dataclasses.replace(CONFIG, dropout=0.1))
    mesh = make_mesh(devices=jax.devices()[:1])
    step = build_train_step(made, make_optimizer("adamw", 1e-2), made.batch_spec(8, 24), mesh=mesh)
    _, metrics = step(step.init(0), step.put(small_batch()))
    got = {
        name: float(value) for name, value in metrics.items() if "denoising" in name or name in ("loss", "grad_norm")
    }
    assert got == pytest.approx(GOLDEN, rel=1e-5)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(recipe="t6"), r"objective\.recipe is 't6'"),
        (dict(mask="prefx"), r"did you mean 'prefix'"),
        (dict(mode_tokens="yes"), r"objective\.mode_tokens is 'yes'"),
        (dict(sentinels=0), r"objective\.sentinels is 0"),
        (dict(label_smoothing=1.0), r"objective\.label_smoothing is 1\.0"),
        (dict(denoisers=(("q", 3, 0.15),)), r"the mode of a denoiser is 'q'"),
        (dict(denoisers=(("r", 0.5, 0.15),)), r"objective\.denoisers has \('r', 0\.5, 0\.15"),
        (dict(denoisers=(("x", 3, 1.0),)), r"objective\.denoisers has \('x', 3, 1\.0"),
        (dict(denoisers=(("x", 3, 0.5, 0.0),)), r"objective\.denoisers has"),
        (dict(denoisers=(("s", 0, 0.75),)), r"an s with rate 0\.75"),
        (dict(denoisers=(("r", 3),)), r"objective\.denoisers has \('r', 3\)"),
        (dict(denoiser=1), r"unknown config key 'objective\.denoiser' \(did you mean 'denoisers'\?\)"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        build_objective({"name": "denoising", **options}, Setting(CONFIG))
    assert "\n" not in str(error.value)


def test_a_row_too_short_or_a_tokenizer_without_the_specials_is_refused():
    with pytest.raises(UserError, match="too short to denoise"):
        rows_of(4, recipe="t5")
    with pytest.raises(UserError, match="no special token 'sentinel_0'"):
        rows_of(64, {"eot": 0, "sep": 1}, recipe="t5")
    # A prefix LM needs none.
    assert rows_of(64, {}, recipe="prefix_lm").raw_length == 65


def test_only_the_sentinels_that_rows_can_have_are_asked_for():
    rows_of(64, dict.fromkeys(special_names(3), 0), recipe="t5")
    with pytest.raises(UserError, match="no special token 'sentinel_2'"):
        rows_of(64, dict.fromkeys(special_names(2), 0), recipe="t5")
    rows_of(64, dict.fromkeys(special_names(2), 0), recipe="t5", sentinels=2)
