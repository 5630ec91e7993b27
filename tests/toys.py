"""An objective and a block as a user would write them. Bigram: no Transformer, two terms, draws in `prepare` and in
`loss`; it compiles fast."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gpt_jax.losses import cross_entropy
from gpt_jax.model.layers import MLP, Attention, Block, Norm
from gpt_jax.model.random import dropout, fold_name
from gpt_jax.objectives.base import Objective, check_options, text_spec
from gpt_jax.options import option

SIZE = 16  # tokens, and width


@dataclasses.dataclass(frozen=True)
class Bigram(Objective):
    """Next-token logits from the last token alone: "lm" on all targets, "some" on a random half of them."""

    coefs: Mapping[str, Any] = option({"lm": 1.0, "some": 0.5}, "weights of the terms")
    rate: float = option(0.25, "dropout of the embedding")

    @classmethod
    def build(cls, options, setting):
        return cls(**check_options(cls, options))

    def init(self, key, batch):
        def leaf(name, shape, names):
            return nn.Partitioned(0.5 * jax.random.normal(fold_name(key, name), shape), names)

        table = leaf("table", (SIZE, SIZE), ("vocab", "embed"))
        return {"model": {"table": table, "out": leaf("out", (SIZE, SIZE), ("embed", "vocab"))}}

    def batch_spec(self, batch_size, context_length):
        return text_spec(batch_size, context_length)

    def prepare(self, batch, keys, step):
        T = batch["tokens"].shape[1]
        some = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (T,)))(fold_name(keys, "some"))
        return {**batch, "weights": {"lm": batch["target_weights"], "some": batch["target_weights"] * some}}

    def token_losses(self, params, batch, keys):
        x = params["model"]["table"][batch["tokens"]]
        x = dropout(x, self.rate, fold_name(keys, "dropout")) if keys is not None else x
        return cross_entropy(x @ params["model"]["out"], batch["targets"])

    def loss(self, params, batch, keys, train):
        loss, nll = self.token_losses(params, batch, keys if train else None)
        weights = batch["weights"]
        sums = {term: jnp.sum(weights[term] * loss) for term in ("lm", "some")}
        mask = batch["target_weights"]
        return sums, {"nll": (jnp.sum(mask * nll), jnp.sum(mask))}


class ParallelBlock(Block):
    """Attention and the feed-forward layer side by side, as in GPT-J: y = x + Attention(norm(x)) + MLP(norm(x))."""

    @nn.compact
    def __call__(self, x_BxTxD, layer, positions, mask, cache, keys_B, taps=None):
        x = Norm(self.config, name="norm")(x_BxTxD)
        attention = Attention(self.config, self.kind, name="attention")
        h, cache, _ = attention(x, layer, positions, mask, cache, keys_B, taps)
        return x_BxTxD + h + MLP(self.config, name="mlp")(x), cache, {}
