"""Unlabelled text from a language model: documents with provenance, as a token store that pre-training mixes in."""

from __future__ import annotations

import json
import pathlib
import random
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.augment.base import Synthetic, normalise
from gpt_jax.augment.filters import PerplexityBand
from gpt_jax.data.build import build_store
from gpt_jax.data.cache import content_hash
from gpt_jax.data.store import is_store, open_store
from gpt_jax.errors import UserError
from gpt_jax.files import atomic_write
from gpt_jax.generation import generate
from gpt_jax.loading import Loaded


def generate_documents(
    run: Loaded,
    count: int,
    *,
    max_tokens: int,
    prompts: Sequence[str] = (),
    prompt_words: int = 5,
    temperature: float = 1.0,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[str]:
    """Returns texts that a causal language model writes, those that are the same once.

    Args:
      prompts: texts whose first `prompt_words` words begin a document, drawn anew for each; none: from nothing.
    """
    tokenizer, rng = run.tokenizer, random.Random(seed)
    if tokenizer.eot is None:
        raise UserError("the tokenizer of the run has no 'eot' for documents to begin with.")
    begun = [" ".join(rng.choice(prompts).split()[:prompt_words]) if prompts else "" for _ in range(count)]
    ids = [[tokenizer.eot, *tokenizer.encode(text).tolist()] for text in begun]
    new = generate(
        run.model,
        run.params,
        ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        eot=tokenizer.eot,
        seeds=[rng.getrandbits(32) for _ in ids],
    )
    texts = [begin + tokenizer.decode(row) for begin, row in zip(begun, new, strict=True)]
    return list({normalise(text): text for text in texts if normalise(text)}.values())


def in_band(texts: Sequence[str], band: PerplexityBand) -> list[str]:
    """Returns the texts whose perplexity under the reference lies in the band."""
    return [c.text for c in band.keep([Synthetic("", text) for text in texts])]


def check_out(out: pathlib.Path) -> None:
    """Raises UserError where a folder already holds a `store` that is no generated text: it is not ours to replace."""
    store = out / "store"
    ours = is_store(store) and open_store(store).manifest["corpus"].get("corpus") == "generated"
    if store.exists() and not ours:
        raise UserError(f"--out {str(out)!r} holds a 'store' that is no generated text; give another folder.")


def write_corpus(texts: Sequence[str], run: Loaded, out: pathlib.Path, provenance: Mapping[str, Any]) -> pathlib.Path:
    """Writes `generated.jsonl` and the token store `store`, whose manifest names where it comes from; returns it.

    A config mixes it in as a source, {'name': 'generated', 'weight': 1, 'path': 'OUT/store'}, or alone as data.path.
    """
    check_out(out)
    if not texts:
        raise UserError("no generated document is left to store: filter less or generate more (--documents).")
    rows = [{"text": text, "provenance": dict(provenance)} for text in texts]
    atomic_write(out / "generated.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    fingerprint = {"corpus": "generated", **provenance, "documents": len(texts), "sha256": content_hash(list(texts))}
    shutil.rmtree(out / "store", ignore_errors=True)  # of what was generated before
    build_store((("train", text) for text in texts), run.tokenizer, out / "store", workers=1, fingerprint=fingerprint)
    return out / "store"
