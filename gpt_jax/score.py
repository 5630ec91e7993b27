"""Scoring: log-likelihoods of continuations and of whole texts, batched by length and sharded over the mesh.

Requests are sorted by length and laid out, right-padded, in batches of few shapes: lengths are rounded up to 2^i or
3 * 2^i and the rows of a batch follow from its length, so a benchmark of thousands of items compiles a handful of
programs. Logits are computed where a continuation is, not for its context.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt_jax.errors import UserError, choose
from gpt_jax.generation import bucket
from gpt_jax.losses import cross_entropy
from gpt_jax.model import Transformer
from gpt_jax.model.config import LACKS
from gpt_jax.sharding import DEFAULT_RULES, Rules, param_shardings

NORMALISATIONS = ("sum", "token", "byte", "unconditional")
BOUNDARIES = ("joint", "separate")
OVERFLOWS = ("left", "error")

_BATCH_TOKENS = 8192  # of a batch, on each device
_LOGIT_BYTES = 1 << 28  # of the logits held at once, on each device

Pair = tuple[list[int], list[int]]


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one continuation.

    Attributes:
      logprobs: log-probability of each of its tokens, nats. greedy: whether each is the most likely one.
      bytes: of its text without one space before it, as lm-evaluation-harness counts; 0 where only ids are known.
    """

    logprobs: np.ndarray
    greedy: bool
    bytes: int = 0

    @property
    def total(self) -> float:
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def tokens(self) -> int:
        return len(self.logprobs)


def normalise(score: Score, how: str, unconditional: Score | None = None) -> float:
    """Returns the number by which continuations are compared.

    Args:
      how: 'sum' (log-probability), 'token' (its mean over tokens; GPT-3's default), 'byte' (over bytes of UTF-8) or
        'unconditional' (log P(continuation | context) / P(continuation | unconditional context); GPT-3, section 2.4).
      unconditional: the score of the same continuation after the unconditional context.
    """
    choose("normalise", how, NORMALISATIONS)
    if how == "unconditional":
        return score.total - unconditional.total
    return score.total / {"sum": 1, "token": score.tokens, "byte": max(1, score.bytes)}[how]


def split_pair(tokenizer: Any, context: str, continuation: str, boundary: str = "joint") -> Pair:
    """Returns the ids of a context and of what follows it; no 'eot' is added.

    Args:
      boundary: 'joint' encodes both as one text and cuts it at the last token that the context alone begins with too: a
        token across the boundary belongs to the continuation, as does white space at the context's end. 'separate'
        encodes each by itself: the cut is exact, but the tokens may be others than those of the text.
    """
    choose("boundary", boundary, BOUNDARIES)
    if not continuation:
        raise UserError("a continuation is empty: there is nothing to score.")
    if boundary == "separate":
        return tokenizer.encode(context).tolist(), tokenizer.encode(continuation).tolist()
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    alone, whole = tokenizer.encode(stripped).tolist(), tokenizer.encode(stripped + continuation).tolist()
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(alone, whole[:-1], strict=False))
    common = sum(1 for _ in shared)  # never all of them: at least one token is scored
    return whole[:common], whole[common:]


def rolling_windows(ids: Sequence[int], begin: int, length: int, stride: int = 0) -> list[Pair]:
    """Cuts a text into (context, continuation) pairs that score each token exactly once.

    Args:
      ids: of the text; the first token is predicted after the id `begin`. length: tokens that the model reads at once.
      stride: new tokens of each window after the first; 0 is `length` (disjoint windows). The last window's context
        reaches as far back as `length` allows, as in lm-evaluation-harness.
    """
    stride = stride or length
    if not 1 <= stride <= length:
        raise UserError(f"stride is {stride}; it must be between 1 and the {length} tokens of a window.")
    ids = list(ids)
    pairs, done = ([([begin], ids[:length])] if ids else []), length
    while done < len(ids):
        new = min(stride, len(ids) - done)
        pairs.append((ids[done - (length - new + 1) : done], ids[done : done + new]))
        done += new
    return pairs


class Scorer:
    """Scores continuations of contexts under a model.

    Args:
      model, params: the parameters of the model's own root; placed on `mesh` if one is given.
      tokenizer: of the model; None where only ids are scored.
      mesh, rules: what batches (and parameters, if they are not yet) are sharded over; None: where the parameters are.
      max_length: tokens that the model reads at once; 0 is `model.config.max_positions`.
      overflow: 'left' cuts the beginning of a context that is too long, 'error' refuses it.
      boundary: see `split_pair`.

    Attributes:
      begin: the ids that a context begins with, as documents do in training ('eot', if the tokenizer has it). eot: the
        id that ends a text, or None. cut: how many contexts have been cut so far.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        tokenizer: Any = None,
        *,
        mesh: Mesh | None = None,
        rules: Rules = DEFAULT_RULES,
        max_length: int = 0,
        overflow: str = "left",
        boundary: str = "joint",
    ) -> None:
        choose("overflow", overflow, OVERFLOWS)
        choose("boundary", boundary, BOUNDARIES)
        config = model.config
        self.max_length = max_length or config.max_positions
        if self.max_length < 1 or (config.positions == "learned" and self.max_length > config.max_positions):
            raise UserError(
                f"max_length is {self.max_length}; the model has {config.max_positions} positions, and at least one "
                "token must be read."
            )
        self.model, self.tokenizer = for_any_length(model), tokenizer
        self.mesh, self.rules = mesh, tuple(tuple(rule) for rule in rules)
        self.params = shard_params(model, params, mesh, rules) if mesh is not None else params
        self.overflow, self.boundary, self.cut = overflow, boundary, 0
        self.eot = None if tokenizer is None else tokenizer.eot
        self.begin = [] if tokenizer is None else tokenizer.begin

    def score(self, pairs: Iterable[tuple[str, str]]) -> list[Score]:
        """Scores (context, continuation) texts; a context begins with 'eot', as documents do in training.

        Raises:
          UserError: an empty continuation; one longer than the model's context; an empty context without an 'eot'; with
            overflow='error' what does not fit.
        """
        pairs = list(pairs)
        scores = self._score_fitted(self.fit(pairs))
        sizes = [len(continuation.removeprefix(" ").encode("utf-8")) for _, continuation in pairs]
        return [dataclasses.replace(score, bytes=size) for score, size in zip(scores, sizes, strict=True)]

    def rolling(self, texts: Iterable[str], stride: int = 0) -> list[Score]:
        """Scores whole texts, each token once: see `rolling_windows`. An empty text has no tokens and scores 0."""
        texts = list(texts)
        if not self.begin:
            raise UserError("a whole text is scored after an 'eot', which the tokenizer does not have.")
        before, length = self.begin[-1], self.max_length
        found = [rolling_windows(self.tokenizer.encode(t).tolist(), before, length, stride) for t in texts]
        scores = iter(self.score_ids([pair for windows in found for pair in windows]))
        out = []
        for text, windows in zip(texts, found, strict=True):
            parts = [next(scores) for _ in windows]
            logprobs = np.concatenate([part.logprobs for part in parts]) if parts else np.zeros(0, np.float32)
            out.append(Score(logprobs, all(part.greedy for part in parts), len(text.encode("utf-8"))))
        return out

    def score_ids(self, pairs: Sequence[Pair]) -> list[Score]:
        """Scores continuations given as ids; nothing is added to a context."""
        return self._score_fitted([self._fit(list(context), list(continuation)) for context, continuation in pairs])

    def fit(self, pairs: Iterable[tuple[str, str]]) -> list[Pair]:
        """Returns the ids that `score` scores of (context, continuation) texts; raises what it raises."""
        ids = [split_pair(self.tokenizer, *pair, boundary=self.boundary) for pair in pairs]
        return [self._fit(self.begin + context, continuation) for context, continuation in ids]

    def _score_fitted(self, fitted: Sequence[Pair]) -> list[Score]:
        out: list[Score | None] = [None] * len(fitted)
        for rows, shape in self._batches(fitted):
            logprobs, hits = self._run([fitted[row] for row in rows], *shape)
            for row, values, right in zip(rows, logprobs, hits, strict=False):
                n = len(fitted[row][1])
                out[row] = Score(values[:n].copy(), bool(right[:n].all()))
        return out

    def _fit(self, context: list[int], continuation: list[int]) -> Pair:
        """Cuts the beginning of a context so that what the model reads (all but the last token) fits."""
        if not context:
            raise UserError("a context is empty, and the tokenizer has no 'eot' to begin with.")
        if not continuation:
            raise UserError("a continuation is empty: there is nothing to score.")
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation has {len(continuation)} tokens; the model reads {self.max_length} at once."
            )
        vocab_size = self.model.config.vocab_size
        if bad := [i for i in (*context, *continuation) if not 0 <= i < vocab_size]:
            raise UserError(f"token {bad[0]} is not in the model's vocabulary of {vocab_size}.")
        too_many = len(context) + len(continuation) - 1 - self.max_length
        if too_many <= 0:
            return context, continuation
        if self.overflow == "error":
            raise UserError(
                f"a context of {len(context)} tokens and its continuation of {len(continuation)} do not fit the "
                f"{self.max_length} that the model reads at once (overflow 'left' cuts the context's beginning)."
            )
        self.cut += 1
        return context[too_many:], continuation

    @property
    def _ways(self) -> int:
        """Devices that the rows of a batch are spread over."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[tuple[list[int], tuple[int, int, int]]]:
        """Yields (indices, (rows, tokens, scored tokens)) of each batch, longest first; it may hold shorter ones."""
        lengths = [len(context) + len(continuation) - 1 for context, continuation in pairs]
        order = sorted(range(len(pairs)), key=lambda row: (-lengths[row], row))
        at, ways = 0, self._ways
        while at < len(order):
            T = min(bucket(lengths[order[at]], least=16), self.max_length)
            most = max(1, _BATCH_TOKENS // T)
            rows = order[at : at + most * ways]
            # Fewer requests than one batch takes: as many rows as needed, rounded up.
            B = ways * (most if len(order) > most * ways else bucket(-(-len(rows) // ways)))
            C = min(bucket(max(len(pairs[row][1]) for row in rows), least=4), T)
            yield rows, (B, T, C)
            at += len(rows)

    def _run(self, pairs: Sequence[Pair], B: int, T: int, C: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, targets = np.zeros((B, T), np.int32), np.zeros((B, C), np.int32)
        starts = np.zeros(B, np.int32)
        for row, (context, continuation) in enumerate(pairs):
            ids = context + continuation
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(continuation)] = continuation
            starts[row] = len(context) - 1
        batch: Any = (tokens, starts, targets)
        if self.mesh is not None:
            place = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
            batch = tuple(jax.device_put(x, place) for x in batch)
        row_bytes = 4 * self.model.config.padded_vocab * (B // self._ways)
        width = next(w for w in range(C, 0, -1) if C % w == 0 and (w == 1 or w * row_bytes <= _LOGIT_BYTES))
        with self._context():
            return jax.device_get(_score(self.model, self.mesh, self.rules, width, self.params, *batch))

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        if self.mesh is None:
            yield
            return
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
            yield


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _score(
    model: Transformer,
    mesh: Mesh | None,
    rules: Rules,
    width: int,
    params: Any,
    tokens_BxT: Array,
    starts_B: Array,
    targets_BxC: Array,
) -> tuple[Array, Array]:
    """Log-probabilities [B, C] of the targets, the first after token `starts`, and whether each is the most likely.

    Args:
      rules: only so that a change of them compiles anew. width: columns of targets whose logits are held at once.
    """
    hidden, _ = model.apply({"params": params}, tokens_BxT, method="encode")
    B, C = targets_BxC.shape
    at_BxC = jnp.minimum(starts_B[:, None] + jnp.arange(C), tokens_BxT.shape[1] - 1)
    hidden_BxCxD = jnp.take_along_axis(hidden, at_BxC[..., None], axis=1)

    def piece(_: None, xs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        hidden_BxWxD, targets_BxW = xs
        logits = model.apply({"params": params}, hidden_BxWxD, method="unembed")
        return None, (-cross_entropy(logits, targets_BxW)[1], jnp.argmax(logits, axis=-1) == targets_BxW)

    pieces = tuple(
        jnp.moveaxis(x.reshape(B, C // width, width, *x.shape[2:]), 1, 0) for x in (hidden_BxCxD, targets_BxC)
    )
    _, out = lax.scan(piece, None, pieces)
    out = tuple(jnp.moveaxis(x, 0, 1).reshape(B, C) for x in out)
    if mesh is not None:
        out = lax.with_sharding_constraint(out, NamedSharding(mesh, PartitionSpec()))
    return out


def for_any_length(model: Transformer) -> Transformer:
    """The model with attention of whatever kind suits: what it was trained with may lack a text's length or device."""
    if model.config.attention not in LACKS:
        return model
    return model.clone(config=dataclasses.replace(model.config, attention="auto"))


def shard_params(model: Transformer, params: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Places a model's parameters on a mesh, by the logical axes that they name."""
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    if jax.process_count() > 1:  # what lies on one's own devices goes to those of all from the host alone
        params = jax.tree.map(lambda x: np.asarray(x) if x.is_fully_addressable else x, params)
    return jax.device_put(params, param_shardings(boxed, mesh, rules))
