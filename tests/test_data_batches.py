"""Batches are closed forms: permutations, epochs, skips, schedules, rows of every layout."""

import itertools

import numpy as np
import pytest

from gpt_jax.data.batches import BatchOrder, TrainSource, ValidText, pick, resolve_batch_schedule
from gpt_jax.data.permutation import permute
from gpt_jax.data.ramp import rows_at, rows_before
from gpt_jax.data.rows import PieceRows, StreamRows, best_fit
from gpt_jax.data.store import Split
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError

EOT = 256


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def documents_of(lengths, seed=0):
    """Random documents of bytes."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


def split_of(documents, eot=EOT):
    """The split that a store of these documents has."""
    first = [] if eot is None else [eot]
    rows = [first + d for d in documents]
    starts = np.cumsum([0, *map(len, rows)])[:-1]
    return Split(np.array(flat(rows), "<u2"), starts.astype("<u8"), sum(map(len, documents)), eot)


DOCUMENTS = documents_of([5, 1, 17, 40, 2, 3, 23, 9])  # 108 tokens with their EOTs


def pairs(rows):
    """What is predicted with weight 1, as a sorted list of (token, target)."""
    keep = rows["target_weights"] == 1
    return sorted(zip(rows["tokens"][keep].tolist(), rows["targets"][keep].tolist(), strict=True))


def stream_pairs(documents):
    """What an epoch must predict: every token from the one before it, and an EOT after every document."""
    stream = flat([EOT, *d] for d in documents)
    return sorted(zip(stream, [*stream[1:], EOT], strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 100, 1023, 4096, 10_007])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_permutation_is_a_permutation(size, seed):
    assert sorted(permute(np.arange(size), size, seed).tolist()) == list(range(size))


def test_permutation_is_uniform_in_each_place_and_differs_by_seed():
    """Chi-square of where an index lands, over seeds: 16 places, 3200 draws; the 99.9% quantile at 15 is 37.7."""
    for index in (0, 7, 15):
        landed = [int(permute(index, 16, seed)) for seed in range(3200)]
        counts = np.bincount(landed, minlength=16)
        assert ((counts - 200) ** 2 / 200).sum() < 37.7


def test_permutation_of_three_is_every_order_equally_often():
    orders = [tuple(permute(np.arange(3), 3, seed).tolist()) for seed in range(3000)]
    counts = np.unique(np.array(orders), axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # 99.9% quantile at 5


def test_permutation_of_a_huge_range_needs_no_memory():
    size = 10**15
    out = permute(np.arange(1000), size, 3)
    assert len(set(out.tolist())) == 1000 and out.max() > size // 2 and out.min() < size // 2


def test_permutation_refuses_an_index_outside():
    with pytest.raises(IndexError):
        permute(np.array([5]), 5, 0)


def test_first_rows_are_the_batch_sizes_summed():
    order = BatchOrder(8, schedule=((3, 2), (7, 4)))
    sizes = [2] * 3 + [4] * 4 + [8] * 5
    assert [order.rows_of_batch(i) for i in range(12)] == sizes
    assert [order.first_row(i) for i in range(13)] == np.cumsum([0, *sizes]).tolist()


def test_skipped_batches_are_jumped_over_and_the_rest_come_in_order():
    whole = BatchOrder(4, schedule=((6, 2),))
    skipping = BatchOrder(4, schedule=((6, 2),), skip=((12, 14), (3, 5), (4, 8)))  # overlapping, out of order
    left = [i for i in range(30) if not (3 <= i < 8 or 12 <= i < 14)]
    assert [skipping.batch_index(s) for s in range(len(left))] == left
    for step, index in enumerate(left):
        np.testing.assert_array_equal(skipping.rows(step, slice(None)), whole.rows(index, slice(None)))


def test_the_step_counts_the_rows_that_the_source_delivers_also_where_batches_are_skipped():
    order = BatchOrder(8, schedule=((4, 2), (9, 4)), skip=((6, 8), (2, 5), (20, 30)))
    steps = np.arange(25)
    rows = [len(order.rows(int(step), slice(None))) for step in steps]
    assert rows_at(steps, order).tolist() == rows == [order.rows_of_step(int(step)) for step in steps]
    assert [float(rows_before(step, order)) for step in steps] == np.cumsum([0, *rows])[:-1].tolist()


@pytest.mark.parametrize("skip", [((5, 5),), ((-1, 3),), ((4, 2),), ((1, 2, 3),)])
def test_skip_ranges_that_mean_nothing_are_refused(skip):
    with pytest.raises(UserError, match=r"data\.skip"):
        BatchOrder(4, skip=skip)


def test_batch_schedule_in_steps_percent_and_tokens():
    resolve = lambda s: resolve_batch_schedule(s, batch_size=32, context_length=10, steps=1000)  # noqa: E731
    assert resolve([("200", 8)]) == ((200, 8),)
    assert resolve([("5%", 8), ("100", 16)]) == ((50, 8), (100, 16))
    # 8 rows of 10 tokens: 8,000 tokens after 100 batches; then 16 rows: 24,000 after 100 more.
    assert resolve([("8ktok", 8), ("0.024Mtok", 16)]) == ((100, 8), (200, 16))
    for bad in ([("soon", 8)], [("10", 64)], [("10", 0)], [("20", 8), ("10", 16)]):
        with pytest.raises(UserError, match="batch_schedule"):
            resolve(bad)


def test_a_batch_grows_linearly_in_the_tokens_seen():
    context, steps, full, first, ramp = 10, 10_000, 64, 4, 96_000
    said = []
    kwargs = dict(batch_size=full, context_length=context, steps=steps)
    schedule = resolve_batch_schedule((("96ktok", (first, 0)),), **kwargs, micro=4, log=said.append)
    assert [rows for _, rows in schedule] == list(range(4, 64, 4)) and not said
    seen, step = 0, 0
    for until, rows in schedule:
        while step < until:
            # the batch by the line through (0, first) and (ramp, full), cut to whole micro-batches
            exact = first + (full - first) * seen / ramp
            assert exact - 4 - 0.5 < rows < exact + 0.5
            seen, step = seen + rows * context, step + 1
    assert seen == pytest.approx(ramp, rel=0.01)
    coarse = resolve_batch_schedule((("96ktok", (first, 0)),), **kwargs, micro=16, log=said.append)
    assert [rows for _, rows in coarse] == [16, 32, 48]
    assert said == ["batch_schedule: batches start at 16 sequences, a whole micro-batch, and not at 4"]
    assert resolve_batch_schedule((("96ktok", (first, 0)),), **kwargs, micro=64) == ()
    assert resolve_batch_schedule((("96ktok", (128, 0)),), **kwargs, micro=4) == ()
    assert resolve_batch_schedule((("10", (8, 16)), ("20", 32)), **kwargs, micro=8) == ((10, 8), (20, 32))
    assert resolve_batch_schedule((("10", (8, 8)),), **kwargs, micro=4) == ((10, 8),)
    assert resolve_batch_schedule((("10", (64, 64)),), **kwargs, micro=4) == ()
    for bad in ((0, 8), (8, 65), (16, 8), (1, 2, 3)):
        with pytest.raises(UserError, match="batch_schedule has .*; allowed: 1 to batch_size"):
            resolve_batch_schedule((("10", bad),), **kwargs)


@pytest.mark.parametrize("length", [1, 7, 12, 108, 109])
@pytest.mark.parametrize("doc_mask", [False, True])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_token_is_predicted_exactly_once_per_epoch(length, doc_mask, epoch):
    maker = StreamRows(split_of(DOCUMENTS), length, doc_mask, seed=9)
    rows = maker.build(np.full(maker.rows_per_epoch, epoch), np.arange(maker.rows_per_epoch))
    assert pairs(rows) == stream_pairs(DOCUMENTS)
    assert set(np.unique(rows["target_weights"])) <= {0.0, 1.0}
    assert (rows["target_weights"] == 0).sum() == maker.rows_per_epoch * length - 108


def test_offset_moves_each_epoch():
    maker = StreamRows(split_of(DOCUMENTS), 12, seed=9)
    assert len({maker.offset(e) for e in range(20)}) > 10
    assert StreamRows(split_of(DOCUMENTS), 12).offset(3) == 0


def test_training_epoch_is_a_permutation_of_the_rows():
    maker = StreamRows(split_of(DOCUMENTS), 12, seed=9)
    numbers = np.arange(maker.rows_per_epoch)
    for epoch in (0, 1):
        shuffled = pick(maker, numbers + epoch * maker.rows_per_epoch, seed=3)["tokens"]
        straight = maker.build(np.full(len(numbers), epoch), numbers)["tokens"]
        assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, straight.tolist()))
        assert shuffled.tolist() != straight.tolist()


def test_every_epoch_has_an_order_of_its_own():
    """Of documents in rows of their own, which rows come first, epoch by epoch."""
    maker = PieceRows(split_of(documents_of(range(1, 30))), 40)
    numbers = np.arange(maker.rows_per_epoch)
    orders = {tuple(pick(maker, numbers + e * len(numbers), seed=3)["targets"].sum(axis=1)) for e in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("doc_mask", [False, True])
def test_three_epochs_of_training_predict_every_token_three_times_whatever_the_batches(doc_mask):
    """9 rows an epoch; batches of 2, 3 and 4 rows straddle the epochs; 27 rows in all."""
    maker = StreamRows(split_of(DOCUMENTS), 12, doc_mask, seed=9)
    source = TrainSource(maker, BatchOrder(4, schedule=((3, 2), (6, 3))), seed=1)
    found = []
    for step in range(6 + 3):
        found += pairs(source.rows(step, slice(None)))
    assert sorted(found) == sorted(stream_pairs(DOCUMENTS) * 3)


def test_slices_of_hosts_concatenate_to_the_global_batch():
    for maker in (StreamRows(split_of(DOCUMENTS), 12, True, 9), PieceRows(split_of(DOCUMENTS), 12, bins=True)):
        source = TrainSource(maker, BatchOrder(6), seed=1)
        for step in (0, 1, 7):
            whole = source.rows(step, slice(None))
            parts = [source.rows(step, slice(a, b)) for a, b in ((0, 1), (1, 4), (4, 6))]
            for name, values in whole.items():
                np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), values)


def test_batch_depends_on_seed_and_step_alone():
    make = lambda seed: TrainSource(StreamRows(split_of(DOCUMENTS), 12, seed=seed), BatchOrder(6), seed)  # noqa: E731
    forwards, backwards = make(1), make(1)
    a = [forwards.rows(s, slice(None))["tokens"] for s in range(5)]
    b = [backwards.rows(s, slice(None))["tokens"] for s in reversed(range(5))][::-1]
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(make(2).rows(0, slice(None))["tokens"], a[0])


def test_rows_have_the_shapes_and_dtypes_of_the_spec():
    for maker in (StreamRows(split_of(DOCUMENTS), 12), StreamRows(split_of(DOCUMENTS), 12, True)):
        source = TrainSource(maker, BatchOrder(6), seed=1)
        rows, spec = source.rows(0, slice(None)), source.spec()
        assert {k: (v.shape, v.dtype) for k, v in rows.items()} == {k: (v.shape, v.dtype) for k, v in spec.items()}


def alone(document):
    """What a document gives alone, by definition: EOT and its tokens predict its tokens and an EOT."""
    return [EOT, *document], [*document, EOT], list(range(len(document) + 1))


@pytest.mark.parametrize("layout", ["packed", "padded", "bins"])
def test_packed_document_gives_exactly_what_it_gives_alone(layout):
    """Every document that lies whole in a row has, as a segment, the tokens, targets, weights and positions it has
    alone; segments are numbered from 1 and contiguous; padding is segment 0 with weight 0."""
    split = split_of(DOCUMENTS)
    maker = StreamRows(split, 60, doc_mask=True) if layout == "packed" else PieceRows(split, 60, layout == "bins")
    rows = maker.build(np.zeros(maker.rows_per_epoch, int), np.arange(maker.rows_per_epoch))
    found = []
    for row in range(maker.rows_per_epoch):
        segments = rows["segment_ids"][row]
        used = segments[segments > 0]
        assert used.tolist() == sorted(used.tolist()) and set(used) == set(range(1, used.max() + 1))
        assert (rows["target_weights"][row][segments == 0] == 0).all()
        for segment in range(1, used.max() + 1):
            here = segments == segment
            if (rows["target_weights"][row][here] == 1).all():
                found.append(tuple(rows[k][row][here].tolist() for k in ("tokens", "targets", "positions")))
    whole = [f for f in found if f[0][0] == EOT and f[1][-1] == EOT]
    wanted = [alone(d) for d in DOCUMENTS]
    if layout == "packed":  # 108 tokens in rows of 60: one document is cut
        assert len(whole) == len(DOCUMENTS) - 1 and all(w in wanted for w in map(tuple, whole))
    else:
        assert sorted(whole) == sorted(wanted)


def test_row_that_begins_inside_a_document_counts_positions_from_its_own_start():
    maker = StreamRows(split_of(DOCUMENTS), 10, doc_mask=True)
    rows = maker.build(np.zeros(maker.rows_per_epoch, int), np.arange(maker.rows_per_epoch))
    assert (rows["positions"][:, 0] == 0).all() and rows["positions"].max() == 9
    assert (rows["segment_ids"][:, 0] == 1).all()


def test_without_an_eot_no_document_predicts_the_first_token_of_the_next():
    split = split_of(DOCUMENTS, eot=None)
    maker = StreamRows(split, 10, doc_mask=True)
    rows = maker.build(np.zeros(maker.rows_per_epoch, int), np.arange(maker.rows_per_epoch))
    inside = sorted(p for d in DOCUMENTS for p in itertools.pairwise(d))
    assert pairs(rows) == inside
    assert pairs(PieceRows(split, 60).build(np.zeros(8, int), np.arange(8))) == inside


@pytest.mark.parametrize("bins", [False, True])
@pytest.mark.parametrize("length", [4, 16, 64])
def test_pieces_predict_every_token_once_too(bins, length):
    maker = PieceRows(split_of(DOCUMENTS), length, bins)
    rows = maker.build(np.zeros(maker.rows_per_epoch, int), np.arange(maker.rows_per_epoch))
    assert pairs(rows) == stream_pairs(DOCUMENTS)
    if not bins:
        assert maker.rows_per_epoch == sum(-(-(len(d) + 1) // length) for d in DOCUMENTS)


def test_best_fit_packs_everything_and_leaves_no_two_bins_that_fit_together():
    sizes = np.random.default_rng(0).integers(1, 65, 500)
    order, bounds = best_fit(sizes, 64)
    assert sorted(order.tolist()) == list(range(500))
    filled = np.sort([sizes[order[a:b]].sum() for a, b in itertools.pairwise(bounds)])
    assert filled.max() <= 64
    assert filled[0] + filled[1] > 64
    fewest = max(sizes.sum() / 64, (sizes > 32).sum())  # no packing has fewer bins
    assert len(filled) <= 1.02 * fewest + 1


def test_best_fit_takes_the_fullest_bin_that_has_room():
    """7, 5, 3, 2 in bins of 10: 3 joins 7 (room 3), not 5 (room 5); then 2 joins 5."""
    order, bounds = best_fit(np.array([7, 5, 3, 2]), 10)
    assert [order[a:b].tolist() for a, b in itertools.pairwise(bounds)] == [[0, 2], [1, 3]]


def test_stream_going_round_is_the_same_wherever_the_circle_is_cut():
    """A nanoGPT file has its EOTs behind the documents: the same circle, cut elsewhere, and no document at 0."""
    stream = np.array(flat([*d, EOT] for d in DOCUMENTS), "<u2")
    behind = Split(stream, np.flatnonzero(stream == EOT).astype("<u8"), 0, EOT)
    for maker in (StreamRows(behind, 25, doc_mask=True), PieceRows(behind, 25), PieceRows(behind, 25, bins=True)):
        rows = maker.build(np.zeros(maker.rows_per_epoch, int), np.arange(maker.rows_per_epoch))
        assert pairs(rows) == stream_pairs(DOCUMENTS)


def test_corpus_smaller_than_one_batch_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"the corpus yields 9 rows of 12 tokens, fewer than one batch of 10") as error:
        TrainSource(StreamRows(split_of(DOCUMENTS), 12), BatchOrder(10), seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["packed", "doc_mask", "padded", "bins"])
@pytest.mark.parametrize("rows_per_batch", [1, 4, 100])
def test_validation_covers_every_token_once_and_pads_the_last_batch_with_weight_0(layout, rows_per_batch):
    split = split_of(DOCUMENTS)
    if layout in ("padded", "bins"):
        maker = PieceRows(split, 12, layout == "bins")
    else:
        maker = StreamRows(split, 12, layout == "doc_mask")
    source = ValidText(split, maker, rows_per_batch, ByteTokenizer(["eot"]))
    batches = [source.rows(s, slice(None)) for s in range(source.num_batches)]
    assert all(len(b["tokens"]) == rows_per_batch for b in batches)
    assert sorted(flat(pairs(b) for b in batches)) == stream_pairs(DOCUMENTS)
    assert source.num_targets == 108 and source.bytes == 100
    assert source.bytes_in(source.num_batches) == 100
    text = lambda b: int(((b["targets"] < 256) & (b["target_weights"] > 0)).sum())  # noqa: E731
    for n in range(1, source.num_batches):
        assert source.bytes_in(n) == sum(map(text, batches[:n]))


def test_validation_is_in_the_order_of_the_text():
    split = split_of(DOCUMENTS)
    source = ValidText(split, StreamRows(split, 12), 4, ByteTokenizer(["eot"]))
    targets = np.concatenate([source.rows(s, slice(None))["targets"].ravel() for s in range(source.num_batches)])
    assert targets[:107].tolist() == split.tokens[1:].tolist() and targets[107] == EOT


def test_validation_without_an_eot_leaves_out_the_first_token_and_its_bytes():
    split = split_of(DOCUMENTS, eot=None)
    source = ValidText(split, StreamRows(split, 12), 4, ByteTokenizer())
    stream = flat(DOCUMENTS)
    found = flat(pairs(source.rows(s, slice(None))) for s in range(source.num_batches))
    assert sorted(found) == sorted(itertools.pairwise(stream))
    assert source.bytes == 99


def test_validation_slices_concatenate_across_the_padding():
    split = split_of(DOCUMENTS)
    source = ValidText(split, StreamRows(split, 12, True), 4, ByteTokenizer(["eot"]))  # 9 rows: the last batch has 1
    whole = source.rows(2, slice(None))
    parts = [source.rows(2, slice(a, b)) for a, b in ((0, 1), (1, 2), (2, 4))]
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), values)
    assert (whole["target_weights"][1:] == 0).all()
