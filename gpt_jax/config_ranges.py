"""Which values the keys of a config may have. What goes together with what is checked by those who use it."""

from __future__ import annotations

import math
import operator
from typing import Any

from gpt_jax.errors import UserError, choose

WEIGHTS = ("auto", "raw", "ema", "average")
LAYOUTS = {  # of plain text, by the names that `data.layout` takes
    "packed": "documents run on across rows",
    "padded": "a document per row",
    "bins": "whole documents packed into rows",
}

_LEAST: tuple[tuple[str, int], ...] = (
    ("steps", 1),
    ("batch_size", 1),
    ("context_length", 1),
    ("microbatches", 1),
    ("log.every_steps", 1),
    ("log.console_every_steps", 1),
    ("eval.every_steps", 0),
    ("eval.max_batches", 0),
    ("eval.task_limit", 0),
    ("eval.task_shots", 0),
    ("sample.every_steps", 0),
    ("sample.max_tokens", 1),
    ("sample.temperature", 0),
    ("sample.top_k", 0),
    ("checkpoint.every_steps", 0),
    ("checkpoint.every_minutes", 0),
    ("checkpoint.keep_last", 1),
    ("checkpoint.keep_best", 0),
    ("checkpoint.keep_every_steps", 0),
    ("data.prefetch", 1),
    ("data.workers", 0),
    ("data.tokenizer.vocab_size", 0),
    ("data.tokenizer.keep", 0),
    ("optimizer.max_skipped", 0),
    ("distributed.devices", 0),
    ("distributed.join_seconds", 1),
    ("distributed.heartbeat_seconds", 1),
)


def check_ranges(config: Any) -> None:
    """Raises UserError for the first key of a Config whose value is out of range."""

    def value(key: str) -> Any:
        return operator.attrgetter(key)(config)

    def check(key: str, fits: bool, allowed: str) -> None:
        if not fits:
            raise UserError(f"{key} is {value(key)}; it must be {allowed}.")

    for key, least in _LEAST:
        check(key, value(key) >= least, f"at least {least}")
    check("seed", -(2**63) <= config.seed < 2**63, "a whole number of 64 bits with its sign")
    optimizer = config.optimizer
    check("optimizer.learning_rate", math.isfinite(optimizer.learning_rate), "a finite number")
    check("optimizer.b1", 0 <= optimizer.b1 < 1, "at least 0 and below 1")
    check("optimizer.b2", 0 <= optimizer.b2 < 1, "at least 0 and below 1")
    check("optimizer.clip_norm", optimizer.clip_norm >= 0, "above 0, or 0 (off)")
    check("optimizer.ema", 0 <= optimizer.ema < 1, "at least 0 (off) and below 1")
    check("sample.top_p", 0 <= config.sample.top_p <= 1, "between 0 and 1")
    choose("eval.weights", config.eval.weights, WEIGHTS)
    for pair in config.batch_schedule:
        sizes = pair[1] if isinstance(pair, tuple) and len(pair) == 2 else ()
        sizes = sizes if isinstance(sizes, tuple) else (sizes,)
        if not sizes or not all(type(size) is int for size in sizes):
            raise UserError(
                f"batch_schedule has {pair!r}; each is (until, sequences) or (until, (from, to)), like ('375Mtok', 32)."
            )
    for pair in config.data.skip:
        whole = isinstance(pair, tuple) and len(pair) == 2 and all(type(end) is int for end in pair)
        if not whole or not 0 <= pair[0] < pair[1]:
            raise UserError(f"data.skip has {pair}; it is a list of ranges [(from, to), ...] with 0 <= from < to.")
