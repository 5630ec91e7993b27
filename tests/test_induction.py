"""Trained on passages that repeat, two layers grow an induction head; one layer cannot."""

import jax
import numpy as np
import pytest

from gpt_jax.inspect.forward import subject_of
from gpt_jax.inspect.heads import head_patterns, repeated_tokens
from gpt_jax.model import ModelConfig, Transformer
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.optim import make_optimizer
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step

VOCAB, LENGTH, ROWS = 128, 48, 64


def batch(seed):
    """Rows whose passages differ in length and place; the loss is on the second passage."""
    tokens, period, start = repeated_tokens(np.random.default_rng(seed), ROWS, VOCAB, LENGTH)
    weights = np.zeros((ROWS, LENGTH), np.float32)
    for row in range(ROWS):
        weights[row, start[row] + period[row] : start[row] + 2 * period[row] - 1] = 1.0
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return {"tokens": tokens, "targets": targets, "target_weights": weights}


def patterns(layers):
    """What the heads of a trained model of so many layers do, on fresh passages."""
    shape = dict(num_layers=layers, d_model=64, num_heads=2, d_ff=64, vocab_multiple=8)
    model = Transformer(ModelConfig(vocab_size=VOCAB, positions="rope", norm="rmsnorm", bias=False, **shape))
    objective, mesh = CausalLM(model), make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer("muon", 0.02, weight_decay=0.0)
    step = build_train_step(objective, optimizer, objective.batch_spec(ROWS, LENGTH), mesh=mesh)
    state = step.init(0)
    for number in range(450):
        state, _ = step(state, step.put(batch(number)))
    return head_patterns(subject_of(model, state.params["model"]), rows=64, length=LENGTH, seed=10**6)


@pytest.mark.slow
def test_two_layers_grow_an_induction_head_over_a_previous_token_head_and_one_layer_cannot():
    one, two = (patterns(layers) for layers in (1, 2))
    assert two["induction"].max() > 0.5 and one["induction"].max() < 0.1
    layer, _ = np.unravel_index(two["induction"].argmax(), (2, 2))
    assert layer == 1 and two["previous"][0].max() > 0.5 and two["induction"][0].max() < 0.1
    assert two["second_loss"] < 1.0 < 3.0 < one["second_loss"]  # only the head foretells the second passage
