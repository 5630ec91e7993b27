"""Constrained choice: which of several texts a model continues a prompt with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt_jax.errors import UserError
from gpt_jax.score import Scorer, normalise


def choose_texts(
    run: Any,
    prompts: Sequence[str],
    choices: Sequence[str],
    *,
    normalisation: str = "sum",
    temperature: float = 0.0,
    seed: int = 0,
    overflow: str = "left",
) -> list[tuple[str, dict[str, float]]]:
    """Continues each prompt with one of the choices.

    Args:
      run: of `gpt_jax.load`: what has model, params and tokenizer.
      normalisation: of the scores that are compared (`gpt_jax.score.normalise`); with 'sum' and temperature 1 a choice
        is drawn as the model itself would among these texts. temperature: 0 takes the best. seed: of the first prompt.
      overflow: of a prompt that is too long (`Scorer`): 'left' cuts its beginning, 'error' refuses it.

    Returns:
      (the choice, the probability of each choice at temperature 1) of each prompt.
    """
    if len(set(choices)) < 2 or not all(choices):
        raise UserError("a choice is made among at least two different texts, none of them empty.")
    if twice := [choice for i, choice in enumerate(choices) if choice in choices[:i]]:
        raise UserError(f"choice {twice[0]!r} is given twice.")
    scorer = Scorer(run.model, run.params, run.tokenizer, overflow=overflow)
    scores = scorer.score([(prompt, choice) for prompt in prompts for choice in choices])
    empty = scorer.score([("", choice) for choice in choices]) if normalisation == "unconditional" else scores
    out = []
    for i in range(len(prompts)):
        found = scores[i * len(choices) : (i + 1) * len(choices)]
        values = np.array([normalise(s, normalisation, e) for s, e in zip(found, empty[: len(choices)], strict=True)])
        probabilities = np.exp(values - np.logaddexp.reduce(values))
        best = int(values.argmax())
        if temperature > 0:
            sharpened = np.exp((values - values.max()) / temperature)
            rng = np.random.default_rng((seed + i) & 0xFFFFFFFF)
            best = int(rng.choice(len(choices), p=sharpened / sharpened.sum()))
        out.append((choices[best], dict(zip(choices, probabilities.tolist(), strict=True))))
    return out
