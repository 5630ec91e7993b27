"""FLOPs of traced programs against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny
from jax import lax

from gpt_jax.ahead import abstract_step
from gpt_jax.config import load
from gpt_jax.flops import count_flops, step_flops_per_token
from gpt_jax.model import Transformer
from gpt_jax.model.size import count_parameters
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.optim import make_optimizer
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step
from gpt_jax.throughput import model_flops_per_token
from gpt_jax.topologies import simulated


def flops(function, *shapes, trips=1):
    return count_flops(jax.make_jaxpr(function)(*(jnp.zeros(s) for s in shapes)), trips)


PRODUCT = 2 * 3 * 5 * 7


def test_a_product_is_twice_its_multiplications():
    assert flops(jnp.matmul, (3, 5), (5, 7)) == PRODUCT
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * PRODUCT
    assert flops(lambda a, b: a + b, (3, 5), (3, 5)) == 0


def test_loops_count_as_often_as_they_run_and_branches_by_the_larger():
    def scanned(a, b):
        return lax.scan(lambda c, _: (c + jnp.sum(a @ b), None), 0.0, None, length=6)[0]

    def repeated(a, b):
        return lax.while_loop(lambda c: c < 9.0, lambda c: c + jnp.sum(a @ b), 0.0)

    def branched(a, b):
        return lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: (a @ b) @ jnp.zeros((7, 7)))

    assert flops(scanned, (3, 5), (5, 7)) == 6 * PRODUCT
    assert flops(repeated, (3, 5), (5, 7), trips=4) == 4 * PRODUCT
    assert flops(branched, (3, 5), (5, 7)) == PRODUCT + 2 * 3 * 7 * 7


def test_every_device_of_a_shard_map_counts():
    mesh = make_mesh(fsdp=8)
    spec = jax.sharding.PartitionSpec("fsdp")
    program = jax.shard_map(lambda a: a @ a.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert flops(program, (16, 5)) == 8 * 2 * 2 * 2 * 5


def step_flops(**options):
    model = tiny(num_layers=6, bias=False, norm="rmsnorm", attention="dense", **options)
    objective = CausalLM(Transformer(model))
    mesh = make_mesh(devices=jax.devices()[:1])
    step = build_train_step(objective, make_optimizer("adamw"), objective.batch_spec(4, 12), mesh=mesh)
    return count_flops(step.trace().jaxpr), model


def layers_forward(model, tokens=48, length=12):
    """Products of all blocks, forward: two FLOPs a weight and token, and scores and values of all [T, T] pairs."""
    weights = sum(inputs * outputs for inputs, outputs in model.products.values())
    return model.num_layers * tokens * (2 * weights + 4 * length * model.d_model)


@pytest.mark.parametrize("unroll", [1, 0])
def test_a_train_step_has_three_times_the_products_of_its_forward_pass(unroll):
    counted, model = step_flops(unroll=unroll)
    forward = layers_forward(model) + 48 * 2 * model.padded_vocab * model.d_model
    assert counted == pytest.approx(3 * forward, rel=0.02)  # norms' gradients sum by products on a CPU
    padded = dataclasses.replace(model, vocab_size=model.padded_vocab, positions="none")
    formula = 48 * model_flops_per_token(count_parameters(padded), model.num_layers, model.d_model, 12)
    assert counted == pytest.approx(formula, rel=0.02)


def test_remat_adds_the_forward_pass_of_the_layers_once_but_for_its_last_product():
    plain, model = step_flops()
    again = step_flops(remat="full")[0] - plain
    unused = model.num_layers * 48 * 2 * model.ff_size * model.d_model  # nothing needs the output of "down" again
    assert again == pytest.approx(layers_forward(model) - unused, rel=0.02)


@pytest.mark.slow
def test_what_is_frozen_counts_as_often_as_it_is_multiplied():
    def per_token(name, **keys):
        keys = {"context_length": "64", "model.vocab_size": "256"} | keys
        config, step = abstract_step(load(name, keys), simulated(1))
        traced = count_flops(step.trace().jaxpr) / (config.batch_size * config.context_length)
        return step_flops_per_token(step.abstract, config.model, 64), traced, config.model

    ours, traced, model = per_token("quickstart")
    assert ours == model_flops_per_token(count_parameters(model), model.num_layers, model.d_model, 64)
    given = {"objective.teacher": "{'num_layers': 4, 'd_model': 256}"}
    ours, traced, student = per_token("distillation", **given)
    teacher = dataclasses.replace(student, num_layers=4, d_model=256)
    forward = model_flops_per_token(count_parameters(teacher), 4, 256, 64) / 3
    own = model_flops_per_token(count_parameters(student), student.num_layers, student.d_model, 64)
    assert ours == own + forward
    assert ours == pytest.approx(traced, rel=0.1)
    ours, _, model = per_token("lora")
    base = count_parameters(dataclasses.replace(model, lora_rank=0))
    trained = count_parameters(model) - base + 6 * (model.d_model + 1)  # and a head of six labels
    assert ours == 4 * base + 6 * trained + 12 * model.num_layers * model.d_model * 64
