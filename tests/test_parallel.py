"""Every mesh shape gives the loss and the gradient of one device: products of axes, accumulation, scan, remat."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative, text_batch, tiny

from gpt_jax.errors import UserError
from gpt_jax.model import Transformer
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.objectives.dpo import DPO
from gpt_jax.objectives.replaced_token import ReplacedToken
from gpt_jax.optim import make_optimizer
from gpt_jax.presets import GPT3
from gpt_jax.sharding import make_mesh, replicated_bytes, too_replicated
from gpt_jax.step import build_train_step, gradients

ROWS, LENGTH = 16, 12
MESHES = {
    "fsdp8": dict(fsdp=8),
    "tensor4_data2": dict(tensor=4, data=2, fsdp=1),
    "fsdp2_tensor2_sequence2": dict(fsdp=2, tensor=2, sequence=2),
}
LONG = {"fsdp2_sequence2": dict(fsdp=2, sequence=2, data=2), "fsdp2_sequence4": dict(fsdp=2, sequence=4)}


def objective_of(name, mesh, **options):
    model = Transformer(tiny(d_ff=32, flatten=mesh.get("sequence", 1) == 1, **options))
    if name == "causal_lm":
        return CausalLM(model, label_smoothing=0.1, z_loss=1e-3)
    if name == "dpo":
        return DPO(model)
    return ReplacedToken(model, mask_token=36, specials=(36,), fraction=0.5, generator={"num_heads": 4})


def batch_of(name):
    """Rows of text; for preferences, pairs of them."""
    if name != "dpo":
        return text_batch(ROWS, LENGTH)
    text = text_batch(2 * ROWS, LENGTH)
    text |= {"segment_ids": np.ones((2 * ROWS, LENGTH), np.int32), "answer_weights": text.pop("target_weights")}
    text["positions"] = np.tile(np.arange(LENGTH, dtype=np.int32), (2 * ROWS, 1))
    pairs = {key: np.reshape(value, (ROWS, 2, LENGTH)) for key, value in text.items()}
    return pairs | {"row_weights": np.ones(ROWS, np.float32)}


@functools.cache
def result(objective, mesh_name, microbatches, options):
    """Loss and gradient of one batch, on the devices of a mesh; '' is one device, and nothing but the plain model."""
    sizes = (MESHES | LONG).get(mesh_name, {})
    plugin = objective_of(objective, sizes, **dict(options))
    devices = jax.devices()[: 8 if sizes else 1]
    batch = batch_of(objective)
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    step = build_train_step(
        plugin, make_optimizer("adamw"), spec, mesh=make_mesh(sizes, devices), microbatches=microbatches
    )

    @functools.partial(
        jax.jit,
        in_shardings=(step.shardings.params, step.shardings.frozen, step.batch_shardings),
        out_shardings=(None, step.shardings.params),
    )
    def run(params, frozen, batch):
        loss, _, grads = gradients(
            plugin, params, frozen, batch, step=jnp.zeros((), jnp.int32), seed=0, microbatches=microbatches
        )
        return loss, grads

    with step.context():
        params = jax.tree.map(in_general_position, step.abstract.params)
        params = jax.device_put(params, step.shardings.params)
        frozen = jax.tree.map(lambda leaf: 0.9 * in_general_position(leaf), step.abstract.frozen)
        loss, grads = run(params, jax.device_put(frozen, step.shardings.frozen), step.put(batch))
    return float(loss), jax.device_get(grads)


def in_general_position(leaf):
    draw = np.random.default_rng(leaf.shape[0] + 7 * leaf.ndim).normal(size=leaf.shape)
    return (0.2 * draw + (leaf.ndim == 1)).astype(leaf.dtype)


def check(objective, mesh, microbatches=1, **options):
    loss, grads = result(objective, mesh, microbatches, tuple(options.items()))
    plain_loss, plain_grads = result(objective, "", 1, (("attention", "dense"),))
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert relative(grads, plain_grads) < 1e-5
    assert any(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_gives_the_loss_and_gradient_of_one_device(mesh):
    check("causal_lm", mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", LONG)
def test_two_sequences_to_a_row_on_a_mesh_that_cuts_them_give_those_of_one_device(mesh):
    check("dpo", mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_two_networks_on_a_mesh_give_those_of_one_device(mesh):
    check("replaced_token", mesh)


EXECUTIONS = {
    "accumulated": dict(microbatches=2),
    "unrolled": dict(unroll=0),
    "remat": dict(remat="full"),
    "remat_dots": dict(remat="dots_no_batch"),
    "chunks": dict(attention="chunks", query_block=3),
    "all_at_once": dict(microbatches=2, unroll=0, remat="full", attention="chunks", query_block=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", EXECUTIONS)
@pytest.mark.parametrize("mesh", MESHES)
def test_execution_on_a_mesh_changes_neither_loss_nor_gradient(mesh, how):
    check("causal_lm", mesh, **EXECUTIONS[how])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_two_networks_accumulated_and_recomputed_on_a_mesh_give_those_of_one_device(mesh):
    check("replaced_token", mesh, microbatches=2, remat="full")


def test_slices_are_laid_along_their_axis_and_all_else_stays_within_one():
    devices = jax.devices()
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2), devices, slices=2)
    assert [{d.id // 4 for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    mesh = make_mesh(dict(data=1, fsdp=4, tensor=2), devices, slices=2, slice_axis="fsdp")
    assert [{d.id // 4 for d in mesh.devices[0, i].flat} for i in range(4)] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match=r"mesh.data is 1, which the 2 slices do not divide.*mesh.slice_axis"):
        make_mesh(dict(fsdp=8), devices, slices=2)
    with pytest.raises(UserError, match="mesh.slices is 3, which does not divide the 8 devices"):
        make_mesh(dict(data=2), devices, slices=3)
    with pytest.raises(UserError, match=r"mesh.slice_axis is 'tensor'; allowed: data, fsdp"):
        make_mesh(dict(data=2), devices, slices=2, slice_axis="tensor")


def shardings_of(model, mesh, **options):
    step = build_train_step(
        CausalLM(Transformer(model)),
        make_optimizer("adamw"),
        CausalLM(Transformer(model)).batch_spec(8, 12),
        mesh=mesh,
        **options,
    )
    return step.abstract.params, step.shardings.params


@pytest.mark.parametrize("name", GPT3)
def test_fsdp_leaves_at_most_two_percent_of_gpt3_whole(name):
    shapes, shardings = shardings_of(GPT3[name].config(), make_mesh(fsdp=4, tensor=2))
    part, names = replicated_bytes(shapes, shardings)
    assert 0 < part < 0.02
    assert all("norm" in n or "bias" in n for n in names), names
    assert too_replicated(part, names) == ""


def test_parameters_that_fsdp_leaves_whole_are_named_the_largest_first():
    shapes, shardings = shardings_of(tiny(), make_mesh(), rules=(("batch", ("data", "fsdp")), ("mlp", "fsdp")))
    said = too_replicated(*replicated_bytes(shapes, shardings))
    assert re.match(r"\d\d\.\d% of the parameters' bytes are whole .*: model/layers/.*qkv/kernel", said)
    assert replicated_bytes(*shardings_of(tiny(), make_mesh(devices=jax.devices()[:1])))[0] == 0


def test_a_remat_policy_keeps_less_than_the_one_before_it():
    def temporaries(name):
        model = tiny(num_layers=4, d_model=32, max_positions=64, remat=name, attention="dense", unroll=1)
        objective = CausalLM(Transformer(model))
        mesh = make_mesh(devices=jax.devices()[:1])
        step = build_train_step(objective, make_optimizer("adamw"), objective.batch_spec(16, 64), mesh=mesh)
        return step.lower().compile().memory_analysis().temp_size_in_bytes

    none, dots, dots_no_batch, full = map(temporaries, ("none", "dots", "dots_no_batch", "full"))
    assert full < dots_no_batch < dots < none  # 4.7, 6.8, 11.6 and 13.2 MB
    assert full < 0.5 * none


def test_a_remat_policy_that_is_none_is_an_error_that_names_the_nearest():
    with pytest.raises(UserError, match=r"remat is 'ful' \(did you mean 'full'\?\); allowed: none, full"):
        tiny(remat="ful")
