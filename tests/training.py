"""Short runs of an objective through the real train step, on one device."""

import jax
import numpy as np

from gpt_jax.optim import make_optimizer
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step


def train(objective, batches, rate=1e-3, weight_decay=0.0, seed=0, groups=(), **options):
    """Takes a step per batch: (state, metrics of each step as floats)."""
    optimizer = make_optimizer("adamw", rate, weight_decay=weight_decay, groups=groups, **options)
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batches[0])
    step = build_train_step(objective, optimizer, spec, mesh=make_mesh(devices=jax.devices()[:1]), seed=seed)
    state, rows = step.init(seed), []
    for batch in batches:
        state, metrics = step(state, step.put(batch))
        rows.append(metrics)
    return state, [{name: float(value) for name, value in row.items()} for row in jax.device_get(rows)]


def first_step(objective, batch):
    """The metrics of the first update, without those that say nothing of the objective."""
    metrics = train(objective, [batch])[1][0]
    return {name: value for name, value in metrics.items() if name not in ("lr", "skipped", "skipped_in_a_row")}


def rows_of(encoded, indices=None):
    """Rows of an EncodedTask as a batch, all of them by default."""
    indices = np.arange(encoded.rows_per_epoch) if indices is None else np.asarray(indices)
    return encoded.build(np.zeros(len(indices), np.int64), indices)
