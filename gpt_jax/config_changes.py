"""What may change when a run is continued: free, a change of numerics or data, or impossible. One table says which."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.data.cache import content_hash
from gpt_jax.errors import UserError

FREE, NUMERICS, IMPOSSIBLE = "free", "numerics", "impossible"

# (pattern over dotted keys, class, what to say), first match wins; keys that only some configs have fall to the end.
_TABLE: tuple[tuple[str, str, str], ...] = (
    ("name", FREE, ""),
    ("mesh.*", FREE, "same batches, losses equal up to rounding"),
    ("distributed.*", FREE, ""),
    ("compiler.*", FREE, "same numbers up to rounding"),
    ("microbatches", FREE, "same gradient up to rounding"),
    ("log.*", FREE, ""),
    ("eval.every_steps", FREE, ""),
    ("eval.batch_size", FREE, "same losses up to rounding"),
    ("eval.task*", FREE, ""),
    ("eval.*", NUMERICS, "validation losses before and after do not compare"),
    ("checkpoint.*", FREE, ""),
    ("sample.*", FREE, ""),
    ("data.prefetch", FREE, ""),
    ("data.workers", FREE, ""),
    ("deterministic", FREE, "same numbers up to rounding"),
    # How the same function is computed: the checkpoint does not change, the numbers only in rounding.
    ("model.attention", FREE, "same numbers up to rounding"),
    ("model.query_block", FREE, "same numbers up to rounding"),
    ("model.flatten", FREE, "same numbers up to rounding"),
    ("model.unroll", FREE, "same numbers up to rounding"),
    ("model.remat", FREE, "same numbers up to rounding"),
    # The shapes of the parameters and what their rows mean.
    ("model.vocab_size", IMPOSSIBLE, "the embedding's rows"),
    ("model.vocab_multiple", IMPOSSIBLE, "the embedding's rows"),
    ("model.num_layers", IMPOSSIBLE, "the number of blocks"),
    ("model.d_model", IMPOSSIBLE, "the width"),
    ("model.embedding_size", IMPOSSIBLE, "the width of the embeddings"),
    ("model.num_heads", IMPOSSIBLE, "the heads"),
    ("model.num_kv_heads", IMPOSSIBLE, "the heads"),
    ("model.head_dim", IMPOSSIBLE, "the heads"),
    ("model.head_dims", IMPOSSIBLE, "the heads"),
    ("model.d_ff", IMPOSSIBLE, "the width of the feed-forward layer"),
    ("model.max_positions", IMPOSSIBLE, "the number of positions"),
    ("model.block", IMPOSSIBLE, "the parameters of the blocks"),
    ("model.ffn", IMPOSSIBLE, "the parameters of the feed-forward layer"),
    ("model.norm", IMPOSSIBLE, "the parameters of the norms"),
    ("model.bias", IMPOSSIBLE, "which parameters there are"),
    ("model.positions", IMPOSSIBLE, "the parameters of positions"),
    ("model.tie_embeddings", IMPOSSIBLE, "which parameters there are"),
    ("model.pattern", IMPOSSIBLE, "the kinds of layers"),
    ("model.qk_norm", IMPOSSIBLE, "which parameters there are"),
    ("model.talking_heads", IMPOSSIBLE, "which parameters there are"),
    ("model.lora_rank", IMPOSSIBLE, "which parameters there are"),
    ("model.lora_targets", IMPOSSIBLE, "which parameters there are"),
    ("model.lora_freeze", IMPOSSIBLE, "which parameters are trained"),
    ("model.param_dtype", IMPOSSIBLE, "the dtype of the parameters"),
    ("data.tokenizer.*", IMPOSSIBLE, "what the embedding's rows stand for"),
    ("init.*", IMPOSSIBLE, "where the run started"),
    ("model.init_std", IMPOSSIBLE, "where the run started"),
    ("model.scale_residual_init", IMPOSSIBLE, "where the run started"),
    # What is computed, or from which data.
    ("model.*", NUMERICS, ""),
    ("seed", NUMERICS, "data order, dropout and masks from here on"),
    ("steps", NUMERICS, ""),
    ("batch_size", NUMERICS, "the batches from here on"),
    ("batch_schedule", NUMERICS, "the batches from here on"),
    ("context_length", NUMERICS, "the rows from here on"),
    ("objective", NUMERICS, ""),
    ("objective.*", NUMERICS, ""),
    ("optimizer.*", NUMERICS, ""),
    ("data.*", NUMERICS, ""),
)


DATA = "the content of the data"  # in place of a key
_SHOWN = 6  # differences of the data that a message names

# Keys of the table's impossible ones for which some pairs of values have the same parameters: those are numerics.
_SAME_PARAMETERS = {
    "model.ffn": lambda old, new: "swiglu" not in (old, new),
    "model.positions": lambda old, new: "learned" not in (old, new),
    "model.pattern": lambda old, new: len(old) == len(new),
}


@dataclasses.dataclass(frozen=True)
class Change:
    """A key whose value differs: dotted name, old and new value, a note for the user."""

    key: str
    old: Any
    new: Any
    note: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}" + (f" ({self.note})" if self.note else "")


@dataclasses.dataclass(frozen=True)
class Changes:
    """The differences between a run's config and the one to continue it with, by class."""

    free: tuple[Change, ...] = ()
    numerics: tuple[Change, ...] = ()
    impossible: tuple[Change, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.free or self.numerics or self.impossible)

    def as_history(self) -> dict[str, Any]:
        """Returns {key: [old, new]} of all changes, for the run's history."""
        return {c.key: [c.old, c.new] for c in (*self.free, *self.numerics, *self.impossible)}


def classify(key: str) -> tuple[str, str]:
    """Returns (class, note) of a dotted key by the table; what it does not name counts as numerics."""
    for pattern, kind, note in _TABLE:
        if fnmatch.fnmatchcase(key, pattern):
            return kind, note
    return NUMERICS, ""


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """Sorts the differences between two resolved configs (nested dicts; lists and tuples count as equal).

    `steps` is free where it grows and no batch depends on it, with a note of what else does: the learning rate, a term
    of the objective. `context_length` is impossible where it sizes the table of learned positions.
    """
    before, after = flatten(old), flatten(new)
    sorted_changes: dict[str, list[Change]] = {FREE: [], NUMERICS: [], IMPOSSIBLE: []}
    for key in [*before, *(k for k in after if k not in before)]:
        a, b = before.get(key), after.get(key)
        if a == b and (key in before) == (key in after):
            continue
        kind, note = classify(key)
        if None not in (a, b):
            if key == "steps" and b > a:
                kind, note = _more_steps(after)
            if key in _SAME_PARAMETERS and _SAME_PARAMETERS[key](a, b):
                kind, note = NUMERICS, ""
            if key in ("model.attention", "model.query_block") and after.get("model.dropout"):
                kind, note = NUMERICS, "other draws of dropout"
            if key == "microbatches" and after.get("batch_schedule"):
                kind, note = NUMERICS, "smaller batches grow by them, and their rows have other draws"
            learned = after.get("model.positions") == "learned"
            if key == "context_length" and learned and not after.get("model.max_positions"):
                kind, note = IMPOSSIBLE, "the number of learned positions"
        sorted_changes[kind].append(Change(key, a, b, note))
    return Changes(*(tuple(sorted_changes[kind]) for kind in (FREE, NUMERICS, IMPOSSIBLE)))


def compare_data(then: Mapping[str, Any], now: Mapping[str, Any]) -> Change | None:
    """Returns how the content of the data differs between two `Data.info`, of what both tell; None if it does not.

    The note names what differs. Where the data lie, what they are called and which Python has them is no content.
    """
    before, after = (
        {k: v for k, v in flatten(info).items() if not k.endswith((".store", ".tokens_file", ".files", ".python"))}
        for info in (then, now)
    )
    names = [name for name in before if name in after and before[name] != after[name]]
    if not names:
        return None
    shown = [f"{n} {before[n]} -> {after[n]}" if isinstance(after[n], int | float) else n for n in names[:_SHOWN]]
    more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    hashes = (content_hash({name: of[name] for name in before if name in after}) for of in (before, after))
    return Change(DATA, *hashes, note=", ".join([*shown, *more]))


def undo(tree: Mapping[str, Any], changes: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Returns a resolved config (nested dicts) as it was before {key: [old, new]}, as `as_history` gives them; an old
    value of None is a key that was not there."""
    out = copy.deepcopy(dict(tree))
    for key, (old, _) in sorted(changes.items(), key=lambda item: item[1][0] is not None):  # first what was not there
        *path, name = key.split(".")
        nodes = [out]
        for part in path:
            if not isinstance(nodes[-1].get(part), dict):
                nodes[-1][part] = {}
            nodes.append(nodes[-1][part])
        if old is not None:
            nodes[-1][name] = old
            continue
        nodes[-1].pop(name, None)
        for parent, part in reversed([*zip(nodes, path, strict=False)]):
            if not parent[part]:  # nothing else was in it
                del parent[part]
    return out


def moves_numbers(key: str) -> bool:
    """Whether a change of a key may move a number of training, if only by rounding."""
    kind, note = classify(key)
    return (kind != FREE or bool(note)) and not key.startswith("eval.")


def decide(changes: Changes, accept: bool, path: Any = "this run") -> list[str]:
    """Returns the lines that tell the user what changed.

    Args:
      changes: from `compare`.
      accept: whether the user accepts changes of numerics and data (`--accept-changes`).
      path: the run, for messages.

    Raises:
      UserError: a change is impossible, or of numerics or data and not accepted; every such difference is shown.
    """
    if changes.impossible:
        shown = "; ".join(map(str, changes.impossible))
        raise UserError(
            f"{path} cannot be continued with another {shown}: start a new --workdir (init.from reuses weights)."
        )
    if changes.numerics and not accept:
        shown = "; ".join(map(str, changes.numerics))
        raise UserError(
            f"{path} was begun with other numerics or data, {shown}: "
            "give --accept-changes to go on with the new ones, or undo them."
        )
    return [f"changed (free) {c}" for c in changes.free] + [f"changed (accepted) {c}" for c in changes.numerics]


def _more_steps(flat: Mapping[str, Any]) -> tuple[str, str]:
    """(class, note) of more steps in a run of this config."""
    if any(str(until).strip().endswith("%") for until, *_ in flat.get("batch_schedule") or ()):
        return NUMERICS, "batch_schedule has percents of steps: other batches"
    notes = [_schedule_note(flat), *(f"{key} is a part of steps" for key in _parts_of_steps(flat))]
    return FREE, "; ".join(note for note in notes if note)


def _parts_of_steps(flat: Mapping[str, Any]) -> list[str]:
    """The keys of the objective, and of the ones it is made of, whose value stands for a part of the run."""
    from gpt_jax.objectives.base import objective_class

    found = []
    for key, name in flat.items():
        if key.startswith("objective.") and key.endswith(".name"):
            prefix = key.removesuffix("name")
            options = {k.removeprefix(prefix): value for k, value in flat.items() if k.startswith(prefix)}
            found += [f"{prefix}{option}" for option in objective_class(name).parts_of_steps(options)]
    return found


def _schedule_note(flat: Mapping[str, Any]) -> str:
    schedule = flat.get("optimizer.schedule")
    lengths = (
        ["warmup"]
        + (["decay"] if schedule in ("cosine", "linear") else [])
        + (["cooldown"] if schedule == "wsd" else [])
    )
    relative = [name for name in lengths if str(flat.get(f"optimizer.{name}", "")).strip().endswith("%")]
    if schedule == "wsd":  # its cooldown ends with the run, however long it is itself
        relative = sorted({*relative, "cooldown"})
    if not relative:
        return ""
    parts = " and ".join(f"optimizer.{name}" for name in relative)
    return f"the {schedule} schedule follows: {parts} depends on steps, so the learning rate changes from here on"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted key: value}, tuples as lists."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = _lists(value)
    return out


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value
