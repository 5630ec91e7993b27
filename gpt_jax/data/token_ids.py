"""Token ids as text, for a model whose tokenizer is not there: '15496 995' is two tokens, and so is what comes out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import UserError


class IdsTokenizer(Tokenizer):
    """Reads and writes ids, separated by white space.

    Args:
      size: tokens of the vocabulary.
      specials: names of the special tokens; `eot` is `end`.
      end: id of the token that ends a text, if known.
    """

    kind = "ids"

    def __init__(self, size: int, specials: Sequence[str] = (), end: int | None = None):
        super().__init__(size, specials, {} if end is None else {"eot": end})
        self.end = end

    @property
    def lossless(self) -> bool:
        return False

    @property
    def begin(self) -> list[int]:
        return []  # whoever writes ids writes them all

    def _encode(self, text: str) -> np.ndarray:
        words = text.split()
        for word in words:
            if not (word.isdecimal() and word.isascii() and int(word) < self.vocab_size):
                raise UserError(
                    f"{word!r} is not a token id below {self.vocab_size}: this model came without a tokenizer, so a "
                    "text is ids separated by spaces, like '15 7 42'."
                )
        return np.array([int(word) for word in words], np.int32)

    def _ordinary_bytes(self) -> list[bytes]:
        return [b"%d " % i for i in range(self.ordinary)]

    def _config(self):
        return {"size": self.ordinary, "end": self.end}

    @classmethod
    def _load(cls, config, folder):
        return cls(config["size"], config["specials"], config["end"])
