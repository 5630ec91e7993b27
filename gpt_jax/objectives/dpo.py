"""Direct preference optimisation: a policy from pairs of answers, the better one named (Rafailov et al. 2023).

    loss = -log sigmoid(beta (log pi(y_c|x) / pi_ref(y_c|x) - log pi(y_r|x) / pi_ref(y_r|x)))

for a chosen answer y_c and a rejected one y_r, each log-probability summed over the answer's tokens and the EOT that
ends it. The root "reference" is pi_ref: frozen, sharded like the model, and a copy of the weights that the run starts
from. Under Bradley-Terry labels, P(a over b) = sigmoid(r_a - r_b), the least loss is at pi ~ pi_ref e^{r / beta}, the
optimum of E[r] - beta KL(pi || pi_ref) too. At pi = pi_ref the loss is ln 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gpt_jax.data.formats import Arrays, Row, TaskInfo
from gpt_jax.errors import UserError
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import Batch, Host, Objective, Params, check_options
from gpt_jax.objectives.text import token_losses
from gpt_jax.options import option

SIDES = ("chosen", "rejected")
_TOKENS = ("tokens", "targets", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True)
class PairRows:
    """Two sequences per example, EOT prompt answer EOT: the chosen answer's, then the rejected one's (an ExampleRows).

    What is too long loses the end of the answers beyond half a row, then the beginning of the prompt, the same in both.
    """

    eot: int
    length: int
    kind: str = "preference"
    pack: bool = False
    generates: bool = False

    @property
    def arrays(self) -> Arrays:
        pair = (2, self.length)
        tokens = {name: (pair, np.int32) for name in _TOKENS}
        return {**tokens, "answer_weights": (pair, np.float32), "row_weights": ((), np.float32)}

    def encode(self, example: Any, task: TaskInfo, tokenizer: Any) -> list[Row]:
        prompt = [self.eot, *tokenizer.encode(example.prompt).tolist()]
        answers = [[*tokenizer.encode(text).tolist(), self.eot] for text in (example.chosen, example.rejected)]
        return [self.row(prompt, answers)]

    def row(self, prompt: list[int], answers: Sequence[list[int]]) -> Row:
        """Lays out a prompt and its two answers, ids as `encode` makes them."""
        room = max(self.length + 1 - len(prompt), (self.length + 1) // 2)
        answers = [answer[:room] for answer in answers]
        left = self.length + 1 - max(map(len, answers))
        if len(prompt) > left:
            prompt = [*prompt[:1], *prompt[len(prompt) - left + 1 :]]
        row = {name: np.zeros((2, self.length), kind) for name, (shape, kind) in self.arrays.items() if shape}
        for side, answer in enumerate(answers):
            ids = np.array([*prompt, *answer], np.int32)
            n = len(ids) - 1
            row["tokens"][side, :n], row["targets"][side, :n] = ids[:-1], ids[1:]
            row["answer_weights"][side, len(prompt) - 1 : n] = 1.0
            row["segment_ids"][side, :n] = 1
            row["positions"][side, :n] = np.arange(n)
        return {**row, "row_weights": np.float32(1.0)}

    def predictions(self, outputs: Mapping[str, np.ndarray], encoded: Any) -> list[int]:
        return outputs["answer"].tolist()


@dataclasses.dataclass(frozen=True)
class DPO(Objective):
    """The term "dpo"; metrics: "accuracy" (the chosen answer has the larger log pi / pi_ref), "margin" (beta times the
    difference), and log pi / pi_ref of each answer, "chosen_log_ratio" and "rejected_log_ratio", nats.

    Batch: tokens, targets, answer_weights, segment_ids, positions [B, 2, T], the chosen answer first; row_weights [B].
    """

    model: Transformer
    coefs: Mapping[str, Any] = option({"dpo": 1.0}, "weight of the term 'dpo'")
    beta: float = option(0.1, "how closely the policy keeps to the reference")
    label_smoothing: float = option(0.0, "probability that a label is the wrong way round")

    def __post_init__(self) -> None:
        if not self.beta > 0 or not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"objective.beta is {self.beta!r} and objective.label_smoothing {self.label_smoothing!r}; "
                "they must be above 0, and in [0, 0.5)."
            )

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("reference/.*",)

    @property
    def copies(self) -> dict[str, str]:
        return {"reference": "model"}

    @classmethod
    def rows(cls, options: Mapping[str, Any], host: Host) -> PairRows:
        cls(model=None, **check_options(cls, options))
        return PairRows(host.special("eot"), host.context_length)

    def init(self, key: Array, batch: Batch) -> Params:
        roots = ("model", "reference")
        return {root: self.model.init(key, batch["tokens"][:, 0])["params"] for root in roots}

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        shape = (batch_size, 2, context_length)
        tokens = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in _TOKENS}
        weights = {"answer_weights": shape, "row_weights": (batch_size,)}
        return tokens | {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in weights.items()}

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        return {**batch, "weights": {"dpo": batch["row_weights"]}}

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        ratios_Bx2 = self.log_ratios(params, batch, keys if train else None)
        margin_B = self.beta * (ratios_Bx2[:, 0] - ratios_Bx2[:, 1])
        s = self.label_smoothing
        loss_B = (1.0 - s) * jax.nn.softplus(-margin_B) + s * jax.nn.softplus(margin_B)
        rows = batch["row_weights"]
        measured = {"accuracy": margin_B > 0, "margin": margin_B}
        measured |= {f"{side}_log_ratio": ratios_Bx2[:, i] for i, side in enumerate(SIDES)}
        metrics = {name: (jnp.sum(rows * x), jnp.sum(rows)) for name, x in lax.stop_gradient(measured).items()}
        return {"dpo": jnp.sum(batch["weights"]["dpo"] * loss_B)}, metrics

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """The answer that the policy prefers to the reference: 0, the chosen one, or 1, also where neither is."""
        ratios_Bx2 = self.log_ratios(params, batch, None)
        return {"answer": jnp.where(ratios_Bx2[:, 0] > ratios_Bx2[:, 1], 0, 1)}

    def log_ratios(self, params: Params, batch: Batch, keys_B: Array | None) -> Array:
        """log pi / pi_ref of the two answers of each row, nats. [B, 2]."""
        ours = self._log_probs(params["model"], batch, keys_B)
        return ours - lax.stop_gradient(self._log_probs(params["reference"], batch, None))

    def _log_probs(self, params: Any, batch: Batch, keys_B: Array | None) -> Array:
        B, _, T = batch["tokens"].shape
        flat = {name: batch[name].reshape(2 * B, T) for name in _TOKENS}
        # The two answers of a row share its dropout, so that their difference is of the answers alone.
        keys = None if keys_B is None else jnp.repeat(keys_B, 2, axis=0)
        loss, _ = token_losses(
            self.model,
            params,
            flat["tokens"],
            flat["targets"],
            mask=Mask(segments_BxT=flat["segment_ids"]),
            positions_BxT=flat["positions"],
            keys_B=keys,
        )
        return -jnp.sum(batch["answer_weights"] * loss.reshape(B, 2, T), axis=-1)
