"""The model written again in float64 NumPy, from the formulas and with loops: what the tests compare with.

Nothing here is shared with gpt_jax.model, and no block, scan or mask structure: attention is four nested loops.
"""

import math

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def may_see(t, s, *, kind="causal", window=None, prefix=0, segments=None):
    """Whether query t may see key s, said as one sentence after the other."""
    if kind == "causal" and s > t:
        return False
    if kind == "prefix" and s > t and s >= prefix:
        return False
    if window is not None and abs(t - s) >= window:
        return False
    return segments is None or (segments[t] == segments[s] and segments[s] != 0)


def slopes(num_heads):
    """ALiBi slopes as the paper's appendix gives them, also for head counts that are no power of two."""
    power = 1
    while power * 2 <= num_heads:
        power *= 2
    first = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    if power == num_heads:
        return first
    return first + slopes_of(2 * power)[0::2][: num_heads - power]


def slopes_of(power):
    return [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]


def attention(
    q,
    k,
    v,
    *,
    kind="causal",
    window=None,
    prefix=None,
    segments=None,
    softcap=0.0,
    alibi=False,
    mix_scores=None,
    mix_weights=None,
):
    """q [B,T,H,K], k and v [B,T,G,K] -> [B,T,H,K]; a query that may see nothing gives NaN."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, K = q.shape
    group = H // k.shape[2]
    out = np.full(q.shape, np.nan)
    for b in range(B):
        for t in range(T):
            seen = [
                s
                for s in range(T)
                if may_see(
                    t,
                    s,
                    kind=kind,
                    window=window,
                    prefix=None if prefix is None else prefix[b],
                    segments=None if segments is None else segments[b],
                )
            ]
            if not seen:
                continue
            scores = np.array([[q[b, t, h] @ k[b, s, h // group] / math.sqrt(K) for s in seen] for h in range(H)])
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            if alibi:
                scores -= np.array(slopes(H))[:, None] * np.abs(t - np.array(seen))[None, :]
            if mix_scores is not None:
                scores = np.asarray(mix_scores, np.float64).T @ scores
            weights = np.stack([softmax(row) for row in scores])
            if mix_weights is not None:
                weights = np.asarray(mix_weights, np.float64).T @ weights
            for h in range(H):
                out[b, t, h] = sum(weights[h, i] * v[b, s, h // group] for i, s in enumerate(seen))
    return out


def erf(x):
    return np.vectorize(math.erf)(x)


ACTIVATIONS = {
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "relu_tanh": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "swiglu": lambda x: x / (1 + np.exp(-x)),
}


def normalise(x, p, kind="layernorm", eps=1e-5):
    if kind == "rmsnorm":
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * p["scale"]
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * p["scale"] + p.get("bias", 0.0)


def rotary(x, positions, base):
    """Complex multiplication of the pairs (i, i + K/2) by e^{i m theta}."""
    K = x.shape[-1]
    out = np.array(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for i in range(K // 2):
                z = (x[b, t, :, i] + 1j * x[b, t, :, i + K // 2]) * np.exp(1j * positions[b][t] * base ** (-2 * i / K))
                out[b, t, :, i], out[b, t, :, i + K // 2] = z.real, z.imag
    return out


def forward(params, config, tokens, *, segments=None, positions=None, kind="causal", prefix=None, hidden=False):
    """Logits [B, T, V] of the model whose parameters (a tree of arrays) and config are given; or its hidden states."""
    import jax

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    B, T = tokens.shape
    positions = np.broadcast_to(np.arange(T), (B, T)) if positions is None else positions
    H, G, K = config.num_heads, config.num_kv_heads or config.num_heads, config.head_dim or 0
    K = K or config.d_model // H
    x = p["embedding"][tokens]
    if config.positions == "learned":
        x = x + p["position_embedding"][positions]
    if "embedding_in" in p:
        x = x @ p["embedding_in"]["kernel"] + p["embedding_in"].get("bias", 0.0)
    for layer in range(config.num_layers):
        repetition, place = divmod(layer, len(config.pattern))
        w = jax.tree.map(lambda a, r=repetition: a[r], p["layers"][f"block_{place}"])
        window = config.window if config.pattern[place] == "band" else None
        a = w["attention"]
        y = normalise(x, w["attention_norm"], config.norm)
        if config.head_dims:
            qkv = np.einsum("btd,dcn->btcn", y, a["qkv"]["kernel"]) + a["qkv"].get("bias", 0.0)
            parts, start = [], 0
            for size in config.head_dims:
                q, k, v = (qkv[:, :, c, start : start + size][:, :, None] for c in range(3))
                parts.append(attention(q, k, v, kind=kind, window=window, prefix=prefix, segments=segments)[:, :, 0])
                start += size
            o = np.concatenate(parts, -1) @ a["out"]["kernel"] + a["out"].get("bias", 0.0)
        else:
            if G == H:
                qkv = np.einsum("btd,dchk->btchk", y, a["qkv"]["kernel"]) + a["qkv"].get("bias", 0.0)
                q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            else:
                q = np.einsum("btd,dhk->bthk", y, a["q"]["kernel"]) + a["q"].get("bias", 0.0)
                kv = np.einsum("btd,dcgk->btcgk", y, a["kv"]["kernel"]) + a["kv"].get("bias", 0.0)
                k, v = kv[:, :, 0], kv[:, :, 1]
            if config.qk_norm:
                q, k = normalise(q, a["q_norm"], "rmsnorm"), normalise(k, a["k_norm"], "rmsnorm")
            if config.positions == "rope":
                q, k = rotary(q, positions, config.rope_base), rotary(k, positions, config.rope_base)
            o = attention(
                q,
                k,
                v,
                kind=kind,
                window=window,
                prefix=prefix,
                segments=segments,
                softcap=config.attention_softcap,
                alibi=config.positions == "alibi",
                mix_scores=a.get("mix_scores"),
                mix_weights=a.get("mix_weights"),
            )
            o = np.einsum("bthk,hkd->btd", o, a["out"]["kernel"]) + a["out"].get("bias", 0.0)
        x = x + o
        m = w["mlp"]
        y = normalise(x, w["mlp_norm"], config.norm)
        act = ACTIVATIONS[config.ffn]
        if config.ffn == "swiglu":
            up = np.einsum("btd,dcf->btcf", y, m["up"]["kernel"]) + m["up"].get("bias", 0.0)
            h = act(up[:, :, 0]) * up[:, :, 1]
        else:
            h = act(y @ m["up"]["kernel"] + m["up"].get("bias", 0.0))
        y = h @ m["down"]["kernel"] + m["down"].get("bias", 0.0)
        x = x + (np.tanh(y) if config.ffn == "relu_tanh" else y)
    x = normalise(x, p["final_norm"], config.norm)
    if hidden:
        return x
    if "embedding_out" in p:
        x = x @ p["embedding_out"]["kernel"] + p["embedding_out"].get("bias", 0.0)
    table = p["embedding"] if config.tie_embeddings else p["head"]
    logits = x @ table[: config.vocab_size].T
    if config.logit_softcap:
        logits = config.logit_softcap * np.tanh(logits / config.logit_softcap)
    return logits
