"""From a data config to batches, statistics and baselines; and the mistakes a user can make on the way."""

import dataclasses
import io
import itertools
import json
import lzma
import math
import multiprocessing
import random
from collections import Counter

import numpy as np
import pytest

from gpt_jax.config import DataConfig, TokenizerConfig, load
from gpt_jax.config_changes import compare_data
from gpt_jax.data import Loader, prepare_data
from gpt_jax.data.baselines import baselines, unigram_nll, xz_bits_per_byte
from gpt_jax.data.cache import file_sha256
from gpt_jax.data.command import format_row, run_data
from gpt_jax.data.splits import held_out, splitter
from gpt_jax.data.tokenizer import ByteTokenizer, train_char
from gpt_jax.errors import UserError
from gpt_jax.run import build_run

BYTES = TokenizerConfig(kind="byte", specials=("eot",))


def texts(count=120, seed=0, words=("alpha", "beta", "gamma", "delta", "naïve", "東京")):
    draw = random.Random(seed)
    return [f"{seed}-{i} " + " ".join(draw.choice(words) for _ in range(draw.randrange(3, 30))) for i in range(count)]


def write(path, documents):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    return str(path)


@pytest.fixture
def prepare(tmp_path):
    """prepare_data with small defaults and a cache of its own."""

    def call(log=None, context_length=32, batch_size=4, run_seed=0, **config):
        data = DataConfig(**{"tokenizer": BYTES, **config})
        return prepare_data(
            data,
            context_length=context_length,
            batch_size=batch_size,
            seed=run_seed,
            cache_dir=tmp_path / "cache",
            log=log,
        )

    return call


def all_rows(source):
    return [source.rows(s, slice(None)) for s in range(source.num_batches)]


def test_data_knows_its_bytes_tokens_and_documents(prepare, tmp_path):
    documents = texts()
    data = prepare(path=write(tmp_path / "a.jsonl", documents))
    parts = {"train": [], "valid": []}
    for text in documents:
        parts["valid" if held_out(text, 0.05) else "train"].append(text)
    assert len(parts["valid"]) > 0
    assert data.documents == {k: len(v) for k, v in parts.items()}
    assert data.bytes == {k: sum(len(t.encode()) for t in v) for k, v in parts.items()}
    assert data.tokens == {k: data.bytes[k] + data.documents[k] for k in parts}
    assert data.valid["valid"].bytes == data.bytes["valid"] == data.valid["valid"].bytes_in(10**9)
    assert data.valid["valid"].num_targets == data.tokens["valid"]
    json.dumps(data.info)
    assert data.info["texts"]["data"]["corpus"]["sha256"] and data.info["tokenizer"]["hash"] == data.tokenizer.hash


def test_second_call_reads_the_cache_and_gives_the_same_batches(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", texts())
    first, lines = [], []
    a = prepare(first.append, path=path, tokenizer=TokenizerConfig(vocab_size=350))
    b = prepare(lines.append, path=path, tokenizer=TokenizerConfig(vocab_size=350))
    assert any("training a unigram tokenizer" in line for line in first) and lines == []
    assert a.tokenizer.hash == b.tokenizer.hash
    for step in (0, 1, 9):
        for name, values in a.train.rows(step, slice(None)).items():
            np.testing.assert_array_equal(b.train.rows(step, slice(None))[name], values)


def test_tokenizer_is_trained_on_the_training_text_alone(prepare, tmp_path):
    documents = texts()
    marked = [t + " ¤" if held_out(t + " ¤", 0.05) else t for t in documents]
    assert any("¤" in t for t in marked)
    data = prepare(path=write(tmp_path / "a.jsonl", marked), tokenizer=TokenizerConfig(kind="char", vocab_size=0))
    held = {c for t in marked if not held_out(t, 0.05) for c in t}
    assert data.tokenizer.alphabet == sorted(held)


def test_seed_changes_the_order_and_data_seed_overrides_it(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", texts())
    rows = [
        prepare(path=path, run_seed=s, **c).train.rows(0, slice(None))["tokens"].tolist()
        for s, c in ((1, {}), (2, {}), (2, {"seed": 1}))
    ]
    assert rows[0] != rows[1] and rows[0] == rows[2]


def test_a_run_whose_batch_grows_starts_at_a_whole_micro_batch_and_says_so():
    keys = {"batch_size": "32", "microbatches": "4", "batch_schedule": "(('6', (4, 0)),)", "steps": "9"}
    keys |= {"context_length": "16", "model.num_layers": "1", "model.d_model": "16", "model.num_heads": "2"}
    keys |= {"data.tokenizer.kind": "byte", "optimizer.name": "adamw"}
    said = []
    run = build_run(load("quickstart", keys), said.append)
    assert "batch_schedule: batches start at 8 sequences, a whole micro-batch, and not at 4" in said
    # on the line from 4 at step 0 to 32 at step 6, in eights
    assert [run.order.rows_of_step(step) for step in range(9)] == [8, 8, 8, 16, 24, 24, 32, 32, 32]
    assert [run.data.train.rows(step, slice(None))["target_weights"].any(1).sum() for step in (0, 3, 6)] == [8, 16, 32]


def test_skip_and_batch_schedule_reach_the_source(tmp_path):
    path = write(tmp_path / "a.jsonl", texts())
    make = lambda **c: prepare_data(  # noqa: E731
        DataConfig(path=path, tokenizer=BYTES, **c),
        context_length=32,
        batch_size=4,
        seed=0,
        batch_schedule=((2, 1), (3, 2)),
        cache_dir=tmp_path / "cache",
        log=None,
    )
    whole, skipping = make().train, make(skip=((1, 5),)).train
    assert [whole.batch_size(s) for s in range(5)] == [1, 1, 2, 4, 4]
    assert [skipping.batch_size(s) for s in range(3)] == [1, 4, 4]
    for step, index in enumerate([0, 5, 6, 7]):
        np.testing.assert_array_equal(
            skipping.rows(step, slice(None))["tokens"], whole.rows(index, slice(None))["tokens"]
        )


@pytest.mark.parametrize("layout, doc_mask", [("packed", False), ("packed", True), ("padded", False), ("bins", True)])
def test_validation_text_is_exactly_what_was_held_out(prepare, tmp_path, layout, doc_mask):
    documents = texts()
    data = prepare(path=write(tmp_path / "a.jsonl", documents), layout=layout, doc_mask=doc_mask)
    rows = all_rows(data.valid["valid"])
    assert ("segment_ids" in rows[0]) == (layout != "packed" or doc_mask)
    assert set(rows[0]) == set(data.train.spec()) == set(data.valid["valid"].spec())
    targets = np.concatenate([r["targets"][r["target_weights"] > 0] for r in rows])
    held = [t for t in documents if held_out(t, 0.05)]
    if layout == "bins":  # in another order
        assert Counter(targets.tolist()) == Counter(b for t in held for b in [*t.encode(), 256])
    else:
        assert data.tokenizer.decode(targets, specials="show") == "".join(t + "<|eot|>" for t in held)


def test_validation_files_of_their_own(prepare, tmp_path):
    train, valid = write(tmp_path / "a.jsonl", texts()), write(tmp_path / "b.jsonl", texts(10, seed=1))
    data = prepare(path=train, valid_path=valid)
    assert data.documents == {"train": 120, "valid": 10}


def test_nothing_held_out(prepare, tmp_path):
    data = prepare(path=write(tmp_path / "a.jsonl", texts()), valid_fraction=0.0)
    assert data.valid == {} and data.documents == {"train": 120, "valid": 0}
    assert baselines(data) == {}


# -- splitting -----------------------------------------------------------------------------------------------------


def split(documents, how, fraction, say=None):
    items = [(str(i), t) for i, t in enumerate(documents)]
    return list(splitter(lambda: iter(items), iter(items), how, fraction, say))


def test_split_by_document_does_not_depend_on_the_other_documents():
    documents = texts(3600)
    alone = {t: s for s, t in split(documents, "document", 0.1)}
    shuffled = documents[::-1][:3000]
    assert all(alone[t] == s for s, t in split(shuffled, "document", 0.1))
    count = sum(s == "valid" for s in alone.values())
    assert 360 - 4 * 18 < count < 360 + 4 * 18  # four standard deviations of a binomial


def test_split_of_the_tail_is_the_first_int_n_characters_as_nanogpt_has_it():
    text = "naïve 東京 " * 100
    n = int(len(text) * 0.9)
    assert split([text], "tail", 0.1) == [("train", text[:n]), ("valid", text[n:])]
    parts = [text[:100], text[100:850], text[850:]]
    assert split(parts, "tail", 0.1) == [
        ("train", text[:100]),
        ("train", text[100:810]),
        ("valid", text[810:850]),
        ("valid", text[850:]),
    ]


def test_few_documents_are_split_by_the_tail_and_it_is_said():
    lines = []
    assert split(["0123456789" * 10], "document", 0.05, lines.append) == [
        ("train", "0123456789" * 9 + "01234"),
        ("valid", "56789"),
    ]
    assert len(lines) == 1 and lines[0].startswith("1 document: too few to hold out whole ones")
    with pytest.raises(UserError, match="too small to hold out"):
        split(["a"], "tail", 0.5)


def test_a_corpus_of_which_the_hash_holds_out_no_document_has_its_tail_held_out():
    texts = [text for text in (f"document number {i}" for i in range(200)) if not held_out(text, 0.05)][:60]
    items, lines = [(str(i), text) for i, text in enumerate(texts)], []
    parts = list(splitter(lambda: iter(items), iter(items), "document", 0.05, lines.append))
    valid = "".join(text for split, text in parts if split == "valid")
    assert len(valid) == pytest.approx(0.05 * sum(map(len, texts)), abs=1) and len(lines) == 1
    assert "".join(text for _, text in parts) == "".join(texts)


# -- mixtures ------------------------------------------------------------------------------------------------------


def test_mixture_has_proportions_and_validation_by_source(prepare, tmp_path):
    sources = [
        {"name": "web", "weight": 3, "path": write(tmp_path / "a.jsonl", texts(seed=1))},
        {"name": "books", "weight": 1, "path": write(tmp_path / "b.jsonl", texts(seed=2)), "valid_fraction": 0.2},
        {"name": "code", "weight": 1, "path": write(tmp_path / "c.jsonl", texts(seed=3)), "valid_fraction": 0.0},
    ]
    data = prepare(sources=tuple(sources), batch_size=10)
    assert list(data.valid) == ["web", "books"]
    for name in ("web", "books"):
        assert data.valid[name].bytes == data.bytes[f"{name}/valid"]
    assert data.bytes["train"] == sum(data.bytes[f"{n}/train"] for n in ("web", "books", "code"))
    assert data.documents["valid"] == data.documents["web/valid"] + data.documents["books/valid"]
    counts = sum(np.bincount(data.train.sources(s), minlength=3) for s in range(10))
    assert counts.tolist() == [60, 20, 20]
    for step in range(3):
        rows = data.train.rows(step, slice(None))["tokens"]
        for source, row in zip(data.train.sources(step), rows, strict=True):
            seed = {b"1-": 0, b"2-": 1, b"3-": 2}
            text = data.tokenizer.decode(row, specials="show").encode()
            begun = [text[i + 7 :][:2] for i in range(len(text)) if text[i:].startswith(b"<|eot|>")]
            assert all(seed.get(b, source) == source for b in begun)


@pytest.mark.parametrize(
    "entry, says",
    [
        ({"weight": 1, "path": "x"}, "has no 'name'"),
        ({"name": "a", "path": "x"}, "has no 'weight'"),
        ({"name": "a", "weight": 1}, "either 'corpus' or 'path'"),
        ({"name": "a", "weight": 1, "path": "x", "corpus": "python_docs"}, "either 'corpus' or 'path'"),
        ({"name": "a", "weight": 1, "paht": "x"}, "'paht' .did you mean 'path'"),
        ({"name": "a/b", "weight": 1, "path": "x"}, "different names without '/'"),
        ({"name": "train", "weight": 1, "path": "x"}, "not 'train' or 'valid'"),
        (1, "data.sources has 1; each is a table"),
        ({"name": 1, "weight": 1, "path": "x"}, "'name' of an entry of data.sources is 1; it takes text"),
        ({"name": "a", "weight": "b", "path": "x"}, "'weight' of an entry of data.sources is 'b'; it takes a number"),
    ],
)
def test_mistakes_in_sources_are_named(prepare, entry, says):
    with pytest.raises(UserError, match=says) as error:
        prepare(sources=(entry,))
    assert "\n" not in str(error.value)


# -- existing tokenizers, stores and token files ---------------------------------------------------------------------


def test_store_folder_as_path_brings_its_tokenizer(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", texts())
    first = prepare(path=path, tokenizer=TokenizerConfig(kind="char", vocab_size=0))
    store = first.info["texts"]["data"]["store"]
    data = prepare(path=store, tokenizer=TokenizerConfig())
    assert data.tokenizer.hash == first.tokenizer.hash and data.bytes == first.bytes
    train_char(["abc"], 0, ("eot",), "bytes").save(tmp_path / "other")
    with pytest.raises(UserError, match=r"data\.path is a token store.* empty data\.valid_path, which is '.*a\.jsonl'"):
        prepare(path=store, valid_path=path, tokenizer=TokenizerConfig())
    with pytest.raises(UserError, match="made with another tokenizer"):
        prepare(path=store, tokenizer=TokenizerConfig(kind="char", path=str(tmp_path / "other")))


def test_token_files_of_nanogpt_train_in_place(prepare, tmp_path):
    tokenizer = ByteTokenizer(("eot",))
    tokenizer.save(tmp_path / "tokenizer")
    for name, documents in (("train", texts()), ("val", texts(9, seed=1))):
        stream = np.array(list(itertools.chain(*([*t.encode(), 256] for t in documents))), np.uint16)
        stream.tofile(tmp_path / f"{name}.bin")
    data = prepare(
        path=f"{tmp_path}/train.bin",
        valid_path=f"{tmp_path}/val.bin",
        doc_mask=True,
        tokenizer=TokenizerConfig(kind="byte", path=str(tmp_path / "tokenizer")),
    )
    assert data.bytes == {k: sum(len(t.encode()) for t in d) for k, d in (("train", texts()), ("valid", texts(9, 1)))}
    targets = np.concatenate([r["targets"][r["target_weights"] > 0] for r in all_rows(data.valid["valid"])])
    assert Counter(targets.tolist()) == Counter(b for t in texts(9, seed=1) for b in [*t.encode(), 256])
    assert baselines(data)["unigram_bits_per_byte"] > 0
    with pytest.raises(UserError, match=r"holds tokens; say which tokenizer made them by data\.tokenizer\.path"):
        prepare(path=f"{tmp_path}/train.bin", tokenizer=TokenizerConfig())


def test_token_files_are_known_by_their_content(prepare, tmp_path):
    files = {"path": f"{tmp_path}/train.bin", "valid_path": f"{tmp_path}/val.bin"}
    ByteTokenizer(("eot",)).save(tmp_path / "tokenizer")
    tokenizer = TokenizerConfig(kind="byte", path=str(tmp_path / "tokenizer"))

    def info(train, valid):
        for path, seed in zip(files.values(), (train, valid), strict=True):  # the same counts, in another order
            np.random.default_rng(seed).permutation(np.arange(2570) % 257).astype("<u2").tofile(path)
        return prepare(**files, tokenizer=tokenizer).info

    first = info(1, 2)
    entry = first["texts"]["data"]
    assert entry["train_sha256"] == file_sha256(files["path"])
    assert entry["valid_sha256"] == file_sha256(files["valid_path"])
    assert compare_data(first, info(1, 2)) is None
    assert compare_data(first, info(3, 2)).note == "texts.data.train_sha256"
    assert compare_data(first, info(1, 3)).note == "texts.data.valid_sha256"
    older = {"tokens_file": entry["tokens_file"], "tokens": entry["tokens"]}  # of a run begun before the hashes
    assert compare_data({**first, "texts": {"data": older}}, first) is None


def test_vocabulary_is_cut_to_the_most_frequent_and_bits_per_byte_still_compare(prepare, tmp_path):
    """The unigram loss of the whole text, in bits per byte, is finite and of the same size for every k; with <unk> it
    includes what the <unk>s hide."""
    path = write(tmp_path / "a.jsonl", texts())
    whole = prepare(path=path, tokenizer=TokenizerConfig(vocab_size=350))
    cut = prepare(path=path, tokenizer=TokenizerConfig(vocab_size=350, keep=20))
    unk = prepare(path=path, tokenizer=TokenizerConfig(vocab_size=350, keep=20, unknown="unk"), batch_size=1)
    assert whole.bytes == cut.bytes == unk.bytes
    assert len(cut.tokenizer.kept) == 20 and cut.tokenizer.lossless and not unk.tokenizer.lossless
    assert cut.tokens["train"] > whole.tokens["train"] > 0
    source = unk.valid["valid"]
    targets = np.concatenate([r["targets"][r["target_weights"] > 0] for r in all_rows(source)])
    count = int((targets == unk.tokenizer.unk).sum())
    assert count > 0
    assert source.unk_nats_in(source.num_batches) == pytest.approx(count * unk.tokenizer.unk_nats)
    assert cut.valid["valid"].unk_nats_in(1) == 0.0
    assert 0 < source.bytes_in(1) < source.bytes


@pytest.mark.parametrize(
    "config, says",
    [
        (dict(layout="padde"), "data.layout is 'padde' .did you mean 'padded'"),
        (dict(split="end"), "data.split is 'end'"),
        (dict(valid_fraction=1.0), "valid_fraction is 1.0"),
        (dict(path="/nowhere/a.txt"), "no such file"),
        (dict(corpus="files"), "data.path names none"),
        (dict(tokenizer=TokenizerConfig(kind="unigrams")), "'unigrams' .did you mean 'unigram'"),
        (dict(tokenizer=TokenizerConfig(kind="gpt2")), "set data.tokenizer.path"),
        (dict(tokenizer=TokenizerConfig(path="/nowhere")), "no such file or folder"),
        (dict(tokenizer=TokenizerConfig(path="/")), "is not a saved tokenizer"),
        (dict(tokenizer=TokenizerConfig(kind="hf", path="/")), "has no tokenizer.json"),
        (dict(tokenizer=TokenizerConfig(kind="char", vocab_size=5, unknown="what")), "unknown is 'what'"),
        (dict(tokenizer=TokenizerConfig(kind="byte", specials=("eot", "eot"))), "repeats a name"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(batch_size=10_000), "fewer than one batch of 10000"),
        (dict(skip=((3, 1),)), "data.skip has"),
    ],
)
def test_mistakes_in_the_config_are_one_line(prepare, tmp_path, config, says):
    config = {"path": write(tmp_path / "a.jsonl", texts()), **config}
    if config.get("corpus"):
        config["path"] = ""
    with pytest.raises(UserError, match=says) as error:
        prepare(**config)
    assert "\n" not in str(error.value)


def test_empty_corpus_is_refused(prepare, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no text"):
        prepare(path=f"{tmp_path}/a.jsonl")


def _prepare_in_process(path, cache, queue):
    data = prepare_data(
        DataConfig(path=path, tokenizer=TokenizerConfig(vocab_size=350)),
        context_length=32,
        batch_size=4,
        seed=0,
        cache_dir=cache,
        log=None,
    )
    queue.put((data.tokenizer.hash, data.train.rows(3, slice(None))["tokens"].tolist()))


@pytest.mark.slow
def test_processes_that_start_together_share_one_build(tmp_path):
    path = write(tmp_path / "a.jsonl", texts())
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_prepare_in_process, args=(path, tmp_path / "c", queue)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert all(r == results[0] for r in results)
    assert len([p for p in (tmp_path / "c" / "stores").iterdir() if p.is_dir()]) == 1


# -- baselines, statistics, rows shown -----------------------------------------------------------------------------


def test_unigram_baseline_is_add_one_frequencies_by_hand(prepare, tmp_path):
    documents = texts()
    data = prepare(path=write(tmp_path / "a.jsonl", documents))
    train = Counter(b for t in documents if not held_out(t, 0.05) for b in [256, *t.encode()])
    valid = [b for t in documents if held_out(t, 0.05) for b in [*t.encode(), 256]]
    total = sum(train.values()) + 257
    bits = -sum(math.log2((train[b] + 1) / total) for b in valid)
    size = sum(len(t.encode()) for t in documents if held_out(t, 0.05))
    found = baselines(data)
    assert found["unigram_bits_per_byte"] == pytest.approx(bits / size, rel=1e-9)
    text = "".join(t for t in documents if held_out(t, 0.05)).encode()
    assert found["xz_bits_per_byte"] == len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) * 8 / size


def test_baselines_of_known_distributions():
    assert unigram_nll(np.array([0, 0, 0, 0]), np.array([1, 2, 3, 4])) == pytest.approx(10 * math.log(4))
    noise = np.random.default_rng(0).integers(0, 256, 50_000).astype(np.uint8).tobytes()
    assert 8.0 < xz_bits_per_byte([noise]) < 8.1
    assert xz_bits_per_byte([b"a" * 50_000]) < 0.05
    assert xz_bits_per_byte([noise, b"a" * 50_000], limit=10) > 8.0  # only the texts that begin within the limit


def test_command_reports_and_its_json_reads_back(tmp_path):
    stream = io.StringIO()
    report = run_data(
        DataConfig(path=write(tmp_path / "a.jsonl", texts()), tokenizer=TokenizerConfig(kind="char", vocab_size=20)),
        context_length=32,
        batch_size=4,
        seed=0,
        show=6,
        cache_dir=tmp_path / "cache",
        log=None,
        stream=stream,
    )
    assert json.loads(json.dumps(report)) == json.loads(json.dumps(report, sort_keys=True))
    train = report["splits"]["train"]
    assert train["bytes_per_token"] == pytest.approx(train["bytes"] / train["tokens"], abs=1e-4)
    assert train["tokens"] + train["eots"] == report["tokens"]["train"] and train["eots"] == train["documents"]
    assert 0 < train["covered"] < 1 and report["tokenizer"]["kind"] == "char"
    printed = stream.getvalue()
    assert printed.count("--- step") == 6 and printed.count("--- step 1,") == 2
    assert "<|eot|>" in printed and "bytes/token" in printed and "xz " in printed


def row(tokens, targets, weights, segments=None):
    out = {"tokens": np.array(tokens), "targets": np.array(targets), "target_weights": np.array(weights, np.float32)}
    if segments is not None:
        out |= {"segment_ids": np.array(segments), "positions": np.zeros(len(segments))}
    return out


def test_shown_row_has_documents_on_lines_weights_in_colours_and_padding_counted():
    tokenizer = ByteTokenizer(("eot",))
    a, b, c = b"abc"
    plain = row([256, a, b, 256, c, 0], [a, b, 256, c, 256, 0], [1, 0, 1, 1, 1, 0], [1, 1, 1, 2, 2, 0])
    assert format_row(plain, tokenizer, colour=False).splitlines() == [
        "[1] <|eot|>a[b]",
        "[2] <|eot|>c",
        "-> '<|eot|>' (weight 1), 1 padding",
    ]
    coloured = format_row(plain, tokenizer, colour=True)
    assert "\x1b[2m<|eot|>\x1b[0m\x1b[32ma\x1b[0m\x1b[31mb\x1b[0m" in coloured
    assert "\x1b[33mb" in format_row(plain | {"target_weights": np.array([1, 0.5, 1, 1, 1, 0])}, tokenizer, colour=True)


def test_shown_row_without_segments_finds_documents_by_their_eot():
    tokenizer = ByteTokenizer(("eot",))
    shown = format_row(row([97, 256, 98, 99], [256, 98, 99, 100], [1, 1, 1, 0]), tokenizer, colour=False)
    assert shown.splitlines() == ["[1] a", "[2] <|eot|>bc", "-> 'd' (weight 0)"]


def test_character_of_many_tokens_is_shown_whole():
    tokenizer = ByteTokenizer(())
    ids = list("é東".encode())
    assert "é東" in format_row(row(ids, [*ids[1:], 0], [1] * 5), tokenizer, colour=False)


# -- real text -----------------------------------------------------------------------------------------------------


def test_shakespeare_is_split_and_encoded_as_nanogpt_does(prepare, data_folder):
    """nanoGPT data/shakespeare_char: 1,003,854 and 111,540 tokens over 65 characters; 90% of the text trains."""
    data = prepare(
        path=str(data_folder / "lm" / "tinyshakespeare.txt.xz"),
        split="tail",
        valid_fraction=0.1,
        tokenizer=TokenizerConfig(kind="char", vocab_size=0, specials=(), unknown="error"),
    )
    assert data.tokenizer.vocab_size == 65
    assert data.tokens == {"train": 1_003_854, "valid": 111_540}
    assert data.valid["valid"].num_targets == 111_539  # nothing predicts the very first
    with lzma.open(data_folder / "lm" / "tinyshakespeare.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read()
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    np.testing.assert_array_equal(data.splits["valid"].tokens, [ids[c] for c in text[1_003_854:]])


def test_shakespeare_in_gpt2_tokens_has_the_published_counts(prepare, data_folder):
    """nanoGPT data/shakespeare: 301,966 training and 36,059 validation tokens; ours have an EOT each besides."""
    data = prepare(
        path=str(data_folder / "lm" / "tinyshakespeare.txt.xz"),
        split="tail",
        valid_fraction=0.1,
        tokenizer=TokenizerConfig(kind="gpt2", path=str(data_folder / "gpt2_bpe"), specials=("eot",)),
    )
    assert data.tokens == {"train": 301_966 + 1, "valid": 36_059 + 1}
    assert data.tokenizer.vocab_size == 50257


def test_chinese_novel_by_its_path_alone(prepare, data_folder):
    lines = []
    data = prepare(
        lines.append,
        path=str(data_folder / "lm" / "novel_zh_hongloumeng.txt.xz"),
        tokenizer=dataclasses.replace(TokenizerConfig(), kind="bpe"),
    )
    assert any("too few to hold out whole ones" in line for line in lines)
    rows = all_rows(data.valid["valid"])
    targets = np.concatenate([r["targets"][r["target_weights"] > 0] for r in rows])
    with lzma.open(data_folder / "lm" / "novel_zh_hongloumeng.txt.xz", "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    assert data.tokenizer.decode(targets) == text[int(len(text) * 0.95) :]
    assert data.valid["valid"].bytes == len(text[int(len(text) * 0.95) :].encode())


def test_loader_delivers_what_the_source_says(prepare, tmp_path):
    data = prepare(path=write(tmp_path / "a.jsonl", texts()), doc_mask=True)
    with Loader(data.train, start_step=7, stop_step=10) as loader:
        for step, batch in loader:
            for name, values in data.train.rows(step, slice(None)).items():
                np.testing.assert_array_equal(batch[name], values)
