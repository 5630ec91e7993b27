"""The contract between an objective and the train step, and how a config names one.

An objective is a plug-in: it says which parameters it needs, what batch it takes, how a batch is corrupted and
weighted, and the unreduced sums of its losses. It never averages, never updates, and never sees a device count:
the step (gpt_jax/step.py) divides each term once by its weight over the whole global batch.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from gpt_jax.errors import UserError, choose, nearest
from gpt_jax.model import ModelConfig, Transformer
from gpt_jax.options import check_type, import_path, is_number

Batch = dict[str, Any]
Params = dict[str, Any]
Schedule = Callable[[Array], Array]

# One line per objective; the file it names is all there is to it.
REGISTRY: dict[str, str] = {
    "causal_lm": "gpt_jax.objectives.causal_lm:CausalLM",
    "classify": "gpt_jax.objectives.classify:Classify",
    "denoising": "gpt_jax.objectives.denoising:Denoising",
    "dialogue": "gpt_jax.objectives.dialogue:Dialogue",
    "distillation": "gpt_jax.objectives.distillation:Distillation",
    "dpo": "gpt_jax.objectives.dpo:DPO",
    "masked_lm": "gpt_jax.objectives.masked_lm:MaskedLM",
    "mixture": "gpt_jax.objectives.compose:Mixture",
    "multiple_choice": "gpt_jax.objectives.multiple_choice:MultipleChoice",
    "policy_gradient": "gpt_jax.objectives.policy_gradient:PolicyGradient",
    "replaced_token": "gpt_jax.objectives.replaced_token:ReplacedToken",
    "span_qa": "gpt_jax.objectives.span_qa:SpanQA",
    "sum": "gpt_jax.objectives.compose:Sum",
    "supervised": "gpt_jax.objectives.supervised:Supervised",
    "tag": "gpt_jax.objectives.tag:Tag",
}


class Objective(abc.ABC):
    """A loss that plugs into the one jitted update.

    Attributes:
      coefs: weight of each term, e.g. {"mlm": 1.0, "rtd": 50.0}; a value may be a function of the step.
      frozen: regexes over parameter names ("reference/.*") that get no gradient, moments, decay or average.
      batch_terms: terms that are not sums over rows (expert balance, in-batch contrast): averaged over micro-batches,
        and exempt from the promise that micro-batches do not change the loss.
      generates: whether what it trains continues a text, so that samples of a run say something. It may depend
        on the options: ask the objective, not its class.
      copies: {root: another}: roots that begin as the other's weights ("reference": "model"), those of `init.from` too.
    """

    coefs: Mapping[str, float | Schedule]
    frozen: Sequence[str] = ()
    copies: Mapping[str, str] = MappingProxyType({})
    batch_terms: ClassVar[frozenset[str]] = frozenset()
    generates: bool = True

    @abc.abstractmethod
    def init(self, key: Array, batch: Batch) -> Params:
        """Returns parameters by named root ({"model": ...}); each leaf is boxed with its logical axis names."""

    @abc.abstractmethod
    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        """Returns the tree of ShapeDtypeStruct that the data delivers; every leaf has rows leading."""

    @abc.abstractmethod
    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        """Corrupts and weights the whole global batch, in jit, without parameters.

        Args:
          batch: as `batch_spec` says. keys: [B] random keys, one per row; whatever draws folds its name in
            (`fold_name`). step: scalar.

        Returns:
          A batch whose leaves all have rows leading, with batch["weights"][term] (any shape with rows leading).
        """

    @abc.abstractmethod
    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        """Losses of a (micro-)batch.

        Args:
          params: the roots of `init`. batch: rows of the prepared batch. keys: [rows] random keys. train: dropout on.

        Returns:
          (sums, metrics): sums[term] = sum of weight * loss, float32, unreduced; metrics[name] = (sum, weight).
        """

    # Only where weights depend on a model (`needs_scores`): the step scans `score` over the micro-batches, then calls
    # `weigh` once.

    needs_scores: bool = False

    def score(self, params: Params, batch: Batch, keys: Array) -> dict[str, Array]:
        """Returns {name: [rows, ...]}: a forward pass without gradient."""
        raise NotImplementedError

    def weigh(self, batch: Batch, scores: dict[str, Array], step: Array) -> Batch:
        """Returns the whole prepared batch again, its weights set from the scores of all rows."""
        raise NotImplementedError

    def weights(self, batch: Batch) -> dict[str, Array]:
        """Returns the weights by term of a prepared batch."""
        return batch["weights"]

    def num_rows(self, batch: Batch) -> int:
        """Returns the number of row keys that a batch needs: the rows of its largest part."""
        return max(leaf.shape[0] for leaf in jax.tree.leaves(batch))

    # Only where the data is not plain text.

    @classmethod
    def rows(cls, options: Mapping[str, Any], host: Host) -> Any:
        """How the data makes rows for this objective, on the host: None (plain text, as data.layout says), or TextRows,
        ExampleRows or {part: Part} of gpt_jax/data/formats.py. Called before the model is known."""
        return None

    def parts(self) -> dict[str, tuple[Objective, float]]:
        """Returns the objectives with sub-batches, and so validation sets, of their own, and their coefficients."""
        return {"": (self, 1.0)}

    def feed(self, source: Any) -> Any:
        """Returns the training source that the step reads, given the data's own: the same, unless batches depend on
        the parameters (gpt_jax/rollout.py)."""
        return source

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Returns what predictions are made of, {name: [rows, ...]}, from rows of the data (not prepared)."""
        raise NotImplementedError

    @classmethod
    def parts_of_steps(cls, options: Mapping[str, Any]) -> Sequence[str]:
        """Returns the options, left out ones too, that stand for a part of the run's steps (nested ones: 'coefs.edit').

        Of a run that goes on to more steps they are named: what they say changes."""
        return ()

    @classmethod
    def build(cls, options: Mapping[str, Any], setting: Setting) -> Objective:
        """Makes the objective of a config's options; unknown ones are an error naming the closest."""
        return cls(model=Transformer(setting.model), **check_options(cls, options))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an objective may know of the run it is built for.

    Attributes:
      model: the model's config. specials: ids of the tokenizer's special tokens by name.
      steps: steps of the run. batch_size, context_length: of the run.
      tasks: TaskInfo of the tasks that share its rows; for an objective of parts {part: such}.
    """

    model: ModelConfig
    specials: Mapping[str, int] = dataclasses.field(default_factory=dict)
    steps: int = 0
    batch_size: int = 0
    context_length: int = 0
    tasks: Any = ()

    def special(self, name: str) -> int:
        """Returns the id of a special token; raises a UserError that says how to add it."""
        return special_id(self.specials, name)


@dataclasses.dataclass(frozen=True)
class Host:
    """What `Objective.rows` may know of the run.

    Attributes:
      specials: ids of the tokenizer's special tokens by name. context_length, batch_size: of the run.
    """

    specials: Mapping[str, int] = dataclasses.field(default_factory=dict)
    context_length: int = 0
    batch_size: int = 0

    def special(self, name: str) -> int:
        """Returns the id of a special token; raises a UserError that says how to add it."""
        return special_id(self.specials, name)


def special_id(specials: Mapping[str, int], name: str) -> int:
    """Returns the id of a special token; raises a UserError that says how to add it."""
    if name not in specials:
        raise UserError(
            f"the tokenizer has no special token {name!r} (it has: {', '.join(specials) or 'none'}); "
            "add it to data.tokenizer.specials."
        )
    return specials[name]


def option_fields(cls: type) -> dict[str, dataclasses.Field]:
    """Returns an objective's options: the dataclass fields that carry a line of help."""
    return {f.name: f for f in dataclasses.fields(cls) if "help" in f.metadata}


def check_options(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `options` if all are known and of their type; raises UserError otherwise, naming the closest."""
    known = option_fields(cls) if dataclasses.is_dataclass(cls) else {}
    for key in options:
        if key not in known:
            raise UserError(
                f"unknown config key 'objective.{key}'{nearest(key, known)}; "
                f"{cls.__name__} takes: {', '.join(known) or 'no options'}."
            )
        check_type(f"objective.{key}", options[key], known[key].type)
    coefs = options.get("coefs")
    for term, coef in coefs.items() if isinstance(coefs, Mapping) else ():
        if not callable(coef):
            check_coefficient(f"objective.coefs[{term!r}]", coef)
    return dict(options)


def check_coefficient(key: str, value: Any) -> None:
    """Raises UserError unless a coefficient is a finite number that is not negative: a loss is never trained up."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise UserError(f"{key} is {value!r}; it must be a number of 0 or more.")


def check_model_options(key: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `options` if they are keys of a model's config with values of their type; raises UserError otherwise."""
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    for name, value in options.items():
        choose(f"a key of {key}", name, fields)
        check_type(f"{key}.{name}", value, fields[name].type)
    return dict(options)


def check_spec(spec: Mapping[str, Any]) -> type[Objective]:
    """Returns the class that a config's `objective` table names, or raises UserError: before any data is built."""
    if "name" not in spec:
        raise UserError("the objective has no 'name'.")
    cls = objective_class(spec["name"])
    check_options(cls, _options(spec))
    return cls


def bidirectional_prompt(spec: Mapping[str, Any]) -> bool:
    """Tells whether an objective trains its model to see all of a prompt at once: under a prefix mask."""
    cls = check_spec(spec)
    field = option_fields(cls).get("mask") if dataclasses.is_dataclass(cls) else None
    return field is not None and spec.get("mask", field.default) == "prefix"


def describe_options(spec: Mapping[str, Any]) -> str:
    """Returns a line per option of an objective: its key, its value and its meaning (`--print-config`)."""
    cls = check_spec(spec)
    lines = []
    for name, field in option_fields(cls).items():
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        lines.append(f"objective.{name} = {spec.get(name, default)!r}".ljust(48) + f"  # {field.metadata['help']}")
    return "\n".join(lines)


def objective_class(name: str) -> type[Objective]:
    """Returns the class of a registered name or an import path."""
    if not isinstance(name, str):
        raise UserError(f"objective.name is {name!r}; it is a name or an import path (package.module:Class).")
    if ":" in name:
        return import_path(name)
    if name not in REGISTRY:
        raise UserError(
            f"objective.name is {name!r}{nearest(name, REGISTRY)}; allowed: {', '.join(REGISTRY)}, "
            "or an import path (package.module:Class)."
        )
    return import_path(REGISTRY[name])


def build_objective(spec: Mapping[str, Any], setting: Setting) -> Objective:
    """Makes an objective of a config's `objective` table, {"name": ..., options...}."""
    return check_spec(spec).build(_options(spec), setting)


def rows_of(spec: Mapping[str, Any], host: Host) -> Any:
    """How the data makes rows for the objective that a config's table names: see `Objective.rows`."""
    return check_spec(spec).rows(_options(spec), host)


def _options(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "name"}


def text_spec(batch_size: int, context_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch that text data delivers: tokens, targets (the next tokens) and their weights, each [B, T]."""
    shape = (batch_size, context_length)
    return {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
        "targets": jax.ShapeDtypeStruct(shape, jnp.int32),
        "target_weights": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
