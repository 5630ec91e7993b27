"""The tokenizer that a config asks for: an existing one, or one trained on the training texts and kept in the cache."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gpt_jax.data import cache
from gpt_jax.data.readers import expand_variables
from gpt_jax.data.store import is_store, open_store
from gpt_jax.data.texts import Corpora, Log, Text
from gpt_jax.data.tokenizer import CONFIG_FILE, ByteTokenizer, Tokenizer, load_tokenizer, train_char
from gpt_jax.errors import UserError, choose
from gpt_jax.remote import fetch_folder, is_url

KINDS = ("unigram", "bpe", "char", "byte", "gpt2", "hf")
_VERSION = 1  # of the training recipes: a change of them raises it, so that old results are not used


def open_tokenizer(
    config: Any, texts: Sequence[Text], corpora: Sequence[Corpora | None], root: pathlib.Path, say: Log
) -> Tokenizer:
    choose("data.tokenizer.kind", config.kind, KINDS)
    if config.path:
        return _truncated(existing_tokenizer(config), config, texts, corpora, root, say)
    for text in texts:
        if text.path and is_store(expand_variables(text.path)):
            return open_store(expand_variables(text.path)).load_tokenizer()
    if config.kind == "byte":
        return ByteTokenizer(config.specials)
    if config.kind in ("gpt2", "hf"):
        raise UserError(f"data.tokenizer.kind is {config.kind!r}: set data.tokenizer.path to its file or folder.")
    if any(c is None for c in corpora):
        raise UserError(
            f"data.path {texts[0].path!r} holds tokens; say which tokenizer made them by data.tokenizer.path "
            "(and data.tokenizer.kind)."
        )
    identity = [_VERSION, config.kind, config.vocab_size, list(config.specials), config.unknown]
    path = root / "tokenizers" / cache.content_hash([*identity, [c.identity for c in corpora]])

    def train(folder: pathlib.Path) -> None:
        names = ", ".join(t.label for t in texts)
        say(f"training a {config.kind} tokenizer on {names}")
        train_tokenizer(config, [c.training_texts() for c in corpora]).save(folder)

    whole = load_tokenizer(cache.build_folder(path, train, "the tokenizer", say))
    return _truncated(whole, config, texts, corpora, root, say)


def train_tokenizer(config: Any, texts: Sequence[Iterable[str]]) -> Tokenizer:
    """Trains a unigram, bpe or char tokenizer of a TokenizerConfig on texts (a mixture's are taken in turn)."""
    from gpt_jax.data.sentencepieces import train_sentencepiece

    merged = texts[0] if len(texts) == 1 else _in_turn(texts)
    if config.kind == "char":
        return train_char(merged, config.vocab_size, config.specials, config.unknown)
    return train_sentencepiece(merged, config.kind, config.vocab_size, config.specials)


def _in_turn(texts: Sequence[Iterable[str]]) -> Iterator[str]:
    for group in itertools.zip_longest(*texts):
        yield from (text for text in group if text is not None)


def existing_tokenizer(config: Any) -> Tokenizer:
    """The tokenizer at `config.path`, whole; raises UserError if there is none."""
    from gpt_jax.data.byte_level_bpe import HuggingFaceTokenizer, load_gpt2

    if is_url(config.path):
        path = fetch_folder(config.path, cache.cache_root())
    else:
        path = pathlib.Path(expand_variables(config.path))
    if not path.exists():
        raise UserError(f"data.tokenizer.path {str(path)!r}: no such file or folder.")
    if (path / CONFIG_FILE).is_file():
        return load_tokenizer(path)
    if config.kind == "gpt2":
        return load_gpt2(path, config.specials)
    if config.kind == "hf":
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"data.tokenizer.path {str(path)!r} has no tokenizer.json.")
        return HuggingFaceTokenizer(file.read_text(encoding="utf-8"), config.specials)
    raise UserError(
        f"data.tokenizer.path {str(path)!r} is not a saved tokenizer ({CONFIG_FILE} is missing); "
        "for GPT-2's files set data.tokenizer.kind='gpt2', for a tokenizer.json 'hf'."
    )


def _truncated(
    tokenizer: Tokenizer,
    config: Any,
    texts: Sequence[Text],
    corpora: Sequence[Corpora | None],
    root: pathlib.Path,
    say: Log,
) -> Tokenizer:
    """Returns the tokenizer cut to its `config.keep` most frequent tokens on the training text."""
    from gpt_jax.data.vocabulary import count_tokens, truncate

    if not config.keep:
        return tokenizer
    if any(c is None for c in corpora):
        raise UserError("data.tokenizer.keep needs text to count; data.path holds tokens.")
    identity = [_VERSION, tokenizer.hash, config.keep, list(config.specials), config.unknown]
    path = root / "tokenizers" / cache.content_hash([*identity, [c.identity for c in corpora]])

    def cut(folder: pathlib.Path) -> None:
        say(f"counting the tokens of {', '.join(t.label for t in texts)} to keep the {config.keep} most frequent")
        merged = _in_turn([c.training_texts() for c in corpora])
        counts = count_tokens(tokenizer, merged)
        truncate(tokenizer, counts, config.keep, config.specials, config.unknown).save(folder)

    return load_tokenizer(cache.build_folder(path, cut, "the tokenizer", say))
