"""Meshes, rules and the shardings of parameters and optimizer state, on eight simulated devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from helpers import tiny
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax.config import resolve
from gpt_jax.errors import UserError
from gpt_jax.model import Transformer
from gpt_jax.optim import make_optimizer
from gpt_jax.presets import GPT3
from gpt_jax.run import mesh_of
from gpt_jax.sharding import (
    DEFAULT_RULES,
    assert_sharded_like,
    batch_shardings,
    make_mesh,
    param_shardings,
    path_name,
    spec_for,
    state_shardings,
)


def test_a_mesh_takes_what_is_left_for_minus_one():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
    assert dict(make_mesh(tensor=2, data=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert dict(make_mesh({"fsdp": 1, "sequence": -1}).shape)["sequence"] == 8
    assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(tensor=3), r"tensor': 3.*does not make up the 8 devices"),
        (dict(data=2, fsdp=2), r"does not make up the 8 devices"),
        (dict(data=-1), r"one may be -1"),
        (dict(data=0), r"sizes are positive"),
        (dict(data=-2), r"sizes are positive"),
        (dict(tensr=2), r"a mesh axis is 'tensr' \(did you mean 'tensor'\?\)"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes)


def spec(logical, shape, rules=DEFAULT_RULES, **mesh):
    return tuple(spec_for(logical, shape, make_mesh(mesh), rules, "model/x"))


def test_rules_map_logical_axes_to_the_mesh():
    assert spec(("vocab", "embed"), (40, 16), fsdp=4, tensor=2) == ("tensor", "fsdp")
    assert spec(("layers", "embed", None, "heads", "head_dim"), (2, 16, 3, 4, 4), fsdp=4, tensor=2) == (
        None,
        "fsdp",
        None,
        "tensor",
        None,
    )
    assert spec(("batch", "sequence"), (8, 16), data=2, fsdp=2, sequence=2) == (("data", "fsdp"), "sequence")


def test_an_axis_that_does_not_divide_takes_the_next_rule_or_is_named():
    assert spec(("embed", "kv_heads"), (16, 2), fsdp=2, tensor=4) == ("fsdp", None)  # kv_heads may be replicated
    with pytest.raises(UserError, match=r"'model/x' has size 6 along 'heads', which tensor=4 does not divide; choose"):
        spec(("embed", "heads"), (16, 6), fsdp=2, tensor=4)
    rules = (("embed", "tensor"), ("embed", "fsdp"))
    assert spec(("embed",), (6,), rules, fsdp=2, tensor=4) == ("fsdp",)
    with pytest.raises(UserError, match="tensor=4 or fsdp=2"):
        spec(("embed",), (7,), rules, fsdp=2, tensor=4)


def test_a_rule_whose_mesh_axis_is_taken_or_of_size_one_gives_way_to_the_next():
    rules = (("embed", "tensor"), ("embed", "fsdp"), ("mlp", "fsdp"), ("mlp", "tensor"))
    assert spec(("embed",), (16,), rules, fsdp=8, tensor=1) == ("fsdp",)
    assert spec(("embed", "mlp"), (16, 16), (("embed", "fsdp"), *rules[2:]), fsdp=4, tensor=2) == ("fsdp", "tensor")
    assert spec(("embed", "embed"), (16, 16), rules[1:2], fsdp=8) == ("fsdp", None)  # never one mesh axis twice


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            "(('mlp', 'tensr'),)",
            r"the mesh axis of 'mlp' in mesh.rules is 'tensr' \(did you mean 'tensor'\?\); allowed",
        ),
        ("(('batch', ('data', 'fdsp')),)", r"the mesh axis of 'batch' in mesh.rules is 'fdsp' \(did you mean 'fsdp'"),
        ("(('embd', 'tensor'),)", r"a logical axis of mesh.rules is 'embd' \(did you mean 'embed'\?\); allowed"),
        ("('mlp', 'tensor')", r"mesh.rules has 'mlp'; a rule is a pair \(logical axis, mesh axis\)"),
        ("(('mlp',),)", r"mesh.rules has \('mlp',\); a rule is a pair"),
        ("(('mlp', ('tensor', 'tensor')),)", r"has \('mlp', \('tensor', 'tensor'\)\), which names a mesh axis twice"),
        ("(('sequence', ('sequence', 'tensor')),)", r"'tensor'\)\); 'sequence' takes one mesh axis or None"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(rules, message):
    with pytest.raises(UserError, match=message):
        mesh_of(resolve({}, {"mesh.rules": rules}))


def test_rules_that_mean_something_are_taken():
    config = resolve({}, {"mesh.rules": "(('mlp', None), ('embed', ('fsdp', 'tensor')), ('vocab', 'fsdp'))"})
    assert mesh_of(config).size == 8
    rules = (*config.mesh.rules, *DEFAULT_RULES)
    assert spec(("embed", "mlp"), (16, 16), rules, fsdp=4, tensor=2) == (("fsdp", "tensor"), None)
    assert spec(("vocab", "embed"), (40, 16), rules, fsdp=4, tensor=2) == ("fsdp", None)  # both of embed's are taken
    assert spec(("heads",), (4,), rules, fsdp=4, tensor=2) == ("tensor",)


def boxed(config, name="model"):
    init = Transformer(config).init
    return {name: jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]}


@pytest.mark.parametrize("name", GPT3)
def test_every_large_parameter_of_gpt3_is_cut_by_fsdp_and_tensor(name):
    tree = boxed(GPT3[name].config())
    mesh = make_mesh(fsdp=4, tensor=2)
    shapes = jax.tree_util.tree_leaves_with_path(nn.unbox(tree))
    for (path, leaf), sharding in zip(shapes, jax.tree.leaves(param_shardings(tree, mesh)), strict=True):
        kept = np.prod(sharding.shard_shape(leaf.shape)) / leaf.size
        if leaf.ndim > 2 and "kernel" in path_name(path):
            assert kept == 1 / 8, path_name(path)
        if "embedding" in path_name(path):
            assert kept <= 1 / 4


def test_a_parameter_without_logical_axes_is_an_error_that_names_it():
    with pytest.raises(UserError, match=r"parameter 'model/w' names no logical axes"):
        param_shardings({"model": {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}}, make_mesh())


def schedule_free(learning_rate):
    return optax.contrib.schedule_free(optax.adam(learning_rate, b1=0.0), learning_rate=learning_rate)


# name -> moments that each parameter must have in the state, sharded like it
OPTIMIZERS = {
    "adamw": (make_optimizer("adamw"), 2),
    "muon": (make_optimizer("muon"), 1),
    "schedule_free": (make_optimizer(f"{__name__}:schedule_free"), 2),
    "lion": (make_optimizer("optax:lion"), 1),
    "adabelief": (make_optimizer("optax:adabelief"), 2),
    "sgd": (make_optimizer("optax:sgd"), 0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_sharded_like_the_parameters_it_belongs_to(name):
    optimizer, moments = OPTIMIZERS[name]
    tree = boxed(tiny())
    mesh = make_mesh(fsdp=4, tensor=2)
    shardings = param_shardings(tree, mesh)
    params = nn.unbox(tree)
    state = jax.eval_shape(optimizer.tx.init, params)
    placed = state_shardings(state, params, shardings, mesh)
    found = {path_name(p): 0 for p, _ in jax.tree_util.tree_leaves_with_path(params)}
    wanted = dict(zip(found, jax.tree.leaves(shardings), strict=True))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(placed), strict=True):
        owner = next((n for n in found if path_name(path).endswith("/" + n)), None)
        if owner is None:
            assert leaf.size <= 64 and sharding.spec == PartitionSpec(), path_name(path)
        else:
            found[owner] += 1
            assert sharding == wanted[owner], path_name(path)
    assert all(n >= moments for n in found.values()), found


def test_shardings_go_by_name_and_not_by_shape_alone():
    mesh = make_mesh(fsdp=8)
    cut, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    leaf = jax.ShapeDtypeStruct((8,), jnp.float32)
    params, shardings = {"a": {"w": leaf}, "b": {"w": leaf}}, {"a": {"w": cut}, "b": {"w": whole}}
    state = {"mu": params, "w": leaf, "nu": {"a": {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}}}
    placed = state_shardings(state, params, shardings, mesh)
    assert placed["mu"]["a"]["w"] == cut and placed["mu"]["b"]["w"] == whole
    assert placed["w"].spec == PartitionSpec()  # 'w' alone names no parameter
    assert placed["nu"]["a"]["w"].spec == PartitionSpec()  # another shape: a factor, not a moment


def test_state_left_where_propagation_puts_it_is_noticed():
    mesh = make_mesh(fsdp=8)
    cut, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    params = {"w": jax.device_put(jnp.zeros(8), cut)}
    assert_sharded_like({"mu": params}, params)
    with pytest.raises(AssertionError, match=r"mu/w: .*instead of"):
        assert_sharded_like({"mu": {"w": jax.device_put(jnp.zeros(8), whole)}}, params)


def test_batches_are_cut_by_rows_and_long_rows_by_tokens():
    batch = {"tokens": jax.ShapeDtypeStruct((8, 12), jnp.int32), "label": jax.ShapeDtypeStruct((8,), jnp.int32)}
    placed = batch_shardings(batch, make_mesh(data=2, fsdp=2, sequence=2))
    assert placed["tokens"].shard_shape((8, 12)) == (2, 6)
    assert placed["label"].shard_shape((8,)) == (2,)
    pairs, rewards = jax.ShapeDtypeStruct((8, 2, 12), jnp.int32), jax.ShapeDtypeStruct((8, 3), jnp.float32)
    batch = {"dpo": {"tokens": pairs}, "text": {**batch, "target_weights": batch["tokens"], "rewards": rewards}}
    placed = batch_shardings(batch, make_mesh(fsdp=4, sequence=2))  # three rewards, which 2 does not divide, are whole
    assert placed["dpo"]["tokens"].shard_shape((8, 2, 12)) == (2, 2, 6)
    assert placed["text"]["target_weights"].shard_shape((8, 12)) == (2, 6)
    assert placed["text"]["rewards"].shard_shape((8, 3)) == (2, 3)
    with pytest.raises(
        UserError, match=r"the batch has 6 rows \(label\), which 8 devices \(data=4 x fsdp=2\) do not divide"
    ):
        batch_shardings({"label": jax.ShapeDtypeStruct((6,), jnp.int32)}, make_mesh(data=4, fsdp=2))
    with pytest.raises(UserError, match="13 tokens of a row do not divide by sequence=2"):
        batch_shardings({"tokens": jax.ShapeDtypeStruct((8, 13), jnp.int32)}, make_mesh(sequence=2))
