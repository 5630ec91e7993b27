"""Splitting a corpus into training and validation text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

from gpt_jax.data.readers import Document
from gpt_jax.errors import UserError

# With fewer documents than this times 1 / fraction, a split by document would hold out none or too few to be fair.
_FEWEST = 2


def held_out(text: str, fraction: float) -> bool:
    """Tells whether a document belongs to the validation split: by its own hash, so that equal texts stay together."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def splitter(
    documents: Callable[[], Iterable[Document]],
    stream: Iterable[Document],
    split: str,
    fraction: float,
    say: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, str]]:
    """Yields (split, text) of the documents.

    Args:
      documents: gives the documents again, for what must be known before the first is yielded.
      stream: the same documents.
      split: 'document' holds out whole documents by hash; a corpus of fewer than 2 / fraction of them, or of which the
        hash holds out none, is split by 'tail', and says so. 'tail' holds out the last part of the text: the first
        int(characters * (1 - fraction)) are training text, and a document that lies across is cut.
      fraction: held out; 0 holds out nothing.
      say: takes a line for people.
    """
    if fraction == 0:
        for _, text in stream:
            yield "train", text
        return
    if split == "document":
        needed = int(_FEWEST / fraction)
        count, some = 0, False
        for _, text in documents():
            count, some = count + 1, some or held_out(text, fraction)
            if count >= needed and some:
                break
        if count >= needed and some:
            for _, text in stream:
                yield "valid" if held_out(text, fraction) else "train", text
            return
        if say:
            what = f"{count} document{'s' * (count > 1)}"
            say(f"{what}: too few to hold out whole ones, so the last {fraction:.0%} of the text is held out")
    left = int(sum(len(text) for _, text in documents()) * (1 - fraction))
    if left == 0:
        raise UserError(f"the corpus is too small to hold out {fraction:.0%} of it.")
    for _, text in stream:
        train, valid = text[:left], text[left:]
        left -= len(train)
        if train:
            yield "train", train
        if valid:
            yield "valid", valid
