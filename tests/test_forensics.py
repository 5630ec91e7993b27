"""Forensics: what first went wrong is named right, where it was planted, on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import params_of, text_batch, tiny

from gpt_jax.forensics.trace import first_bad, locate, places, trace_update
from gpt_jax.model import Transformer
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.optim import make_optimizer
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step

CONFIG = tiny(num_layers=4, pattern=("dense", "band"), window=4)


def setup(devices, z_loss=0.0):
    """(step, state, batch) with parameters in general position."""
    objective = CausalLM(Transformer(CONFIG), z_loss=z_loss)
    mesh = make_mesh(devices=jax.devices()[:devices])
    step = build_train_step(objective, make_optimizer("adamw", 1e-3), objective.batch_spec(8, 12), mesh=mesh)
    params = jax.tree.map(jax.device_put, {"model": params_of(CONFIG)}, step.shardings.params)
    return step, step.with_params(step.init(0), params), text_batch(uneven=False)


def changed(tree, names, change):
    """A tree with one leaf changed by a function on NumPy arrays, its sharding kept."""

    def one(path, leaf):
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith(names):
            return jax.device_put(change(np.array(leaf)), leaf.sharding)
        return leaf

    return jax.tree_util.tree_map_with_path(one, tree)


def plant(where, state, batch):
    """Plants a fault; layer 3 is block_1 of the second repetition, layer 2 block_0."""

    def times(factor, *index):
        def change(x):
            x[index] *= factor
            return x

        return change

    params = state.params
    if where == "attention":
        params = changed(params, "block_0/attention/qkv/kernel", times(1e22, 1, slice(None), slice(0, 2)))
    if where == "norm":
        params = changed(params, "block_1/mlp_norm/scale", times(2e38, 1))
    if where == "data":
        batch["target_weights"][3, 5] = np.nan
    if where == "moment":

        def spoil(x):
            x[1] = np.nan
            return x

        return dataclasses.replace(state, opt_state=changed(state.opt_state, "nu/model/final_norm/scale", spoil)), batch
    return dataclasses.replace(state, params=params), batch


EXPECTED = {
    "attention": dict(phase="forward", layer=2, module="attention", what="operation"),
    "norm": dict(phase="forward", layer=3, module="mlp_norm", what="operation"),
    "loss": dict(phase="forward", layer=None, module="loss", what="operation"),
    "data": dict(what="input", module="batch/target_weights", rows=(3,), tokens=(5,)),
    "moment": dict(what="input", rows=()),
}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_planted_faults_are_named(devices):
    plain = setup(devices)
    for where, expected in EXPECTED.items():
        step, state, batch = setup(devices, z_loss=1e38) if where == "loss" else plain
        state, batch = plant(where, state, {name: x.copy() for name, x in batch.items()})
        found = trace_update(step, state, step.put(batch), rows=8, tokens=12, period=2)
        assert found is not None, where
        for key, value in expected.items():
            assert getattr(found, key) == value, (where, found)
        if where == "moment":
            assert found.module.startswith("opt_state/") and found.module.endswith("nu/model/final_norm/scale")
        if where == "attention":
            assert "dot_general" in found.operation
            assert found.rows == tuple(range(8))
    step, state, batch = plain
    assert trace_update(step, state, step.put(batch), rows=8, tokens=12, period=2) is None


def trace(function, *arguments):
    closed = jax.make_jaxpr(function)(*arguments)
    names = [f"x{i}" for i in range(len(arguments))]
    return first_bad(closed, arguments, names, rows=4, tokens=3)


def test_what_is_masked_away_is_not_blamed():
    def function(x):
        hidden = jnp.where(x > 2, jnp.log(x - 2), 0.0)  # -inf and nan where nobody looks
        early = jnp.sum(jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf)))
        return jnp.sum(hidden) + early + jnp.sum(jnp.sqrt(x - 1.0))

    assert trace(function, jnp.full((4, 3), 5.0)) is None
    found = trace(function, jnp.full((4, 3), 5.0).at[2, 1].set(0.5))
    assert (found.operation, found.kind, found.rows, found.tokens) == ("sqrt", "nan", (2,), (1,))


def test_a_fault_of_the_backward_pass_is_named_so():
    factor = jnp.ones((4, 3)).at[1, 2].set(1e20)  # its square overflows, times 1e-30 it does not
    found = trace(jax.grad(lambda x: jnp.sum(x * factor * factor)), jnp.full((4, 3), 1e-30))
    assert found.operation == "mul" and found.phase == "backward" and found.rows == (1,) and found.tokens == (2,)


def test_the_turn_of_a_loop_is_the_layer():
    def block(x, w):
        with jax.named_scope("layers"), jax.named_scope("block_0"), jax.named_scope("mlp"):
            return x * w, None

    def function(weights):
        return jnp.sum(jax.lax.scan(block, jnp.full((4, 3), 1e30), weights)[0])

    weights = jnp.ones(5).at[3].set(1e30)
    found = trace(function, weights)
    assert (found.layer, found.module, found.operation) == (3, "mlp", "mul")
    back = trace(jax.grad(function), weights)
    assert back.layer == 3


def test_name_stacks_are_read():
    inner = "Transformer._encode/layers/block_1/attention/attention._project/qkv"
    assert locate(f"jvp(Transformer.encode)/{inner}", 2, 2) == ("forward", 5, "attention/qkv")
    assert locate(f"transpose(jvp(Transformer.encode))/{inner}", 0, 2) == ("backward", 1, "attention/qkv")
    assert locate("jvp(Transformer.encode)/Transformer._encode/final_norm", None) == ("forward", None, "final_norm")
    assert locate("jvp(Transformer.unembed)", None) == ("forward", None, "output layer")
    assert locate("jvp()", None) == ("forward", None, "loss")
    assert locate("optimizer", None)[0] == "optimizer"


def test_places_of_flattened_and_of_attention_tensors():
    bad = np.zeros((4 * 3, 5), bool)
    bad[7, 2] = True
    assert places(bad, 4, 3) == ((2,), (1,))
    scores = np.zeros((4, 2, 1, 3, 3), bool)
    scores[1, 0, 0, 2, 0] = True
    assert places(scores, 4, 3) == ((1,), (2,))
    assert places(np.ones((7, 5), bool), 4, 3) == ((), ())
