"""What an update changes: parameters, optimizer state, averages; and how trained and frozen parameters part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import struct
from jax import Array

from gpt_jax.errors import UserError
from gpt_jax.sharding import is_boxed, path_name


@struct.dataclass
class TrainState:
    """All that an update changes, and the frozen parameters beside it.

    Attributes:
      step: batches consumed. params, frozen: trained and frozen parameters: the same tree, with None where the leaf is
        in the other. opt_state: optax's. ema: averaged params, or None. skipped: non-finite updates [in a row, in all].
    """

    step: Array
    params: Any
    frozen: Any
    opt_state: Any
    ema: Any
    skipped: Array

    @property
    def all_params(self) -> Any:
        return join(self.params, self.frozen)

    def eval_params(self, weights: str = "auto") -> Any:
        """What evaluation, sampling and export read: raw, ema, an optimizer's average, or (auto) an average if any."""
        chosen = self.params
        average = schedule_free_state(self.opt_state)
        if weights == "average" and average is None:
            raise UserError("eval.weights is 'average', but the optimizer keeps none (schedule-free ones do).")
        if average is not None and weights in ("average", "auto"):
            chosen = optax.contrib.schedule_free_eval_params(average, self.params)
        elif weights == "ema" or (weights == "auto" and self.ema is not None):
            if self.ema is None:
                raise UserError("eval.weights is 'ema', but optimizer.ema is 0: there is no average.")
            chosen = self.ema
        return join(chosen, self.frozen)


def schedule_free_state(opt_state: Any) -> Any:
    """Returns the part of an optimizer state whose evaluation parameters are an average, or None."""
    kind = optax.contrib.ScheduleFreeState
    parts = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return next((part for part in parts if isinstance(part, kind)), None)


def split(params: Any, frozen: Sequence[str]) -> tuple[Any, Any]:
    """Splits parameters by regexes over their names: (trained, frozen), None where the leaf is in the other."""

    def match(path: Any) -> bool:
        return any(re.fullmatch(regex, path_name(path)) for regex in frozen)

    with_path = jax.tree_util.tree_map_with_path
    trained = with_path(lambda path, leaf: None if match(path) else leaf, params, is_leaf=is_boxed)
    return trained, with_path(lambda path, leaf: leaf if match(path) else None, params, is_leaf=is_boxed)


def join(trained: Any, frozen: Any) -> Any:
    """Puts back together what `split` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)
