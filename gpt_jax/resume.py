"""The state to continue a run with: the checkpoint's, or its weights under another optimizer."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt_jax import distributed
from gpt_jax.checkpoint import Checkpointer
from gpt_jax.checkpoint_folder import DoesNotFit
from gpt_jax.checkpoint_parts import restore_some
from gpt_jax.config_changes import compare
from gpt_jax.data.batches import BatchOrder
from gpt_jax.errors import Unavailable, UserError


def agreed_latest(checkpointer: Checkpointer, seconds: float = 60.0) -> int | None:
    """Returns the newest checkpoint that process 0 sees, once all processes see it; None if it sees none.

    A network file system may show what another host has written late, just after a restart: `seconds` are waited.

    Raises:
      Unavailable: on every process, if one does not see that checkpoint in time.
    """
    latest = distributed.gather(checkpointer.latest())[0]
    if latest is None:
        return None
    end = time.monotonic() + seconds
    while not (seen := latest in checkpointer.all_steps()) and time.monotonic() < end:
        time.sleep(0.2)
    found = distributed.gather([platform.node(), seen])
    for k, (host, there) in enumerate(found):
        if not there:
            raise Unavailable(
                f"process {k} on {host!r} does not see the checkpoint of step {latest} in "
                f"{str(checkpointer.directory)!r} that process 0 on {found[0][0]!r} sees."
            )
    return latest


def continued_state(
    checkpointer: Checkpointer,
    step: int,
    abstract_state: Any,
    fresh_state: Callable[[], Any],
    changed: Iterable[str],
    log: Callable[[str], None],
    config: Mapping[str, Any] | None = None,
) -> Any:
    """Restores a train state of a run, whose accepted changes may include another optimizer.

    Args:
      checkpointer, step: where it lies.
      abstract_state: of this run, frozen parameters left out.
      fresh_state: makes an initial state of the same form.
      changed: config keys that differ from the run's so far (accepted by the user).
      log: where lines for people go.
      config: of this run, resolved. What differs from the checkpoint's own then counts, not `changed`: after a change
        the run may have been killed before its next checkpoint.

    Returns:
      The state. Where the optimizer is another, or its state or the average of the weights has another form, those
      start afresh from the restored weights; the learning-rate schedule goes on after the updates so far.

    Raises:
      UserError: it does not fit and the optimizer did not change, or parameters do not fit; damaged.
    """
    saved = checkpointer.metadata(step).get("config") if config is not None else None
    changed = set(changed if saved is None else compare(saved, config).as_history())
    if not any(key.startswith("optimizer.") for key in changed):
        return checkpointer.restore(step, abstract_state)
    if not changed & {"optimizer.name", "optimizer.kwargs"} and not any(
        k.startswith("optimizer.kwargs.") for k in changed
    ):
        try:
            return checkpointer.restore(step, abstract_state)
        except DoesNotFit:
            pass
    kept = "step|params|ema|skipped"
    if {key for key in changed if key.startswith("optimizer.")} == {"optimizer.ema"}:
        kept += "|opt_state"  # of the same optimizer: the average alone is turned on or off
    state, done = restore_some(checkpointer.directory, step, fresh_state(), only=f"^({kept})($|/)")
    afresh = [name for name in done.initialised if name.startswith(("opt_state", "ema"))]
    if len(afresh) < len(done.initialised):  # parameters too: say which
        return checkpointer.restore(step, abstract_state)
    parts = []
    if any(name.startswith("opt_state") for name in afresh):
        parts.append("its optimizer state")
        updates = step - int(state.skipped[1])  # an update that was skipped does not move the schedule
        state = dataclasses.replace(state, opt_state=_at_update(state.opt_state, updates))
    if any(name.startswith("ema") for name in afresh):
        parts.append("its average of the weights")
        state = dataclasses.replace(state, ema=jax.tree.map(jnp.copy, state.params))
    if parts:
        log(f"the optimizer changed: {' and '.join(parts)} at step {step} is not used, the new one starts afresh")
    return state


def check_skip(changes: Mapping[str, Sequence[Any]], order: BatchOrder, step: int) -> None:
    """Raises UserError if another `data.skip` would change which batches the steps so far have read.

    Args:
      changes: {key: (old value, new value)}. order: of the run as it is to go on. step: where it goes on.
    """
    if "data.skip" not in changes:
        return
    old, new = (dataclasses.replace(order, skip=tuple(map(tuple, skip))) for skip in changes["data.skip"])
    read = old.batch_index(step - 1) + 1 if step else 0
    if [range(a, min(b, read)) for a, b in old.skipped if a < read] != [
        range(a, min(b, read)) for a, b in new.skipped if a < read
    ]:
        raise UserError(
            f"data.skip is now {new.skip}, was {old.skip}, and the batches before {read} are behind the run, at step "
            f"{step}: what is skipped there cannot change."
        )


def _at_update(opt_state: Any, updates: int) -> Any:
    """Moves the learning-rate schedules in an initial optimizer state to that many updates."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda node: node._replace(count=jnp.full_like(node.count, updates)) if is_schedule(node) else node,
        opt_state,
        is_leaf=is_schedule,
    )
