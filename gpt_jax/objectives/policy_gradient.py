"""Policy gradient: raise the probability of sampled answers that a reward prefers, near a reference.

The source of gpt_jax/rollout.py draws G answers y_1..y_G to each prompt from the current policy, rewards them, and
keeps the log-probabilities b that the policy had then. With pi the policy being trained and rho = pi / b:

    R_i = r_i, or r_i - beta log(b / pi_ref)(y_i)                      kl="reward"
    A_i = R_i - mean of the others'                                    baseline="leave_one_out" (RLOO)
          R_i - mean of the group, over its standard deviation + 1e-4  baseline="group", std=True (GRPO)
    loss = -min(rho A, clip(rho, 1 - c, 1 + c) A)                      of each token, or of the whole answer (`ratio`)
           + beta k3, k3 = e^d - d - 1, d = log pi_ref - log pi        kl="loss"
           + beta rho k3                                               kl="weighted"

`length`: an answer counts by the mean of its tokens ('sequence', GRPO), by their sum ('none', Dr. GRPO: Liu et al.
2025), or every token of the batch counts alike ('token', DAPO).

Which optimum: let J = E[r] - beta KL(pi || pi_ref), at its best for pi* ~ pi_ref e^{r / beta}. With answers of one
token kl="reward" and kl="weighted" go to pi*. kl="loss" differentiates k3 through pi alone, which is the gradient of
KL(pi_ref || pi): its optimum is pi = beta pi_ref / (lambda - r) instead (lambda so that it sums to 1), although it is
what GRPO does. Dividing by the standard deviation s of the rewards under pi puts beta s in the place of beta where the
KL is in the loss. For longer answers kl="weighted" is exact with ratio="sequence"; with ratio="token" it takes the
tokens before as given.

REINFORCE: Williams 1992; leave-one-out: Kool et al. 2019, Ahmadian et al. 2024; GRPO: Shao et al. 2024, section 4.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from gpt_jax.errors import UserError, choose
from gpt_jax.losses import cross_entropy
from gpt_jax.model import Mask, Transformer
from gpt_jax.objectives.base import Batch, Host, Objective, Params, check_options
from gpt_jax.objectives.supervised import MASKS, PromptRows, Supervised
from gpt_jax.options import option
from gpt_jax.rewards import read_specs

# What an algorithm is, where the config does not say otherwise.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "reinforce": dict(baseline="leave_one_out", std=False, length="none", ratio="sequence", clip=0.0, kl="reward"),
    "grpo": dict(baseline="group", std=True, length="sequence", ratio="token", clip=0.2, kl="loss"),
    "dr_grpo": dict(baseline="group", std=False, length="none", ratio="token", clip=0.2, kl="loss"),
}
BASELINES = ("leave_one_out", "group", "none")
LENGTHS = ("none", "sequence", "token")
RATIOS = ("sequence", "token")
KLS = ("none", "reward", "loss", "weighted")
STD_FLOOR = 1e-4


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Objective):
    """The terms "policy" and, with kl in the loss, "kl".

    Metrics: "reward" and "reward/NAME" of each reward; of the answers "length" in tokens and "kl", the mean sum of k3,
    nats; of their tokens "entropy" of the policy, nats, and "clipped", the part whose ratio left the clipping range;
    "reward_std", the mean standard deviation of a group's rewards: 0 teaches nothing.

    Batch: tokens, targets, target_weights (1 on the answer), prefix, segment_ids, positions, behaviour_logprobs,
    reference_logprobs [B, T]; of an answer's group, group_rewards and group_kl [B, G], and which of it it is, member
    [B]; rewards [B, K].
    """

    model: Transformer
    algorithm: str = option("reinforce", " | ".join(ALGORITHMS) + ": what the options left empty are")
    baseline: str = option("", " | ".join(BASELINES))
    std: bool | None = option(None, "divide advantages by the standard deviation of the group's rewards")
    length: str = option("", " | ".join(LENGTHS) + ": an answer's tokens are summed, averaged, or all count alike")
    ratio: str = option("", " | ".join(RATIOS) + ": what is clipped")
    clip: float | None = option(None, "the ratio is clipped to [1 - clip, 1 + clip]; 0 is off")
    kl: str = option("", " | ".join(KLS) + ": where the divergence from the reference stands")
    beta: float = option(0.04, "weight of the divergence")
    rewards: tuple[Any, ...] = option(
        ("exact_match",), "names or {'name', 'weight', 'as', options} (gpt_jax/rewards.py); weight 0 is only logged"
    )
    rollout_every: int = option(4, "steps that a rollout serves; checkpoints fall between rollouts")
    rollout_epochs: int = option(1, "times that each answer is used; a divisor of rollout_every")
    group: int = option(8, "answers to a prompt")
    max_new: int = option(32, "tokens of an answer at most")
    temperature: float = option(1.0, "of the policy, when it draws and when it is trained")
    mask: str = option("causal", "causal | prefix: as the run that it starts from was trained")
    generate_rows: int = option(64, "answers generated together: bounds the memory of the cache")

    def __post_init__(self) -> None:
        choose("objective.algorithm", self.algorithm, ALGORITHMS)
        for name, value in ALGORITHMS[self.algorithm].items():
            if getattr(self, name) in ("", None):
                object.__setattr__(self, name, value)
        for name, allowed in (("baseline", BASELINES), ("length", LENGTHS), ("ratio", RATIOS), ("kl", KLS)):
            choose(f"objective.{name}", getattr(self, name), allowed)
        choose("objective.mask", self.mask, MASKS)
        if isinstance(self.rewards, str):  # one name, as typed
            object.__setattr__(self, "rewards", (self.rewards,))
        if len(set(self.reward_names)) < len(self.rewards):
            raise UserError(f"objective.rewards has {', '.join(self.reward_names)}: name one of two anew by 'as'.")
        if self.length == "sequence" and self.ratio == "sequence":
            raise UserError("objective.length is 'sequence', a mean of tokens; with ratio='sequence' there is none.")
        if self.baseline != "none" and self.group < 2:
            raise UserError(f"objective.group is {self.group}; a baseline of the group needs at least 2 answers.")
        for name, ok, allowed in (
            ("beta", self.beta >= 0, "0 or more"),
            ("clip", 0 <= self.clip < 1, "in [0, 1)"),
            ("temperature", self.temperature > 0, "above 0"),
            ("group", self.group >= 1, "at least 1"),
            ("max_new", self.max_new >= 1, "at least 1"),
            ("generate_rows", self.generate_rows >= 1, "at least 1"),
            ("rollout_every", self.rollout_every >= 1, "at least 1"),
            (
                "rollout_epochs",
                self.rollout_epochs >= 1 and self.rollout_every % self.rollout_epochs == 0,
                f"a divisor of rollout_every ({self.rollout_every})",
            ),
        ):
            if not ok:
                raise UserError(f"objective.{name} is {getattr(self, name)!r}; it must be {allowed}.")

    @property
    def has_reference(self) -> bool:
        return self.kl != "none" and self.beta > 0

    @property
    def coefs(self) -> dict[str, float]:
        in_loss = self.has_reference and self.kl in ("loss", "weighted")
        return {"policy": 1.0} | ({"kl": self.beta} if in_loss else {})

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("reference/.*",) if self.has_reference else ()

    @property
    def copies(self) -> dict[str, str]:
        return {"reference": "model"} if self.has_reference else {}

    @classmethod
    def rows(cls, options: Mapping[str, Any], host: Host) -> PromptRows:
        own = cls(model=None, **check_options(cls, options))  # for the defaults
        return PromptRows(host.special("eot"), host.context_length, "target", own.max_new, own.mask == "prefix")

    def parts(self) -> dict[str, tuple[Objective, float]]:
        """Validation is that of supervised text to text: the likelihood of targets, and generated text scored."""
        return {"": (Supervised(self.model, mask=self.mask, max_new=self.max_new), 1.0)}

    def feed(self, source: Any) -> Any:
        from gpt_jax.rollout import RolloutSource

        return RolloutSource(self, source)

    def init(self, key: Array, batch: Batch) -> Params:
        roots = ("model", "reference") if self.has_reference else ("model",)
        return {root: self.model.init(key, batch["tokens"])["params"] for root in roots}

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        B, T, f = batch_size, context_length, jnp.float32
        shapes = {name: ((B, T), jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        shapes |= {name: ((B, T), f) for name in ("target_weights", "behaviour_logprobs", "reference_logprobs")}
        shapes |= {"prefix": ((B, T), jnp.bool_), "member": ((B,), jnp.int32)}
        shapes |= {"group_rewards": ((B, self.group), f), "group_kl": ((B, self.group), f)}
        shapes |= {"rewards": ((B, len(self.rewards)), f)}
        return {name: jax.ShapeDtypeStruct(shape, kind) for name, (shape, kind) in shapes.items()}

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        """Adds advantages [B] and share [B, T], what each token counts for in the sum over its answer."""
        mask = batch["target_weights"]
        used_B = jnp.any(mask > 0, axis=1).astype(jnp.float32)
        share = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0) if self.length == "sequence" else mask
        weights = mask if self.length == "token" else used_B
        terms = {term: weights for term in self.coefs}
        return {**batch, "advantages": self.advantages(batch), "share": share, "used": used_B, "weights": terms}

    def advantages(self, batch: Batch) -> Array:
        """A of each answer, [B]; exactly 0 where all of the group have the same."""
        values_BxG = batch["group_rewards"]
        if self.kl == "reward":
            values_BxG = values_BxG - self.beta * batch["group_kl"]
        own_Bx1 = jnp.take_along_axis(values_BxG, batch["member"][:, None], axis=1)
        if self.baseline == "none":
            return own_Bx1[:, 0]
        above_BxG = own_Bx1 - values_BxG  # differences first: equal rewards leave no rounding behind
        others = self.group - 1 if self.baseline == "leave_one_out" else self.group
        advantage = jnp.sum(above_BxG, axis=1) / others
        return advantage / (jnp.std(above_BxG, axis=1) + STD_FLOOR) if self.std else advantage

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        mask, share, A_B = batch["target_weights"], batch["share"], batch["advantages"]
        logp, entropy = self.token_log_probs(params["model"], batch, keys if train else None)
        change = mask * (logp - batch["behaviour_logprobs"])
        log_ratio = jnp.sum(change, axis=1, keepdims=True) if self.ratio == "sequence" else change
        ratio = jnp.exp(log_ratio)  # [B, T] or [B, 1]
        gain = ratio * A_B[:, None]
        outside = jnp.zeros_like(ratio)
        if self.clip:
            near = jnp.clip(ratio, 1.0 - self.clip, 1.0 + self.clip)
            gain, outside = jnp.minimum(gain, near * A_B[:, None]), (near != ratio).astype(jnp.float32)
        # A ratio of the whole answer is one value; where all tokens count alike it stands for each of them.
        once = self.ratio == "sequence" and self.length != "token"
        weights = batch["weights"]
        sums = {"policy": -_weighted(weights["policy"], gain, jnp.ones_like(gain) if once else share)}
        k3 = jnp.zeros_like(logp)
        if self.has_reference:
            d = mask * (batch["reference_logprobs"] - logp)
            k3 = jnp.exp(d) - d - 1.0
            if "kl" in self.coefs:
                sums["kl"] = _weighted(weights["kl"], k3 * (ratio if self.kl == "weighted" else 1.0), share)
        return sums, self._metrics(batch, entropy, k3, outside)

    def _metrics(self, batch: Batch, entropy: Array, k3: Array, outside: Array) -> dict:
        mask, used = batch["target_weights"], batch["used"]
        rows, tokens = jnp.sum(used), jnp.sum(mask)
        own = jnp.take_along_axis(batch["group_rewards"], batch["member"][:, None], axis=1)[:, 0]
        of_answers = {"reward": own, "reward_std": jnp.std(batch["group_rewards"], axis=1)}
        of_answers |= {"length": jnp.sum(mask, axis=1), "kl": jnp.sum(mask * k3, axis=1)}
        of_answers |= {f"reward/{name}": batch["rewards"][:, k] for k, name in enumerate(self.reward_names)}
        of_tokens = {"entropy": entropy, "clipped": outside}
        metrics = {name: (jnp.sum(used * x), rows) for name, x in of_answers.items()}
        metrics |= {name: (jnp.sum(mask * x), tokens) for name, x in of_tokens.items()}
        return lax.stop_gradient(metrics)

    @property
    def reward_names(self) -> list[str]:
        return [spec["as"] for spec in read_specs(self.rewards)]

    def token_log_probs(self, params: Any, batch: Batch, keys_B: Array | None) -> tuple[Array, Array]:
        """(log-probability of each target, entropy without gradient) under softmax(logits / temperature), [B, T]."""
        prefix = batch["prefix"] if self.mask == "prefix" else None
        hidden, _ = self.model.apply(
            {"params": params},
            batch["tokens"],
            mask=Mask(self.mask, segments_BxT=batch["segment_ids"], prefix_BxT=prefix),
            positions=batch["positions"],
            keys=keys_B,
            method="encode",
        )
        logits = self.model.apply({"params": params}, hidden, method="unembed") / self.temperature
        loss, _ = cross_entropy(logits, batch["targets"], vocab_size=self.model.config.vocab_size)
        log_p = jax.nn.log_softmax(lax.stop_gradient(logits))
        return -loss, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    def predict(self, params: Params, batch: Batch) -> dict[str, Array]:
        """Log-probabilities of answers under the policy and the reference (the policy's where there is none)."""
        ours = self.token_log_probs(params["model"], batch, None)[0]
        theirs = self.token_log_probs(params["reference"], batch, None)[0] if self.has_reference else ours
        return {"behaviour_logprobs": ours, "reference_logprobs": theirs}


def _weighted(weights: Array, values: Array, share: Array) -> Array:
    """Sum of weight * value, over tokens [B, T], or over answers [B], whose value is that of their tokens' shares."""
    if weights.ndim == 1:
        return jnp.sum(weights * jnp.sum(share * values, axis=1))
    return jnp.sum(weights * share * values)
