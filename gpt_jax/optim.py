"""Optimizers and learning-rate schedules, from optax.

A schedule is piecewise in steps or in tokens: warmup, then cosine, linear, warmup-stable-decay or constant. Parameters
are grouped by regexes over their names (first match wins): weight decay, learning-rate multiplier, frozen.
"""

from __future__ import annotations

import bisect
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from gpt_jax.errors import UserError, choose
from gpt_jax.options import import_path
from gpt_jax.sharding import path_name

Groups = Sequence[tuple[str, Mapping[str, Any]]]

# Matrices and embeddings decay; biases, norms and the small mixing matrices do not. By name: stacked leaves have
# a leading axis of layers, so the number of axes says nothing.
NO_DECAY = r".*(bias|scale|position_embedding|mix_scores|mix_weights)"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation, its schedule (update count -> learning rate) and the names of frozen parameters."""

    tx: optax.GradientTransformation
    schedule: Callable[[Array | int], Array]
    frozen: tuple[str, ...] = ()


def parse_length(text: str, steps: int, what: str) -> tuple[str, float]:
    """Reads '200' (steps), '375Mtok' (tokens) or '5%' (of the run's steps) as ('steps' | 'tokens', amount)."""
    match = re.fullmatch(r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[0-9]+)?)\s*(%|[KMBT]?tok)?\s*", str(text))
    if not match:
        raise UserError(f"{what} is {text!r}; write steps ('200'), tokens ('375Mtok') or part of the run ('5%').")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return "steps", number / 100 * steps
    if unit:
        return "tokens", number * {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(unit[0], 1.0)
    return "steps", number


def make_schedule(
    name: str = "cosine",
    *,
    peak: float,
    steps: int,
    warmup: str = "5%",
    decay: str = "100%",
    cooldown: str = "20%",
    end_factor: float = 0.1,
    tokens_at: Callable[[Array | int], Array] | None = None,
) -> Callable[[Array | int], Array]:
    """Returns the learning rate as a function of the update count.

    Args:
      name: cosine | linear | wsd (flat, then linear over the last `cooldown`) | constant.
      peak: after the warmup. steps: of the run. warmup, decay, cooldown: see `parse_length`.
      end_factor: learning rate after `decay`, as a factor of the peak.
      tokens_at: tokens seen before a step; if any length is in tokens, the whole schedule is a function of tokens.
    """
    choose("optimizer.schedule", name, ("cosine", "linear", "wsd", "constant"))
    lengths = {
        key: parse_length(text, steps, f"optimizer.{key}")
        for key, text in (("warmup", warmup), ("decay", decay), ("cooldown", cooldown))
    }
    in_tokens = any(unit == "tokens" for unit, _ in lengths.values())
    if in_tokens and tokens_at is None:
        raise UserError("a schedule in tokens needs the number of tokens in a step.")

    def position(unit: str, amount: float) -> float:
        return float(tokens_at(amount)) if in_tokens and unit == "steps" else amount

    w, d = (position(*lengths[key]) for key in ("warmup", "decay"))
    unit, c = lengths["cooldown"]
    if name == "wsd" and in_tokens and unit == "steps":  # those of the last steps, whose batches may be larger
        last = lengths["decay"][1] if lengths["decay"][0] == "steps" else _step_at(d, steps, tokens_at)
        c = d - float(tokens_at(max(0.0, last - c)))
    floor = end_factor * peak

    def schedule(count: Array | int) -> Array:
        x = tokens_at(count) if in_tokens else jnp.asarray(count, jnp.float32)
        step = tokens_at(count + 1) - x if in_tokens else 1.0  # the first update is not wasted on a rate of 0
        warm = peak * jnp.minimum(1.0, (x + step) / max(w, 1e-9))
        part = jnp.clip((x - w) / max(d - w, 1e-9), 0.0, 1.0)
        if name == "cosine":
            after = floor + (peak - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * part))
        elif name == "linear":
            after = peak + (floor - peak) * part
        elif name == "wsd":
            after = peak + (floor - peak) * jnp.clip((x - (d - c)) / max(c, 1e-9), 0.0, 1.0)
        else:
            after = jnp.asarray(peak)
        return jnp.where(x < w, warm, after)

    return schedule


def _step_at(tokens: float, guess: int, tokens_at: Callable[[Array | int], Array]) -> int:
    """Returns the first step before which so many tokens are seen."""
    while float(tokens_at(float(guess))) < tokens:
        guess *= 2
    return bisect.bisect_left(range(guess), tokens, key=lambda step: float(tokens_at(float(step))))


def _named_map(function: Callable[[str, Any], Any], params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_name(path), leaf), params)


def group_of(name: str, groups: Groups) -> Mapping[str, Any]:
    """Returns the settings of the first group whose regex matches the whole name, or {}."""
    for regex, settings in groups:
        if re.fullmatch(regex, name):
            return settings
    return {}


def check_form(groups: Any) -> None:
    """Raises UserError unless groups are pairs of a regex and a table of settings whose values can be such."""
    for group in groups:
        if not (isinstance(group, list | tuple) and len(group) == 2 and isinstance(group[1], Mapping)):
            raise UserError(f"optimizer.groups has {group!r}; each is (regex, {{'lr': 0.1}} or another setting).")
        try:
            re.compile(group[0])
        except (re.error, TypeError) as error:
            raise UserError(f"optimizer.groups has {group[0]!r}, which is no regex: {error}.") from None
        for key, value in group[1].items():
            if key in _SETTINGS and not _SETTINGS[key][0](value):
                raise UserError(f"the optimizer group {group[0]!r} has {key} {value!r}; it is {_SETTINGS[key][1]}.")


def _is_numeric(value: Any, axes: int) -> bool:
    """Whether a value is a finite number, or with `axes` 1 perhaps several."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        return False
    return array.dtype.kind in "iuf" and array.ndim <= axes and bool(np.isfinite(array).all())


_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda value: _is_numeric(value, 1), "a number, or one for each layer"),
    "weight_decay": (lambda value: _is_numeric(value, 0), "a number"),
    "frozen": (lambda value: isinstance(value, bool), "True or False"),
}


def check_groups(groups: Groups, names: Sequence[str]) -> None:
    """Raises UserError for a group with an unknown setting or that matches no parameter."""
    for regex, settings in groups:
        for key in settings:
            choose(f"a setting of the optimizer group {regex!r}", key, _SETTINGS)
        if not any(re.fullmatch(regex, name) for name in names):
            raise UserError(f"the optimizer group {regex!r} matches no parameter; they are {', '.join(names[:8])}, ...")


def _frozen(groups: Groups) -> tuple[str, ...]:
    """Regexes of the names whose first group is a frozen one."""
    before: list[str] = []
    out = []
    for regex, settings in groups:
        if settings.get("frozen"):
            out.append(f"(?!(?:{'|'.join(before)})\\Z)(?:{regex})" if before else regex)
        else:
            before.append(f"(?:{regex})")
    return tuple(out)


def scale_by_group(groups: Groups) -> optax.GradientTransformation:
    """Multiplies each update by its group's 'lr': a number, or one per layer for stacked leaves ([L] multipliers)."""

    def one(name: str, update: Array) -> Array:
        lr = group_of(name, groups).get("lr", 1.0)
        if isinstance(lr, (int, float)):
            return update if lr == 1.0 else update * lr
        lr = np.asarray(lr, np.float32)
        if not is_stacked(name) or lr.shape != update.shape[:1]:
            layers = f"has {update.shape[0]} layers" if is_stacked(name) else "is no stack of layers"
            raise UserError(f"a group gives {lr.size} learning-rate multipliers to {name!r}, which {layers}.")
        return update * lr.reshape((-1,) + (1,) * (update.ndim - 1))

    return optax.stateless(lambda updates, params: _named_map(one, updates))


_EMBEDDING = r"[^/]+/(position_embedding|embedding|embedding_in)(/|$)"


def scale_by_depth(decay: float, pattern_length: int = 1) -> optax.GradientTransformation:
    """Layer-wise learning-rate decay (Clark et al. 2020, appendix B): updates times decay^(L + 1 - depth).

    Of a model of L layers the embeddings have depth 0, layer l (from 0) depth l + 1, the final norm and the output
    layer L + 1, as have the roots without layers: heads learn at the full rate. (ELECTRA counts a pooler below the head
    too: one exponent more for all below.)

    Args:
      decay: in (0, 1]. pattern_length: blocks in the repeating pattern that parameters are stacked over.
    """

    def update(updates: Any, params: Any) -> Any:
        paths = jax.tree_util.tree_leaves_with_path(updates)
        repetitions = {n.split("/")[0]: leaf.shape[0] for p, leaf in paths if is_stacked(n := path_name(p))}

        def one(name: str, leaf: Array) -> Array:
            root = name.split("/")[0]
            if root not in repetitions:
                return leaf
            layers = repetitions[root] * pattern_length
            if is_stacked(name):
                first = int(re.search(r"/layers/block_(\d+)/", name)[1])
                distance = layers - (first + pattern_length * np.arange(leaf.shape[0]))
                return leaf * (decay**distance).astype(np.float32).reshape((-1,) + (1,) * (leaf.ndim - 1))
            return leaf * decay ** (layers + 1) if re.match(_EMBEDDING, name) else leaf

        return _named_map(one, updates)

    return optax.stateless(update)


def decay_weights(weight_decay: float, groups: Groups) -> optax.GradientTransformation:
    """Adds weight_decay * parameter to the update, by name (`NO_DECAY`) and group."""

    def apply(updates: Any, params: Any) -> Any:
        def one(path: Any, update: Array, param: Array) -> Array:
            name = path_name(path)
            rate = group_of(name, groups).get("weight_decay", 0.0 if re.fullmatch(NO_DECAY, name) else weight_decay)
            return update + rate * param if rate else update

        return jax.tree_util.tree_map_with_path(one, updates, params)

    return optax.stateless(apply)


def is_stacked(name: str) -> bool:
    """Whether a parameter's leading axis is one of layers."""
    return "/layers/" in name


def _input_axes(name: str, ndim: int) -> tuple[int, ...] | None:
    """The axes that a stacked kernel contracts, None for any other parameter; those after them are its outputs."""
    if not name.endswith("kernel") or not is_stacked(name):
        return None
    return (1, 2) if name.endswith("attention/out/kernel") and ndim == 4 else (1,)


def _muon_dimensions(params: Any) -> Any:
    """Which axes of stacked kernels are inputs and outputs; None sends a parameter to Adam."""

    def one(name: str, leaf: Any) -> Any:
        inputs = _input_axes(name, leaf.ndim)
        if inputs is None:
            return None
        return optax.contrib.MuonDimensionNumbers(inputs, tuple(range(1 + len(inputs), leaf.ndim)))

    return _named_map(one, params)


def scale_by_factored_rms(min_dim_size_to_factor: int = 128, **kwargs: Any) -> optax.GradientTransformation:
    """Adafactor's factored second moment (Shazeer & Stern 2018), a row and a column for each layer's matrix.

    optax factors the two largest axes of a leaf. Where those are too small (heads of 64), the kernel is shown to it
    as [layers, inputs, outputs]: otherwise its second moment would be kept whole.
    """
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=min_dim_size_to_factor, **kwargs)

    def matrices(tree: Any) -> Any:
        def one(name: str, leaf: Array) -> Array:
            inputs = _input_axes(name, leaf.ndim)
            if inputs is None or sorted(leaf.shape[1:])[-2] >= min_dim_size_to_factor:
                return leaf
            return leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1 : 1 + len(inputs)]), -1)

        return _named_map(one, tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        out, state = inner.update(matrices(updates), state, matrices(params))
        return jax.tree.map(lambda new, old: new.reshape(old.shape), out, updates), state

    return optax.GradientTransformation(lambda params: inner.init(matrices(params)), update)


def clip_by_layer_rms(threshold: float) -> optax.GradientTransformation:
    """Divides updates by max(1, root mean square / threshold) (Adafactor, section 6), stacked leaves layer by layer."""

    def one(name: str, update: Array) -> Array:
        axes = tuple(range(1, update.ndim)) if is_stacked(name) else None
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=axes, keepdims=True))
        return update / jnp.maximum(1.0, rms / threshold)

    return optax.stateless(lambda updates, params: _named_map(one, updates))


def _make(name: str, function: Any, kwargs: Mapping[str, Any], passed_to: Any = None, /, **given: Any) -> Any:
    """Calls function(**given, **kwargs); raises UserError for keys of `kwargs` that it does not take, or lacks.

    `passed_to`: the function whose arguments it takes, where it does not name them itself.
    """
    try:
        taken = inspect.signature(passed_to or function).parameters
    except (TypeError, ValueError):  # no function, or one that does not tell
        taken = {}
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        for key in set(given) - set(taken):
            raise UserError(f"optimizer.name is {name!r}, which is no function that takes {key!r}.")
        allowed = [key for key in taken if key not in given]
        for key in kwargs:
            choose(f"a key of optimizer.kwargs for {name}", key, allowed)
    plain = [
        key for key, p in taken.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if lacking := [key for key in plain if key not in given and key not in kwargs]:
        raise UserError(f"optimizer.kwargs is {dict(kwargs)}; {name} needs {', '.join(lacking)} too.")
    return function(**given, **kwargs)


def make_optimizer(
    name: str = "adamw",
    schedule: Callable[[Array | int], Array] | float = 1e-3,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    groups: Groups = (),
    layer_decay: float = 1.0,
    pattern_length: int = 1,
    kwargs: Mapping[str, Any] | None = None,
) -> Optimizer:
    """Makes the optimizer of a name or an import path ('package.module:function', called with learning_rate=schedule).

    Clipping is the train step's, which needs the norm anyway. `layer_decay`, `pattern_length`: see `scale_by_depth`.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"optimizer.layer_decay is {layer_decay}; it must be above 0 and at most 1 (off).")
    if not callable(schedule):
        rate = float(schedule)

        def schedule(count):
            return jnp.asarray(rate)

    check_form(groups)
    kwargs = dict(kwargs or {})
    frozen = _frozen(groups)
    depth = (scale_by_depth(layer_decay, pattern_length),) if layer_decay < 1 else ()
    scaled = (scale_by_group(groups), *depth)
    tail = (decay_weights(weight_decay, groups), *scaled, optax.scale_by_learning_rate(schedule))
    if name == "adamw":
        tx = optax.chain(_make(name, optax.scale_by_adam, kwargs, b1=b1, b2=b2, eps=eps), *tail)
    elif name == "adafactor":
        tx = optax.chain(
            _make(name, scale_by_factored_rms, kwargs, optax.scale_by_factored_rms), clip_by_layer_rms(1.0), *tail
        )
    elif name == "muon":
        options = (
            dict(eps=eps, adam_b1=b1, adam_b2=b2, adam_eps_root=0.0, weight_decay=0.0, adam_weight_decay=0.0) | kwargs
        )
        given = dict(learning_rate=1.0, muon_weight_dimension_numbers=_muon_dimensions)
        inner = _make(name, optax.contrib.muon, options, **given)
        tx = optax.chain(inner, optax.scale(-1.0), *tail)
    elif ":" in name:
        for regex, settings in groups:
            if "weight_decay" in settings:
                raise UserError(
                    f"the optimizer group {regex!r} sets weight_decay, but {name} decays by itself, by what "
                    "optimizer.kwargs has; its groups set 'lr' and 'frozen'."
                )
        tx = optax.chain(_make(name, import_path(name), kwargs, learning_rate=schedule), *scaled)
    else:
        choose("optimizer.name", name, ("adamw", "muon", "adafactor", "an import path (package.module:function)"))
    return Optimizer(tx, schedule, frozen)
