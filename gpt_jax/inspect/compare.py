"""Two of a thing: activation patching between two prompts, the losses of tokens under two checkpoints."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.inspect.forward import Subject, token_losses
from gpt_jax.model.taps import Taps


def patch(subject: Subject, clean_T: Any, corrupt_T: Any, answers: tuple[int, int] | None = None) -> dict[str, Any]:
    """Activation patching (Meng et al. 2022): which activations of a clean run restore its answer in a corrupt one.

    The answer is the difference of two logits at the last token: of the clean and of the corrupt prompt's likeliest
    token, or of `answers`. Recovery is (patched - corrupt) / (clean - corrupt): 0 restores nothing, 1 all.

    Args:
      clean_T, corrupt_T: token ids, equally many. answers: (right, wrong) token ids.

    Returns:
      {"residual" [L, T]: recovery where the stream entering a layer at a token is the clean one; "heads" [L, H]: where
      a head's output at all tokens is; "clean", "corrupt": the difference of logits; "answers"}.

    Raises:
      UserError: prompts of different lengths, or that the model answers alike.
    """
    clean, corrupt = np.asarray(clean_T)[None], np.asarray(corrupt_T)[None]
    if clean.shape != corrupt.shape:
        raise UserError(
            f"the clean prompt has {clean.shape[1]} tokens and the corrupt one {corrupt.shape[1]}; patching needs "
            "equally many, so that places correspond."
        )
    config = subject.config
    L, H, T = config.num_layers, config.num_heads, clean.shape[1]
    before = subject(clean, Taps(collect=("residual", "heads")))
    after = subject(corrupt, Taps(collect=("residual",)))
    if answers is None:
        answers = (int(jnp.argmax(before.logits[0, -1])), int(jnp.argmax(after.logits[0, -1])))
    right, wrong = answers

    def answer(output: Any) -> float:
        return float(output.logits[0, -1, right] - output.logits[0, -1, wrong])

    high, low = answer(before), answer(after)
    if right == wrong or abs(high - low) < 1e-6:
        raise UserError(
            f"both prompts have the same answer (logit difference {high:.4g} and {low:.4g}): name two with --answers."
        )
    values, heads = before.intermediates["residual"], before.intermediates["heads"]
    residual, by_head = np.zeros((L, T)), np.zeros((L, H))
    for layer in range(L):
        for t in range(T):
            where = jnp.zeros((L, 1, T), bool).at[layer, 0, t].set(True)
            taps = Taps(residual_LxBxTxD=values, residual_where_LxBxT=where)
            residual[layer, t] = (answer(subject(corrupt, taps)) - low) / (high - low)
        for head in range(H):
            where = jnp.zeros((L, 1, T, H), bool).at[layer, 0, :, head].set(True)
            taps = Taps(heads_LxBxTxHxK=heads, heads_where_LxBxTxH=where)
            by_head[layer, head] = (answer(subject(corrupt, taps)) - low) / (high - low)
    return {"residual": residual, "heads": by_head, "clean": high, "corrupt": low, "answers": [right, wrong]}


def recovery(subject: Subject, clean_T: Any, corrupt_T: Any, where_LxT: Any, answers: tuple[int, int]) -> float:
    """The recovery with the clean stream at any set of (layer, token): none gives 0, all of a layer 1."""
    clean, corrupt = np.asarray(clean_T)[None], np.asarray(corrupt_T)[None]
    before = subject(clean, Taps(collect=("residual",)))
    where = jnp.asarray(where_LxT, bool)[:, None]
    taps = Taps(residual_LxBxTxD=before.intermediates["residual"], residual_where_LxBxT=where)
    logits = [out.logits[0, -1] for out in (before, subject(corrupt), subject(corrupt, taps))]
    high, low, patched = (float(x[answers[0]] - x[answers[1]]) for x in logits)
    return (patched - low) / (high - low)


def loss_difference(subject: Subject, other: Subject, tokens_T: Any) -> dict[str, np.ndarray]:
    """Losses of a text's tokens under two models, nats: {"losses", "other", "difference" = losses - other}, [T - 1]."""
    tokens = np.asarray(tokens_T)[None]
    own, theirs = (np.asarray(token_losses(s(tokens).logits, tokens)[0]) for s in (subject, other))
    return {"losses": own, "other": theirs, "difference": own - theirs}
