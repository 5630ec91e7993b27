"""Sentencepiece tokenizers (unigram and BPE), made lossless.

Sentencepiece writes a space as U+2581, so a U+2581 of the text would come back as a space; it drops training sentences
that hold U+2581, U+2585 or a tab, and reads a line break as the end of a sentence. So text is rewritten one to one
before it: line breaks and tabs become two private characters (and can then be part of pieces), and the few characters
that would collide are spelled as byte tokens beside it. Its <unk> is never produced and has no id here.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import UserError

_NEWLINE, _TAB = "\ue00a", "\ue009"
_RESERVED = re.compile(f"[\0\u2581\u2585{_NEWLINE}{_TAB}]+")
_MODEL = "model.spm"
_THREADS = 4  # of training: the EM sums depend on their number, so it is fixed
_SAMPLE_BYTES = 16 << 20
_SENTENCE_CHARACTERS = 1000
_MIN_COUNT = 5  # a character seen less often is spelled in bytes: its piece would never earn its row


class SentencePieceTokenizer(Tokenizer):
    """A trained sentencepiece model; ids 0-255 are the bytes.

    Args:
      model: the serialized model, with byte fallback and identity normalisation.
      kind: 'unigram' or 'bpe'.
      specials: names of the special tokens.
    """

    def __init__(self, model: bytes, kind: str, specials: Sequence[str] = ()):
        import sentencepiece

        self.kind, self._model = kind, model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        pieces = self._processor
        if pieces.unk_id() != 0 or not all(pieces.is_byte(1 + i) for i in range(256)):
            raise UserError("a sentencepiece model needs <unk> as piece 0 and the 256 byte pieces after it.")
        super().__init__(pieces.get_piece_size() - 1, specials)
        # One that training never saw has no piece: then the break itself goes in, and comes out as its byte.
        self._rewritten = [(a, b) for a, b in (("\n", _NEWLINE), ("\t", _TAB)) if pieces.piece_to_id(b) != 0]

    def _encode(self, text: str) -> np.ndarray:
        if not _RESERVED.search(text):
            return self._encode_plain(text)
        out, start = [], 0
        for match in _RESERVED.finditer(text):
            out.append(self._encode_plain(text[start : match.start()]))
            out.append(np.frombuffer(match.group().encode("utf-8"), np.uint8).astype(np.int32))
            start = match.end()
        out.append(self._encode_plain(text[start:]))
        return np.concatenate(out)

    def _encode_plain(self, text: str) -> np.ndarray:
        for character, stand_in in self._rewritten:
            text = text.replace(character, stand_in)
        return np.array(self._processor.encode(text), np.int32) - 1

    def _ordinary_bytes(self) -> list[bytes]:
        table = [bytes([i]) for i in range(256)]
        for i in range(257, self.ordinary + 1):
            piece = self._processor.id_to_piece(i)
            table.append(piece.replace("\u2581", " ").replace(_NEWLINE, "\n").replace(_TAB, "\t").encode("utf-8"))
        return table

    def fallback_ids(self) -> list[int]:
        return list(range(256))

    def _files(self):
        return {_MODEL: self._model}

    @classmethod
    def _load(cls, config: Any, folder):
        return cls((folder / _MODEL).read_bytes(), config["kind"], config["specials"])


def train_sentencepiece(
    texts: Iterable[str], kind: str, vocab_size: int, specials: Sequence[str] = ()
) -> SentencePieceTokenizer:
    """Trains a tokenizer on texts; deterministic, whatever the number of cores.

    Args:
      texts: documents; the first 16 MB are used.
      kind: 'unigram' or 'bpe'.
      vocab_size: tokens in all, the 256 bytes and the specials included; fewer if the text does not yield so many.
      specials: names of the special tokens.

    Raises:
      UserError: vocab_size leaves no room for pieces beside bytes and specials, or the text is too small.
    """
    import sentencepiece

    room = vocab_size - 256 - len(specials)
    if room < 16:
        raise UserError(
            f"data.tokenizer.vocab_size is {vocab_size}; {kind} needs at least {256 + len(specials) + 16} "
            f"(256 bytes, {len(specials)} specials, some pieces)."
        )
    sample = _sample(texts, _SAMPLE_BYTES)
    counts: Counter[str] = Counter()
    for text in sample:
        counts.update(text)
    frequent = sorted((c for c, n in counts.items() if n >= _MIN_COUNT), key=lambda c: (-counts[c], c))
    kept = {c for c in frequent if not _RESERVED.match(c)}
    if len(kept) > room // 2:
        kept = set([c for c in frequent if c in kept][: room // 2])
    if not kept:
        raise UserError(f"the text is too small to train a {kind} tokenizer on; use kind 'byte' or 'char'.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(sample, kept),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size - len(specials) + 1,  # + its <unk>
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            character_coverage=1.0,
            hard_vocab_limit=False,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[-200:]
        raise UserError(f"cannot train a {kind} tokenizer of {vocab_size} tokens on this text ({reason}).") from None
    return SentencePieceTokenizer(model.getvalue(), kind, specials)


def _sample(texts: Iterable[str], limit: int) -> list[str]:
    sample, size = [], 0
    for text in texts:
        sample.append(text[: limit - size])
        size += len(text.encode("utf-8"))
        if size >= limit:
            break
    return sample


def _sentences(texts: Iterable[str], kept: set[str]) -> Iterator[str]:
    """Yields runs of kept characters, cut after line breaks that end a line of text."""
    rare = re.compile("[^" + re.escape("".join(sorted(kept))) + "]+")
    for text in texts:
        for run in rare.split(text):
            for line in re.split(r"(?<=\n)(?=[^\n])", run):
                line = line.replace("\n", _NEWLINE).replace("\t", _TAB)
                for start in range(0, len(line), _SENTENCE_CHARACTERS):
                    yield line[start : start + _SENTENCE_CHARACTERS]
