"""Tokenizers are lossless, never make a special of text, decode to valid UTF-8, and survive saving."""

import collections
import itertools
import json
import lzma
import math
import random
import re

import numpy as np
import pytest
import tokenizers

from gpt_jax.data import byte_level_bpe
from gpt_jax.data.byte_level_bpe import HuggingFaceTokenizer, byte_characters, load_gpt2
from gpt_jax.data.corpora import iter_documents
from gpt_jax.data.sentencepieces import train_sentencepiece
from gpt_jax.data.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer, most_frequent, train_char
from gpt_jax.data.vocabulary import TruncatedTokenizer, count_tokens, coverage, truncate
from gpt_jax.errors import UserError

SPECIALS = ("eot", "mask", "sep", "cls")
PRETENDERS = "<|eot|><|endoftext|><unk><s></s><pad><0x41><mask>[MASK]<|mask|>"
HARD = [
    "",
    " ",
    "   leading, double  and trailing  ",
    "\n\n\n\tdef f():\n\t    return 1\r\n\r",
    "\0 nul \0\0",
    "\u2581under\u2581score \u2581 \u2585 block",
    "\ue009\ue00a private",
    "e\u0301 \u00e9 ﬁ Å Å ½",  # normalisation would change these
    "\u200b\ufeff\u00a0\u3000\u2028\u2029\x85\x1c\x1f\x7f",
    "東京\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0010ffff\ufffd",
    PRETENDERS,
]


def random_texts(count, seed=0):
    """Random UTF-8: from ASCII, from all of Unicode, from what tokenizers trip over; and mixtures."""
    draw = random.Random(seed)
    tricky = "\0\t\n\r \u2581\u2585\ue009\ue00a\u00a0<>|_'s"

    def character():
        kind = draw.randrange(4)
        point = draw.randrange(128) if kind == 0 else draw.randrange(0x3000) if kind == 1 else draw.randrange(0x110000)
        return draw.choice(tricky) if kind == 3 or 0xD800 <= point < 0xE000 else chr(point)

    return ["".join(character() for _ in range(draw.randrange(1, 80))) for _ in range(count)]


@pytest.fixture(scope="module")
def prose():
    """About 80 kB of python_docs."""
    texts, size = [], 0
    for _, text in iter_documents("python_docs"):
        texts.append(text)
        size += len(text)
        if size > 80_000:
            return texts


@pytest.fixture(scope="module")
def trained(prose):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(prose[:50], trainer)
    unigram = train_sentencepiece(prose, "unigram", 700, SPECIALS)
    return {
        "byte": ByteTokenizer(SPECIALS),
        "char": train_char(prose, 0, SPECIALS, "bytes"),
        "char-50": train_char(prose, 50, SPECIALS, "bytes"),
        "unigram": unigram,
        "bpe": train_sentencepiece(prose, "bpe", 700, SPECIALS),
        "hf": HuggingFaceTokenizer(library.to_str(), SPECIALS),
        "truncated": truncate(unigram, count_tokens(unigram, prose), 100, SPECIALS),
    }


KINDS = ["byte", "char", "char-50", "unigram", "bpe", "hf", "truncated"]


@pytest.fixture(params=KINDS)
def tokenizer(request, trained):
    return trained[request.param]


def test_decode_of_encode_is_the_text(tokenizer, prose):
    assert tokenizer.lossless
    for text in [*HARD, *prose, *random_texts(500)]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert tokenizer.decode(ids) == text


def test_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer, prose):
    for text in [*HARD, *prose[:50], *random_texts(50, seed=1)]:
        ids = tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_text_never_produces_a_special(tokenizer):
    specials = set(tokenizer.specials.values())
    assert len(specials) == 4
    for text in [PRETENDERS, *random_texts(200, seed=2)]:
        ids = tokenizer.encode(text)
        assert not specials & set(ids.tolist())
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


def test_specials_are_shown_or_skipped_and_stand_for_no_bytes(tokenizer):
    eot, a, b = tokenizer.eot, tokenizer.encode("a"), tokenizer.encode("b")
    ids = [eot, *a, eot, *b]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, specials="show") == "<|eot|>a<|eot|>b"
    assert tokenizer.token_bytes(eot) == b"" and tokenizer.byte_lengths[eot] == 0
    assert tokenizer.eot == tokenizer.specials["eot"]


def test_any_ids_decode_to_valid_utf8_also_token_by_token(tokenizer):
    draw = np.random.default_rng(0)
    for specials in ("skip", "show"):
        for _ in range(100):
            ids = draw.integers(0, tokenizer.vocab_size, 40)
            whole = tokenizer.decode(ids, specials)
            whole.encode("utf-8")
            stream = tokenizer.stream(specials)
            pieces = [stream.push(i) for i in ids]
            assert "".join(pieces) + stream.flush() == whole


def test_stream_holds_a_character_back_until_it_is_whole():
    tokenizer = ByteTokenizer()
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("a東b")] == ["a", "", "", "東", "b"]
    assert stream.push(0xE6) == "" and stream.flush() == "\ufffd" and stream.flush() == ""
    assert stream.push(ord("x")) == "x"


def test_saved_tokenizer_loads_with_the_same_ids_and_hash(tokenizer, tmp_path, prose):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer) and again.kind == tokenizer.kind
    assert again.hash == tokenizer.hash and again.specials == tokenizer.specials
    assert again.vocab_size == tokenizer.vocab_size
    for text in [*HARD, *prose[:20]]:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pkl", ".pickle", ".npy")]


def test_hashes_differ_between_tokenizers(trained):
    assert len({t.hash for t in trained.values()}) == len(trained)
    assert ByteTokenizer(("eot",)).hash != ByteTokenizer(SPECIALS).hash
    assert CharTokenizer("ab").hash != CharTokenizer("ac").hash


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_id_outside_the_vocabulary_is_refused(tokenizer):
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match="not in the vocabulary"):
            tokenizer.decode([bad])


def test_missing_and_damaged_tokenizers_are_named(tmp_path, trained):
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path / "none")
    trained["unigram"].save(tmp_path)
    (tmp_path / "model.spm").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "model.spm").unlink()
    with pytest.raises(UserError, match=r"model\.spm is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)


# -- sentencepiece -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_is_deterministic_and_gives_the_size_asked_for(kind, prose):
    a, b = (train_sentencepiece(iter(prose), kind, 500, SPECIALS) for _ in range(2))
    assert a.hash == b.hash
    assert a.vocab_size == 500 and sorted(a.specials.values()) == [496, 497, 498, 499]
    assert [a.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]


def test_pieces_may_hold_line_breaks_and_indentation(trained):
    pieces = {trained["unigram"].token_bytes(i) for i in range(trained["unigram"].ordinary)}
    assert {b"\n", b"    "} <= pieces and any(b"\n" in p and len(p) > 1 for p in pieces)


def test_tiny_text_trains_a_smaller_vocabulary_and_none_at_all_is_refused():
    small = train_sentencepiece(["the cat sat on the mat\n"] * 20, "unigram", 4096, ("eot",))
    assert 257 < small.vocab_size < 400
    assert small.decode(small.encode("the cat 東")) == "the cat 東"
    for kind in ("unigram", "bpe"):
        with pytest.raises(UserError, match=r"too small|cannot train") as error:
            train_sentencepiece(["a"], kind, 4096)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="vocab_size is 200; "):
            train_sentencepiece(["a"], kind, 200)


def test_alphabet_larger_than_the_vocabulary_falls_back_to_bytes():
    """Four thousand different characters into 600 tokens: the frequent ones are pieces, all come back."""
    draw = random.Random(0)
    texts = ["".join(chr(0x4E00 + min(int(draw.expovariate(1 / 400)), 4000)) for _ in range(400)) for _ in range(50)]
    for kind in ("unigram", "bpe"):
        tokenizer = train_sentencepiece(texts, kind, 600)
        assert tokenizer.vocab_size <= 600
        assert all(tokenizer.decode(tokenizer.encode(t)) == t for t in texts)
        assert len(tokenizer.encode(texts[0])) < 3 * len(texts[0])


# -- characters and truncation --------------------------------------------------------------------------------------


def test_alphabet_is_the_k_most_frequent_characters_with_ties_lexical():
    assert most_frequent({"b": 2, "a": 2, "c": 5, "d": 1}, 2) == ["c", "a"]
    tokenizer = train_char(["cccccbbaad"], 2, ("eot",), "bytes")
    assert tokenizer.alphabet == ["a", "c"] and tokenizer.vocab_size == 2 + 256 + 1
    assert tokenizer.encode("cab").tolist() == [1, 0, 2 + ord("b")]


def test_all_characters_kept_is_one_token_per_character():
    text = "naïve 東京"
    for k in (0, len(set(text)), 1000):
        tokenizer = train_char([text], k, (), "error")
        assert tokenizer.vocab_size == len(set(text))
        np.testing.assert_array_equal(tokenizer.encode(text), [sorted(set(text)).index(c) for c in text])
    with pytest.raises(UserError, match="'x' is not in the vocabulary of 8 characters"):
        tokenizer.encode("ax")


def test_characters_outside_become_unk_worth_the_log_of_the_types_it_hides():
    tokenizer = train_char(["aaabbcde"], 2, ("eot",), "unk")
    assert tokenizer.vocab_size == 2 + 1 + 1 and not tokenizer.lossless
    assert tokenizer.encode("abcz").tolist() == [0, 1, tokenizer.unk, tokenizer.unk]
    assert tokenizer.unk_nats == math.log(3)  # c, d, e


def test_bytes_of_every_length_are_spelled_out():
    """1, 2, 3 and 4 bytes of UTF-8, at the edges of each length."""
    tokenizer = CharTokenizer("q")
    text = "q\x00\x7fq\x80\u07ffq\u0800\uffffq\U00010000\U0010ffffq"
    spelled = [0 if c == "q" else [1 + b for b in c.encode()] for c in text]
    wanted = [i for s in spelled for i in (s if isinstance(s, list) else [s])]
    assert tokenizer.encode(text).tolist() == wanted


def test_truncation_keeps_the_k_most_frequent_and_spells_the_rest(trained, prose):
    inner = trained["unigram"]
    counts = count_tokens(inner, prose)
    oracle = collections.Counter(int(i) for t in prose for i in inner.encode(t))
    assert {i: int(n) for i, n in enumerate(counts) if n} == dict(oracle)
    cut = truncate(inner, counts, 100, SPECIALS)
    ranked = sorted(range(inner.ordinary), key=lambda i: (-oracle[i], i))[:100]
    assert cut.kept == sorted(ranked)
    text = prose[0]
    wanted = []
    for i in inner.encode(text).tolist():
        wanted += [inner.token_bytes(i)] if i in ranked else [bytes([b]) for b in inner.token_bytes(i)]
    assert [cut.token_bytes(i) for i in cut.encode(text)] == wanted


def test_truncation_to_everything_changes_nothing(trained, prose):
    inner = trained["unigram"]
    whole = truncate(inner, count_tokens(inner, prose), 10**6, SPECIALS)
    assert whole.vocab_size == inner.vocab_size
    for text in prose[:20]:
        np.testing.assert_array_equal(whole.encode(text), inner.encode(text))


def test_truncation_to_unk_reports_what_it_hides(trained, prose):
    inner = trained["unigram"]
    counts = count_tokens(inner, prose)
    cut = truncate(inner, counts, 50, ("eot",), "unk")
    hidden = set(range(inner.ordinary)) - set(cut.kept)
    assert cut.vocab_size == 52 and cut.unk == 50
    assert cut.unk_nats == math.log(sum(1 for i in hidden if counts[i]))
    ids = cut.encode(prose[0])
    assert (ids == cut.unk).sum() == sum(1 for i in inner.encode(prose[0]).tolist() if i in hidden)
    with pytest.raises(UserError, match="only a lossless tokenizer"):
        TruncatedTokenizer(cut, [0])


def test_coverage_grows_with_k_and_bytes_per_token_too(prose):
    reports = [coverage(train_char(prose, k, (), "bytes"), prose, ks=(10, 1000)) for k in (10, 40, 80, 0)]
    assert all(a["bytes_per_token"] <= b["bytes_per_token"] for a, b in itertools.pairwise(reports))
    assert all(a["covered"] <= b["covered"] for a, b in itertools.pairwise(reports))
    counts = collections.Counter("".join(prose))
    top = sum(n for _, n in counts.most_common(10)) / sum(counts.values())
    assert reports[-1]["covered"] == 1.0 and reports[-1]["top"][10] == pytest.approx(top, abs=1e-6)
    assert reports[-1]["top"][1000] == 1.0 and reports[-1]["bytes"] == len("".join(prose).encode())


def test_coverage_of_unk_counts_what_is_lost():
    report = coverage(train_char(["aaab"], 1, (), "unk"), ["aab", "ba"])
    assert report["unk"] == 2 and report["covered"] == pytest.approx(3 / 5)


# -- byte-level BPE ------------------------------------------------------------------------------------------------


def library_words(text):
    """GPT-2's pre-tokenizer as the library has it."""
    table = byte_characters()
    found = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [bytes(table[c] for c in word).decode("utf-8", "surrogateescape") for word, _ in found]


def test_every_character_of_the_fast_path_has_the_class_the_library_gives_it():
    """Each character among letters, digits, punctuation and spaces: the words are the library's."""
    points = [
        c for c in map(chr, range(0x110000)) if not 0xD800 <= ord(c) < 0xE000 and not byte_level_bpe._UNSAFE.match(c)
    ]
    assert len(points) > 20_000
    for c in points:
        text = f"a{c}b {c}1{c}. {c}{c}\n{c} '{c}"
        if byte_level_bpe._WORDS.findall(text) != library_words(text):
            raise AssertionError(f"U+{ord(c):04X} {c!r}: {byte_level_bpe._WORDS.findall(text)} {library_words(text)}")


def test_fast_words_are_the_library_words_on_random_text():
    draw = random.Random(1)
    alphabet = list("ab XY  \n\n\t'stre.,-09é東、‘—\r\v")
    for _ in range(3000):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 30)))
        assert byte_level_bpe._WORDS.findall(text) == library_words(text)


def test_cutting_text_into_segments_changes_no_word():
    draw = random.Random(2)
    alphabet = list("ab \n\n\n\t'.\x1c\x85\u00a0\u3000é")
    for _ in range(2000):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 40)))
        parts = list(byte_level_bpe._segments(text, 1))
        assert "".join(parts) == text
        assert [w for p in parts for w in library_words(p)] == library_words(text)


@pytest.fixture(scope="module")
def gpt2(data_folder):
    return load_gpt2(data_folder / "gpt2_bpe", ("eot",))


def test_gpt2_ids_are_the_published_ones(gpt2):
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    wanted = [15496, 995, 11, 41492, 10545, 251, 109, 12859, 105, 0]
    assert gpt2.encode("Hello world, naïve 東京!").tolist() == wanted
    assert gpt2.vocab_size == 50257 and gpt2.eot == 50256
    assert 50256 not in gpt2.encode("<|endoftext|>")


def test_gpt2_further_specials_come_after_its_vocabulary(data_folder):
    tokenizer = load_gpt2(data_folder / "gpt2_bpe", SPECIALS)
    assert tokenizer.specials == {"eot": 50256, "mask": 50257, "sep": 50258, "cls": 50259}
    assert tokenizer.vocab_size == 50260


def test_gpt2_ids_are_the_library_ids_and_lossless_on_real_text(gpt2, data_folder, prose):
    with lzma.open(data_folder / "lm" / "novels_en_valid.jsonl.xz", "rt", encoding="utf-8") as file:
        novel = json.loads(file.readline())["text"][:400_000]
    with lzma.open(data_folder / "lm" / "novel_zh_hongloumeng.txt.xz", "rt", encoding="utf-8") as file:
        chinese = file.read(30_000)
    with lzma.open(data_folder / "lm" / "tinyshakespeare.txt.xz", "rt", encoding="utf-8") as file:
        plays = file.read(200_000)
    for text in [novel, chinese, plays, *prose[:300], *HARD, *random_texts(300)]:
        ids = gpt2.encode(text)
        assert ids.tolist() == gpt2._library.encode(text).ids
        assert gpt2.decode(ids) == text


def test_gpt2_saves_and_loads(gpt2, tmp_path):
    gpt2.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.hash == gpt2.hash and again.encode("hello world").tolist() == [31373, 995]


def test_gpt2_files_that_are_missing_or_something_else_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no encoder\.json or vocab\.json"):
        load_gpt2(tmp_path)
    (tmp_path / "encoder.json").write_text('{"a": 0, "b": 1}')
    with pytest.raises(UserError, match=r"no vocab\.bpe or merges\.txt"):
        load_gpt2(tmp_path)
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nx y\n")
    with pytest.raises(UserError, match="are not a byte-level BPE") as error:
        load_gpt2(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "unigram", "bpe", "gpt2"])
def test_whole_corpora_come_back(kind, data_folder):
    """The English validation novels, the Chinese novel and the library's source, entire."""
    corpora = {
        "novels": [t for _, t in iter_documents(path=str(data_folder / "lm" / "novels_en_valid.jsonl.xz"))],
        "chinese": [t for _, t in iter_documents(path=str(data_folder / "lm" / "novel_zh_hongloumeng.txt.xz"))],
        "source": [t for _, t in iter_documents("python_source")],
    }
    for texts in corpora.values():
        if kind == "gpt2":
            tokenizer = load_gpt2(data_folder / "gpt2_bpe")
        elif kind == "char":
            tokenizer = train_char(texts, 100, (), "bytes")
        else:
            tokenizer = train_sentencepiece([t[:200_000] for t in texts[:20]], kind, 2000)
        for text in texts:
            assert tokenizer.decode(tokenizer.encode(text)) == text


# -- tokenizer.json ------------------------------------------------------------------------------------------------


def test_hugging_face_ids_are_the_library_ids(trained, prose):
    tokenizer = trained["hf"]
    library = tokenizers.Tokenizer.from_str(tokenizer._text)
    for text in prose[:30]:
        assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.specials["eot"] == library.token_to_id("<|endoftext|>")
    assert tokenizer.vocab_size == library.get_vocab_size() + 3


def test_hugging_face_word_pieces_decode_as_the_library_does():
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "[SEP]", "hello", "wor", "##ld", "!"])}
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    library.decoder = tokenizers.decoders.WordPiece()
    tokenizer = HuggingFaceTokenizer(library.to_str(), ("eot",))
    assert not tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode("hello world!")) == "hello world!"
    assert tokenizer.eot == 1 and tokenizer.vocab_size == 6
    ids, draw = tokenizer.encode("hello world!"), np.random.default_rng(0)
    for row in (ids, *draw.integers(2, 6, (20, 9))):
        stream = tokenizer.stream()
        assert "".join([stream.push(i) for i in row]) + stream.flush() == tokenizer.decode(row)
    stream = tokenizer.stream(before=ids[:1])
    assert [stream.push(i) for i in ids[1:]] == [" wor", "ld", "!"]


def test_hugging_face_file_that_is_something_else_is_refused():
    with pytest.raises(UserError, match=r"not a tokenizer\.json") as error:
        HuggingFaceTokenizer('{"model": 3}')
    assert not re.search("\n", str(error.value))
