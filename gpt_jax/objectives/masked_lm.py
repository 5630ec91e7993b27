"""Masked language modelling: predict tokens of a text from what is left of it, on both sides.

The batch is that of ordinary text. A token is its own label, so `targets` go unused: row i's last target is the first
token of row i + 1, and an epoch's rows hold every token once either way. Special tokens (EOT between documents) are
seen and never hidden; so is a token of weight 0 (`target_weights`) inside a document. Segment 0 is padding, which is
not even seen; where a batch has no segments, weight 0 is.

What stands in place of the selected tokens S (gpt_jax/objectives/masking.py selects them), by `corruption`:

    bert     [MASK], a random token, the token itself: 80, 10, 10 % (`shares`)
    fair     `masks` of S are [MASK], the rest are random tokens other than the true ones: the article's objective,
             applied to a part of the text, so that something is left to predict from
    literal  the article's words: S is the whole text, one token is [MASK], every other one random, so the input says
             nothing of the labels. A negative control: its least loss is the unigram entropy.

`loss_on`: selected is S; non_mask is S without its [MASK]s (what the article predicts); all is every token that may be
selected. The loss is the mean cross-entropy over those tokens.

The term 'next_masked', on where `coefs` names it, is the article's auxiliary question whether the next token is masked,
asked of the same weights under the causal mask. Masks that are independent of each other leave it the entropy of their
rate as its least loss (H(0.15) = 0.4227 nats): it cannot be learnt from them.

The term 'edit', on where `coefs` names it, is the article's regulariser: the soft edit distance between the predicted
distributions and the true tokens, per token, in each run of adjacent tokens that the loss is on (see
gpt_jax/edit_distance.py). On single tokens it says no more than whether they are right; use it with select="spans".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from gpt_jax.edit_distance import BIG, mismatch_costs, soft_edit_distance
from gpt_jax.errors import UserError, choose
from gpt_jax.losses import binary_cross_entropy, cross_entropy
from gpt_jax.model import Mask, Transformer
from gpt_jax.model.random import fold_name
from gpt_jax.objectives import masking
from gpt_jax.objectives.base import Batch, Objective, Params, Setting, check_options, text_spec
from gpt_jax.objectives.heads import init_token_score, token_score
from gpt_jax.options import option

CORRUPTIONS = ("bert", "fair", "literal")
LOSSES = ("selected", "non_mask", "all")


@dataclasses.dataclass(frozen=True)
class MaskedLM(Objective):
    """Cross-entropy of hidden tokens; the term "mlm", and "next_masked" and "edit" if `coefs` has them.

    Metrics: "accuracy" of selected tokens that the loss is on, and their "mlm_nll": the mean -log p of a token given
    the corrupted text. It is no 'nll': a product of these is not the probability of a text, and has no perplexity.
    With "edit" also "edit_distance": Levenshtein of the likeliest tokens by the number of true ones, mean over rows.

    Batch: tokens, targets, target_weights [B, T]; with documents kept apart also segment_ids and positions [B, T].

    Attributes:
      mask_token: id of [MASK]. specials: ids that are never hidden, nor drawn as random tokens.
    """

    generates: ClassVar[bool] = False

    model: Transformer
    mask_token: int
    specials: tuple[int, ...] = ()
    coefs: Mapping[str, Any] = option({"mlm": 1.0}, "weight of each term: mlm, next_masked, edit")
    rate: float = option(0.15, "part of a row's tokens that is selected")
    select: str = option("tokens", " | ".join(masking.SELECTIONS))
    span: int = option(0, "spans: tokens of each, a few; 0 draws its length, 3.8 on average")
    max_predictions: int = option(0, "most tokens selected in a row; 0 is no bound")
    corruption: str = option("bert", " | ".join(CORRUPTIONS))
    shares: tuple[float, ...] = option((0.8, 0.1, 0.1), "bert: parts replaced by [MASK], by a random token, kept")
    masks: int = option(1, "fair, literal: how many of a row's selected tokens are [MASK]")
    loss_on: str = option("", f"{' | '.join(LOSSES)}; empty: selected with bert, else non_mask")
    edit_gamma: float = option(0.1, "softness of the edit distance")
    edit_after: float = option(0.1, "from a config: part of the run before the term 'edit' begins")
    label_smoothing: float = option(0.0, "probability given to all tokens alike")
    z_loss: float = option(0.0, "coefficient of logsumexp^2")

    def __post_init__(self) -> None:
        choose("objective.corruption", self.corruption, CORRUPTIONS)
        choose("objective.loss_on", self.loss_on, ("", *LOSSES))
        masking.check_selection(self.select, self.rate, self.max_predictions, self.span)
        masking.check_shares(self.shares)
        if self.masks < 1:
            raise UserError(f"objective.masks is {self.masks}; the article's variants have at least one [MASK].")
        if not self.edit_gamma >= 0 or not 0 <= self.edit_after <= 1:
            raise UserError(
                f"objective.edit_gamma is {self.edit_gamma!r} and edit_after {self.edit_after!r}; "
                "they must be 0 or more, and in [0, 1]."
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"objective.label_smoothing is {self.label_smoothing!r}; it must be in [0, 1).")
        self._check_targets()
        ids = masking.check_specials(self.model.config.vocab_size, self.mask_token, self.specials)
        object.__setattr__(self, "specials", ids)

    @classmethod
    def build(cls, options: Mapping[str, Any], setting: Setting) -> MaskedLM:
        ids = dict(mask_token=setting.special("mask"), specials=tuple(setting.specials.values()))
        objective = cls(model=Transformer(setting.model), **ids, **check_options(cls, options))
        objective._check_targets(setting.context_length)
        return with_edit_schedule(objective, setting.steps)

    @classmethod
    def parts_of_steps(cls, options: Mapping[str, Any]) -> Sequence[str]:
        return ("edit_after",) if options.get("coefs.edit") and options.get("edit_after", cls.edit_after) else ()

    def _check_targets(self, length: int = 0) -> None:
        """Raises UserError where [MASK]s are all that is selected in rows of `length` (0: any), and never predicted."""
        if self.where != "non_mask":
            return
        if self.corruption == "bert" and self.shares[0] >= 1:
            raise UserError(
                f"objective.loss_on is 'non_mask' and objective.shares {self.shares!r}: every selected token is "
                "[MASK], so no token is left to learn from."
            )
        if self.corruption == "literal" or self.select == "iid":
            most = length
        else:
            most = masking.budget(length, self.rate, self.max_predictions)[-1] if length else self.max_predictions
        if self.corruption != "bert" and 0 < most <= self.masks:
            raise UserError(
                f"objective.masks is {self.masks}, but a row has at most {most} selected tokens (rate={self.rate}, "
                f"max_predictions={self.max_predictions}, context_length={length or 'any'}): no token is left to "
                "learn from with loss_on='non_mask'."
            )

    @property
    def where(self) -> str:
        """On which tokens the loss is."""
        return self.loss_on or ("selected" if self.corruption == "bert" else "non_mask")

    def init(self, key: Array, batch: Batch) -> Params:
        roots = {"model": self.model.init(key, batch["tokens"])["params"]}
        if "next_masked" in self.coefs:
            roots["next_masked"] = init_token_score(fold_name(key, "next_masked"), self.model.config)
        return roots

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        return text_spec(batch_size, context_length)

    def prepare(self, batch: Batch, keys: Array, step: Array) -> Batch:
        """Adds inputs [B, T], and of the N tokens that may be predicted: slots, labels, weights["mlm"], each [B, N]."""
        tokens = batch["tokens"]
        T, vocab_size = tokens.shape[1], self.model.config.vocab_size
        real = masking.real_tokens(batch)
        eligible = real & ~masking.is_one_of(tokens, self.specials)
        options = dict(select=self.select, rate=self.rate, max_predictions=self.max_predictions, span=self.span)
        if self.corruption == "literal":
            counts = eligible.astype(jnp.float32)
        else:
            counts = masking.select_tokens(keys, batch, eligible, **options)
        other_than = tokens if self.corruption == "fair" else None
        drawn = masking.ordinary_tokens(fold_name(keys, "random"), T, vocab_size, self.specials, other_than)
        if self.corruption == "bert":
            inputs = masking.replace_shares(keys, tokens, counts > 0, self.shares, self.mask_token, drawn)
        else:
            inputs = masking.replace_but(keys, tokens, counts > 0, self.masks, self.mask_token, drawn)

        weights = counts
        if self.where == "non_mask":
            weights = counts * (inputs != self.mask_token)
        elif self.where == "all":
            weights = eligible.astype(jnp.float32)
        bounded = self.where != "all" and self.corruption != "literal" and self.select != "iid"
        slots = masking.slots(weights, int(masking.budget(T, self.rate, self.max_predictions)[-1]) if bounded else T)
        out = {**batch, "inputs": inputs, "slots": slots, "labels": masking.at_slots(tokens, slots)}
        out["selected"] = masking.at_slots(counts > 0, slots)
        out["weights"] = {"mlm": masking.at_slots(weights, slots)}
        if "edit" in self.coefs:
            out["weights"]["edit"] = jnp.any(weights > 0, axis=1).astype(jnp.float32)
        if "next_masked" in self.coefs:
            asked = real[:, :-1] & eligible[:, 1:]
            if "segment_ids" in batch:
                asked &= batch["segment_ids"][:, :-1] == batch["segment_ids"][:, 1:]
            out["weights"]["next_masked"] = jnp.pad(asked.astype(jnp.float32), ((0, 0), (0, 1)))
        return out

    def loss(self, params: Params, batch: Batch, keys: Array, train: bool) -> tuple[dict, dict]:
        sums, metrics = self.measure(self.token_logits(params, batch, keys if train else None), batch)
        if "next_masked" in self.coefs:
            scores = self._next_masked(params, batch, fold_name(keys, "causal") if train else None)
            is_next = jnp.pad(batch["inputs"][:, 1:] == self.mask_token, ((0, 0), (0, 1)))
            sums["next_masked"] = jnp.sum(batch["weights"]["next_masked"] * binary_cross_entropy(scores, is_next))
        return sums, metrics

    def measure(self, logits_BxNxV: Array, batch: Batch) -> tuple[dict, dict]:
        """(sums, metrics) of logits at the slots of a prepared batch."""
        labels, weights = batch["labels"], batch["weights"]["mlm"]
        vocab_size = self.model.config.vocab_size
        smoothing = dict(z_loss=self.z_loss, label_smoothing=self.label_smoothing, vocab_size=vocab_size)
        loss, nll = cross_entropy(logits_BxNxV, labels, **smoothing)
        sums = {"mlm": jnp.sum(weights * loss)}
        counted = weights * batch["selected"]
        measured = {"accuracy": jnp.argmax(logits_BxNxV, axis=-1) == labels, "mlm_nll": nll}
        metrics = {name: (jnp.sum(counted * x), jnp.sum(counted)) for name, x in measured.items()}
        if "edit" in self.coefs:
            soft_B, hard_B = edit_distances(logits_BxNxV, labels, batch["slots"], weights > 0, gamma=self.edit_gamma)
            rows = batch["weights"]["edit"]
            sums["edit"] = jnp.sum(rows * soft_B)
            metrics["edit_distance"] = (jnp.sum(rows * hard_B), jnp.sum(rows))
        return sums, metrics

    def token_logits(self, params: Params, batch: Batch, keys: Array | None = None) -> Array:
        """Logits [B, N, V] at the slots of a prepared batch; `keys` for dropout."""
        mask = masking.bidirectional_mask(batch)
        hidden = masking.at_slots(self.states(params, batch, mask, keys), batch["slots"])
        return self.model.apply({"params": params["model"]}, hidden, method="unembed")

    def _next_masked(self, params: Params, batch: Batch, keys: Array | None) -> Array:
        mask = Mask("causal", masking.bidirectional_mask(batch).segments_BxT)
        return token_score(params["next_masked"], self.states(params, batch, mask, keys))

    def states(self, params: Params, batch: Batch, mask: Mask, keys: Array | None = None) -> Array:
        """The model's states [B, T, D] of a batch's "inputs"; what `added` gives joins their embeddings."""
        options = dict(mask=mask, positions=batch.get("positions"), keys=keys, added=self.added(params, batch))
        return self.model.apply({"params": params["model"]}, batch["inputs"], **options, method="encode")[0]

    def added(self, params: Params, batch: Batch) -> Array | None:
        """What joins the token embeddings of each row, [B, 1, E]; None: nothing."""
        return None


def edit_distances(
    logits_BxNxV: Array, labels_BxN: Array, slots_BxN: Array, used_BxN: Array, *, gamma: float
) -> tuple[Array, Array]:
    """Edit distances of predictions to labels within each run of adjacent slots, by the number of labels.

    Args:
      logits_BxNxV, labels_BxN: at the slots. slots_BxN: places in the row, rising. used_BxN: the first n of each row.
      gamma: softness.

    Returns:
      (soft distance of the distributions, Levenshtein distance of the likeliest tokens), each [B]; 0 where n is 0.
    """
    n_B = jnp.sum(used_BxN, axis=1)
    begins = jnp.pad(slots_BxN[:, 1:] != slots_BxN[:, :-1] + 1, ((0, 0), (1, 0)))
    run_BxN = jnp.cumsum(begins, axis=1)
    apart = run_BxN[:, :, None] != run_BxN[:, None, :]  # no alignment pairs tokens of two runs

    def distance(costs_BxNxN: Array, gamma: float) -> Array:
        return soft_edit_distance(jnp.where(apart, BIG, costs_BxNxN), n_B, n_B, gamma=gamma) / jnp.maximum(n_B, 1)

    likeliest = jnp.argmax(logits_BxNxV, axis=-1)
    wrong = (likeliest[:, :, None] != labels_BxN[:, None, :]).astype(jnp.float32)
    return distance(mismatch_costs(logits_BxNxV, labels_BxN), gamma), distance(wrong, 0.0)


def with_edit_schedule(objective: Any, steps: int) -> Any:
    """Lets the term 'edit' of a config begin after the part `edit_after` of the run; callables stay as they are."""
    coef = objective.coefs.get("edit", 0.0)
    if callable(coef) or not coef:
        return objective
    start = round(objective.edit_after * steps)
    schedule = lambda step: jnp.where(step >= start, coef, 0.0)  # noqa: E731
    return dataclasses.replace(objective, coefs={**objective.coefs, "edit": schedule})
