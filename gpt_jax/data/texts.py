"""The texts that a data config names, and how each is split."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gpt_jax.data.corpora import Corpus, open_corpus
from gpt_jax.data.readers import Document, Progress
from gpt_jax.data.splits import splitter
from gpt_jax.errors import UserError, choose, nearest

Log = Callable[[str], None]
_KEYS = ("name", "weight", "corpus", "path", "valid_path", "valid_fraction", "split", "text_key")


@dataclasses.dataclass(frozen=True)
class Text:
    """One text of the config: `data` itself, or an entry of data.sources laid over it."""

    name: str
    weight: float
    corpus: str
    path: str
    valid_path: str
    valid_fraction: float
    split: str
    text_key: str

    @property
    def label(self) -> str:
        return self.path or self.corpus


def texts_of(data: Any) -> list[Text]:
    """Returns the texts that a config names; checks the entries of data.sources."""
    own = {k: getattr(data, k) for k in _KEYS if k not in ("name", "weight")}
    if not data.sources:
        return [_text({"name": "data", "weight": 1.0, **own})]
    texts = []
    for entry in data.sources:
        if not isinstance(entry, Mapping):
            raise UserError(f"data.sources has {entry!r}; each is a table: {{'name': 'a', 'weight': 1, 'path': ...}}.")
        for key in entry:
            if key not in _KEYS:
                raise UserError(f"data.sources has key {key!r}{nearest(key, _KEYS)}; allowed: {', '.join(_KEYS)}.")
        for key in ("name", "weight"):
            if key not in entry:
                raise UserError(f"an entry of data.sources has no {key!r}: {dict(entry)}.")
        for key, value in entry.items():
            kind, said = ((int, float), "a number") if key in ("weight", "valid_fraction") else (str, "text")
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{key!r} of an entry of data.sources is {value!r}; it takes {said}.")
        where = {"corpus": entry.get("corpus", ""), "path": entry.get("path", ""), "valid_path": ""}
        if bool(where["corpus"]) == bool(where["path"]):
            raise UserError(f"source {entry['name']!r} of data.sources needs either 'corpus' or 'path'.")
        texts.append(_text({**own, **where, **entry}))
    names = [t.name for t in texts]
    if len(set(names)) < len(names) or any("/" in n or n in ("train", "valid", "") for n in names):
        raise UserError(f"data.sources needs different names without '/', not 'train' or 'valid'; it has {names}.")
    return texts


def _text(values: Mapping[str, Any]) -> Text:
    text = Text(**values)
    choose("data.split", text.split, ("document", "tail"))
    if not 0 <= text.valid_fraction < 1:
        raise UserError(f"data.valid_fraction is {text.valid_fraction}; it must be at least 0 and below 1.")
    return text


class Corpora:
    """The corpora of a text (training, and validation if it has files of its own) and how they are split."""

    def __init__(self, text: Text, root: pathlib.Path):
        self._text = text
        memo = root / "corpora"
        self._train = open_corpus(text.corpus, text.path, text.text_key, memo)
        self._valid: Corpus | None = None
        if text.valid_path:
            self._valid = open_corpus("files", text.valid_path, text.text_key, memo)
        self.identity: dict[str, Any] = {"corpus": self._train.fingerprint}
        if self._valid is not None:
            self.identity["valid_corpus"] = self._valid.fingerprint
        else:
            self.identity |= {"split": text.split, "valid_fraction": text.valid_fraction}

    def split_documents(self, progress: Progress | None = None, say: Log | None = None) -> Iterator[tuple[str, str]]:
        """Yields (split, text) in the order of the corpus."""
        progress = progress or Progress()
        if self._valid is not None:
            for _, text in self._train.documents(progress):
                yield "train", text
            for _, text in self._valid.documents(progress):
                yield "valid", text
            return

        def documents() -> Iterator[Document]:
            return self._train.documents()

        stream = self._train.documents(progress)
        yield from splitter(documents, stream, self._text.split, self._text.valid_fraction, say)

    def training_texts(self) -> Iterator[str]:
        return (text for split, text in self.split_documents() if split == "train")
