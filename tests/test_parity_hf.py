"""Logits and gradients of Hugging Face's GPT-2 under random weights: an implementation that shares nothing with ours.

Needs the extra `peer` (torch and transformers); skipped by name without it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative

from gpt_jax.model import ModelConfig, Transformer

torch = pytest.importorskip("torch", reason="torch is not installed (extra `peer`)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `peer`)")

L, D, H, V, T = 3, 48, 4, 97, 20


def ours(state):
    """Our tree of a GPT2LMHeadModel's state dict (or its gradients); kernels are stacked over layers."""
    get = {name.removeprefix("transformer."): np.asarray(x.detach().numpy()) for name, x in state.items()}

    def stack(name, shape):
        return np.stack([get[f"h.{i}.{name}"].reshape(shape) for i in range(L)])

    def layer_norm(name):
        return {"scale": stack(f"{name}.weight", (D,)), "bias": stack(f"{name}.bias", (D,))}

    K = D // H
    block = {
        "attention_norm": layer_norm("ln_1"),
        "attention": {  # GPT-2's Conv1D is x W + b with W [in, out], and out = (q | k | v) x heads x head_dim
            "qkv": {"kernel": stack("attn.c_attn.weight", (D, 3, H, K)), "bias": stack("attn.c_attn.bias", (3, H, K))},
            "out": {"kernel": stack("attn.c_proj.weight", (H, K, D)), "bias": stack("attn.c_proj.bias", (D,))},
        },
        "mlp_norm": layer_norm("ln_2"),
        "mlp": {
            "up": {"kernel": stack("mlp.c_fc.weight", (D, 4 * D)), "bias": stack("mlp.c_fc.bias", (4 * D,))},
            "down": {"kernel": stack("mlp.c_proj.weight", (4 * D, D)), "bias": stack("mlp.c_proj.bias", (D,))},
        },
    }
    padded = np.zeros((-(-V // 128) * 128, D), np.float32)
    padded[:V] = get["wte.weight"]
    return {
        "embedding": padded,
        "position_embedding": get["wpe.weight"],
        "layers": {"block_0": block},
        "final_norm": {"scale": get["ln_f.weight"], "bias": get["ln_f.bias"]},
    }


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=H, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide a mistake in them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model():
    return Transformer(ModelConfig(vocab_size=V, num_layers=L, d_model=D, num_heads=H, max_positions=T, unroll=1))


def tokens():
    return np.random.default_rng(0).integers(0, V, (3, T)).astype(np.int32)


def test_our_tree_is_complete(peer, model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens())["params"]
    mapped = ours(peer.state_dict())
    assert jax.tree.map(jnp.shape, mapped) == jax.tree.map(
        lambda x: x.value.shape, shapes, is_leaf=lambda x: hasattr(x, "names")
    )
    assert sum(p.numel() for p in peer.parameters()) == sum(x.size for x in jax.tree.leaves(mapped)) - (128 - V) * D


def test_logits_equal_hugging_faces(peer, model):
    with torch.no_grad():
        expected = peer(torch.tensor(tokens(), dtype=torch.long)).logits.numpy()
    got = jax.jit(model.apply)({"params": ours(peer.state_dict())}, tokens()).logits
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_loss_and_gradients_equal_hugging_faces(peer, model):
    from gpt_jax.objectives.causal_lm import CausalLM
    from gpt_jax.step import gradients

    ids = torch.tensor(tokens(), dtype=torch.long)
    peer.zero_grad()
    loss = peer(ids, labels=ids).loss  # mean over T - 1 targets of each row
    loss.backward()
    expected = ours({name: p.grad for name, p in peer.named_parameters()})
    weights = np.ones((3, T), np.float32)
    weights[:, -1] = 0
    batch = {"tokens": tokens(), "targets": np.roll(tokens(), -1, axis=1), "target_weights": weights}
    params = {"model": ours(peer.state_dict())}
    frozen = jax.tree.map(lambda x: None, params)
    run = jax.jit(lambda p: gradients(CausalLM(model), p, frozen, batch, step=jnp.int32(0), seed=0, microbatches=1))
    value, _, grads = run(params)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    assert relative(grads["model"], expected) < 2e-5
