"""Denoising: give back what was cut out of a text. T5's span corruption, prefix LM and UL2's mixture, on one stack.

A row is the inputs and then the targets, one sequence of which only the targets are trained on:

    r, x   [mode] the text, each cut-out span a sentinel, sep | sentinel_0 span sentinel_1 span ... eot
    s      [mode] the text up to a point                      | the text from there on

Tokens before the bar see each other (mask='prefix', as in prefix LM and UL2) or only what precedes them ('causal'). The
first target is predicted at the last input. Every span of r and x has at least one token and no two touch, so the text
can be put together again (`reassemble`).

How much text a row takes is T5's rule turned to one sequence: its counts of noise tokens and spans, and the longest
text whose corrupted form fits `context_length`. One denoiser so fills every row. Several share the shortest of their
texts; the rows of the others end in padding (UL2 does the same).

Recipes: t5 is (3, .15) (Raffel et al. 2020); prefix_lm cuts at a uniform point; ul2 is r (3, .15), (8, .15),
s .25 and x (3, .5), (8, .5), (64, .15), (64, .5), seven in equal parts (Tay et al. 2023). Other weights: `denoisers`.
The spans are uniform over all ways to place them, where T5's code puts the last one always at the end of the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.data.formats import TextRows
from gpt_jax.errors import UserError, choose
from gpt_jax.losses import cross_entropy
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import Batch, Host, Objective, Params, Setting, check_options, text_spec
from gpt_jax.options import is_number, option

MODES = ("r", "s", "x")
RECIPES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "t5": (("r", 3, 0.15),),
    "prefix_lm": (("s", 0, 0.5),),
    "ul2": (
        ("r", 3, 0.15),
        ("r", 8, 0.15),
        ("s", 0, 0.25),
        ("x", 3, 0.5),
        ("x", 8, 0.5),
        ("x", 64, 0.15),
        ("x", 64, 0.5),
    ),
}


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to corrupt.

    Attributes:
      mode: 'r' (regular) and 'x' (extreme) cut spans out; 's' (sequential) cuts the end off.
      mean_span: tokens of a span in the mean; unused by s.
      rate: part of the text that becomes targets; by s, in the mean: its cut is uniform with that mean.
      weight: of the denoiser in a mixture.
    """

    mode: str
    mean_span: float
    rate: float
    weight: float = 1.0

    def __post_init__(self) -> None:
        choose("the mode of a denoiser", self.mode, MODES)
        numbers = all(map(is_number, (self.mean_span, self.rate, self.weight)))
        if not (numbers and 0 < self.rate < 1 and self.weight > 0 and (self.mode == "s" or self.mean_span >= 1)):
            raise UserError(
                f"objective.denoisers has {dataclasses.astuple(self)}; each is (mode, mean span, rate[, weight]) with "
                "a span of at least 1, a rate between 0 and 1 and a weight above 0."
            )
        if self.mode == "s" and self.rate > 0.5:
            raise UserError(f"objective.denoisers has an s with rate {self.rate}; a uniform cut has at most 0.5.")


def special_names(sentinels: int = 0, modes: bool = False) -> tuple[str, ...]:
    """Returns the special tokens that a tokenizer for denoising needs, for `data.tokenizer.specials`.

    Args:
      sentinels: how many different ones; at most `objective.sentinels` are used. modes: add the mode tokens.
    """
    names = ("eot", "sep", *(f"sentinel_{k}" for k in range(sentinels)))
    return names + tuple(f"mode_{mode}" for mode in MODES if modes)


# --- how long, how many -----------------------------------------------------------------------------------------------


def noise_counts(length: int, mean_span: float, rate: float) -> tuple[int, int]:
    """Returns (noise tokens, spans) of a text of `length` >= 2 tokens, rounded as T5 does."""
    noise = min(max(round(length * rate), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), noise, length - noise + 1)


def text_length(denoiser: Denoiser, capacity: int) -> int:
    """Returns how many tokens of text fill a sequence of `capacity` tokens (without the mode token).

    Raises:
      UserError: not even two tokens fit.
    """

    def spans(length: int) -> int:
        return noise_counts(length, denoiser.mean_span, denoiser.rate)[1]

    length = capacity
    if denoiser.mode != "s":
        length = 2
        while length + 1 + 2 * spans(length + 1) + 2 <= capacity:
            length += 1
        length = capacity - 2 - 2 * spans(length)  # one or two more, where T5 would have begun another span
    if length < 2:
        raise UserError(f"a row of {capacity} tokens is too short to denoise; set a longer context_length.")
    return length


def _spans_of(denoiser: Denoiser, length: int, capacity: int) -> tuple[int, int]:
    noise, spans = noise_counts(length, denoiser.mean_span, denoiser.rate)
    return noise, min(spans, (capacity - length - 2) // 2)


def _longest_cut(denoiser: Denoiser, length: int) -> int:
    """The most tokens that s cuts off: a cut uniform from 1 to there has the rate as its mean."""
    return min(max(round(2 * denoiser.rate * length) - 1, 1), length - 1)


# --- corrupting and putting together ----------------------------------------------------------------------------------


def composition(rng: np.random.Generator, total: int, parts: int) -> np.ndarray:
    """Returns `parts` whole numbers of at least 1 that sum to `total`, uniform over all such, int64 [parts]."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def draw_spans(rng: np.random.Generator, length: int, noise: int, spans: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (starts, sizes) [spans] of spans that cover `noise` of `length` tokens and do not touch, at random."""
    sizes = composition(rng, noise, spans)
    gaps = composition(rng, length - noise + 2, spans + 1)  # the outer two may be empty: 1 more each
    starts = np.cumsum(gaps[:-1]) - 1 + np.cumsum(sizes) - sizes
    return starts, sizes


def corrupt(
    text: np.ndarray, starts: np.ndarray, sizes: np.ndarray, sentinels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (inputs, outputs): in the inputs sentinel k (mod their number) for span k, in the outputs before it."""
    inputs, outputs, at = [], [], 0
    for k, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        sentinel = [sentinels[k % len(sentinels)]]
        inputs += [text[at:start], sentinel]
        outputs += [sentinel, text[start : start + size]]
        at = start + size
    return np.concatenate([*inputs, text[at:]]), np.concatenate(outputs)


def reassemble(inputs: np.ndarray, outputs: np.ndarray, sentinels: Sequence[int]) -> np.ndarray:
    """Returns the text of which `corrupt` made these: the k-th span of the outputs for the k-th sentinel of the inputs.

    Raises:
      ValueError: the outputs do not begin with a sentinel, or have another number of spans than the inputs.
    """
    holes, marks = (np.flatnonzero(np.isin(part, sentinels)) for part in (inputs, outputs))
    if len(holes) != len(marks) or (len(outputs) and (not len(marks) or marks[0])):
        raise ValueError(f"{len(marks)} spans do not fit {len(holes)} holes")
    kept, spans = np.split(inputs, holes), np.split(outputs, marks)[1:]
    return np.concatenate([kept[0], *(x for k, span in enumerate(spans) for x in (span[1:], kept[k + 1][1:]))])


@dataclasses.dataclass(frozen=True)
class Plan:
    """How texts become rows.

    Attributes:
      denoisers: one is drawn for each row, by weight.
      context_length: T.
      sep, eot, sentinels: ids. modes: ids of the mode tokens by mode; empty: rows have none.
    """

    denoisers: tuple[Denoiser, ...]
    context_length: int
    sep: int = -1
    eot: int = -1
    sentinels: tuple[int, ...] = ()
    modes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def capacity(self) -> int:
        """Tokens of a sequence, its last one only a target, beside the mode token."""
        return self.context_length + 1 - bool(self.modes)

    @property
    def raw_length(self) -> int:
        """Tokens of text that a row takes: what every denoiser has room for."""
        return min(text_length(denoiser, self.capacity) for denoiser in self.denoisers)

    @property
    def most_targets(self) -> int:
        """The most targets that a row can have."""
        length = self.raw_length
        return max(
            _longest_cut(d, length) if d.mode == "s" else sum(_spans_of(d, length, self.capacity)) + 1
            for d in self.denoisers
        )

    def make(self, text: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the row of `raw_length` tokens of text: arrays [T] (see `Denoising`)."""
        weights = np.array([denoiser.weight for denoiser in self.denoisers])
        denoiser = self.denoisers[rng.choice(len(weights), p=weights / weights.sum())]
        if denoiser.mode == "s":
            cut = len(text) - int(rng.integers(1, _longest_cut(denoiser, len(text)) + 1))
            inputs, outputs = text[:cut], text[cut:]
        else:
            noise, spans = _spans_of(denoiser, len(text), self.capacity)
            inputs, outputs = corrupt(text, *draw_spans(rng, len(text), noise, spans), self.sentinels)
            inputs, outputs = np.append(inputs, self.sep), np.append(outputs, self.eot)
        if self.modes:
            inputs = np.append(self.modes[denoiser.mode], inputs)
        return self._row(inputs, outputs, MODES.index(denoiser.mode))

    def _row(self, inputs: np.ndarray, outputs: np.ndarray, mode: int) -> dict[str, np.ndarray]:
        T, both = self.context_length, np.concatenate([inputs, outputs]).astype(np.int32)
        at, size = np.arange(T, dtype=np.int32), len(both) - 1
        real = at < size
        row = {"tokens": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32)}
        row["tokens"][:size], row["targets"][:size] = both[:-1], both[1:]
        return row | {
            "target_weights": (real & (at >= len(inputs) - 1)).astype(np.float32),
            "segment_ids": real.astype(np.int32),
            "positions": np.where(real, at, 0),
            "prefix": at < len(inputs),
            "mode": np.full(T, mode, np.int32),
        }


def _read(entries: Sequence[Sequence[Any]]) -> tuple[Denoiser, ...]:
    for entry in entries:
        if not isinstance(entry, (tuple, list)) or len(entry) not in (3, 4):
            raise UserError(f"objective.denoisers has {entry!r}; each is (mode, mean span, rate[, weight]).")
    return tuple(Denoiser(*entry) for entry in entries)


def _wants_modes(mode_tokens: str, denoisers: Sequence[Denoiser]) -> bool:
    choose("objective.mode_tokens", mode_tokens, ("auto", "always", "never"))
    return mode_tokens == "always" or (mode_tokens == "auto" and len({d.mode for d in denoisers}) > 1)


@dataclasses.dataclass(frozen=True)
class Denoising(Objective):
    """Cross-entropy of the targets; one term, "denoising", and the metric "denoising_nll", of each mode too.

    The metric is of the targets alone: it is no likelihood of the text, so no bits per byte are made of it.

    Batch, each [B, T]: tokens, targets, target_weights (1 where the target is to be given back), segment_ids (1; 0 is
    padding), positions, prefix (bool: the inputs) and mode (index in MODES).
    """

    model: Transformer
    coefs: Mapping[str, Any] = option({"denoising": 1.0}, "weight of the term 'denoising'")
    recipe: str = option("t5", " | ".join(RECIPES))
    denoisers: tuple[tuple[Any, ...], ...] = option(
        (), "instead of a recipe: ((mode r, s or x; mean span; rate; weight = 1), ...)"
    )
    mode_tokens: str = option("auto", "rows begin with mode_r, mode_s or mode_x: auto (if modes differ), always, never")
    sentinels: int = option(64, "different sentinels at most; span k has the (k mod n)-th, so 1 is one for all")
    mask: str = option("prefix", "prefix (inputs see each other) | causal")
    label_smoothing: float = option(0.0, "probability given to all tokens alike")
    z_loss: float = option(0.0, "coefficient of logsumexp^2")
    most_targets: int = 0  # of a row; logits are made for no more. 0: for every token

    def __post_init__(self) -> None:
        choose("objective.mask", self.mask, ("prefix", "causal"))
        choose("objective.recipe", self.recipe, RECIPES)
        _wants_modes(self.mode_tokens, self._denoisers)
        for name, ok, allowed in (
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("sentinels", self.sentinels >= 1, "at least 1"),
        ):
            if not ok:
                raise UserError(f"objective.{name} is {getattr(self, name)!r}; it must be {allowed}.")

    @classmethod
    def rows(cls, options: Mapping[str, Any], host: Host) -> TextRows:
        plan = cls(model=None, **check_options(cls, options)).plan(host)
        kinds = {name: spec.dtype for name, spec in _spec(1, host.context_length).items()}
        return TextRows(plan.raw_length, kinds, plan.make)

    @classmethod
    def build(cls, options: Mapping[str, Any], setting: Setting) -> Denoising:
        objective = cls(model=Transformer(setting.model), **check_options(cls, options))
        if not setting.context_length:
            return objective
        return dataclasses.replace(objective, most_targets=objective.plan(setting).most_targets)

    def plan(self, host: Host | Setting) -> Plan:
        """How rows are made; asks the host for those special tokens only that rows will have."""
        denoisers = self._denoisers
        names = self.modes if _wants_modes(self.mode_tokens, denoisers) else ()
        plan = Plan(denoisers, host.context_length, modes={mode: host.special(f"mode_{mode}") for mode in names})
        cutting = [d for d in denoisers if d.mode != "s"]
        if not cutting:
            return plan
        most = max(_spans_of(d, plan.raw_length, plan.capacity)[1] for d in cutting)
        sentinels = tuple(host.special(f"sentinel_{k}") for k in range(min(most, self.sentinels)))
        return dataclasses.replace(plan, sep=host.special("sep"), eot=host.special("eot"), sentinels=sentinels)

    @property
    def _denoisers(self) -> tuple[Denoiser, ...]:
        return _read(self.denoisers or RECIPES[self.recipe])

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of its denoisers, in the order of MODES."""
        used = {d.mode for d in self._denoisers}
        return tuple(mode for mode in MODES if mode in used)

    def init(self, key: Array, batch: Batch) -> Params:
        return {"model": self.model.init(key, batch["tokens"])["params"]}

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        return _spec(batch_size, context_length)

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        return {**batch, "weights": {"denoising": batch["target_weights"]}}

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        prefix = {"prefix_BxT": batch["prefix"]} if self.mask == "prefix" else {}
        params = {"params": params["model"]}
        hidden_BxTxD, _ = self.model.apply(
            params,
            batch["tokens"],
            mask=Mask(self.mask, segments_BxT=batch["segment_ids"], **prefix),
            positions=batch["positions"],
            keys=keys if train else None,
            method="encode",
        )
        names = ("targets", "target_weights", "mode")
        part = {name: batch[name] for name in names} | {"weights": batch["weights"]["denoising"]}
        T, N = batch["tokens"].shape[1], self.most_targets
        if 0 < N < T:  # targets stand together, from the last input on: only they pass the output layer
            first = jnp.clip(jnp.sum(batch["prefix"], axis=1) - 1, 0, T - N)
            at_BxN = first[:, None] + jnp.arange(N)
            hidden_BxTxD = jnp.take_along_axis(hidden_BxTxD, at_BxN[..., None], axis=1)
            part = {name: jnp.take_along_axis(x, at_BxN, axis=1) for name, x in part.items()}
        logits = self.model.apply(params, hidden_BxTxD, method="unembed")
        kwargs = dict(z_loss=self.z_loss, label_smoothing=self.label_smoothing, vocab_size=self.model.config.vocab_size)
        loss, nll = cross_entropy(logits, part["targets"], **kwargs)
        mask = part["target_weights"]
        metrics = {"denoising_nll": (jnp.sum(mask * nll), jnp.sum(mask))}
        for mode in self.modes if len(self.modes) > 1 else ():
            here = mask * (part["mode"] == MODES.index(mode))
            metrics[f"denoising_nll_{mode}"] = (jnp.sum(here * nll), jnp.sum(here))
        return {"denoising": jnp.sum(part["weights"] * loss)}, metrics


def _spec(batch_size: int, context_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    kinds = {"segment_ids": np.int32, "positions": np.int32, "prefix": np.bool_, "mode": np.int32}
    shape = (batch_size, context_length)
    return text_spec(*shape) | {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}
