"""From a model to a task's scores: predictions of every example, by a forward pass or by generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gpt_jax.data import Loader
from gpt_jax.objectives.base import Objective
from gpt_jax.objectives.supervised import cut_prompt


def score_task(
    objective: Objective,
    predict: Callable[[Any, Any], dict[str, Any]] | None,
    params: Any,
    source: Any,
    shardings: Any,
    *,
    limit: int = 0,
) -> dict[str, float]:
    """Returns the task's metrics of a validation source's examples.

    Args:
      objective: that trains on them. predict: of `build_predict_step`; None where text is generated.
      params: every root. source: a ValidTask. shardings: of its batches.
      limit: where text is generated, for so many examples only, spread over all; 0 is all of them.
    """
    encoded = source.encoded
    if predict is None:
        chosen = spread(len(encoded.examples), limit)
        examples = [encoded.examples[i] for i in chosen]
        predictions = generate_predictions(objective, params, encoded, examples)
        return encoded.task.score(predictions, examples)
    parts: list[dict[str, np.ndarray]] = []
    with Loader(source, shardings) as loader:
        for _, batch in loader:
            parts.append(jax.device_get(predict(params, batch)))
    outputs = {name: np.concatenate([part[name] for part in parts])[: encoded.rows_per_epoch] for name in parts[0]}
    return encoded.task.score(encoded.format.predictions(outputs, encoded), encoded.examples)


def spread(count: int, limit: int) -> list[int]:
    """Returns `limit` indices spread evenly over range(count); all of them if limit is 0 or not fewer."""
    if not limit or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def generate_predictions(objective: Any, params: Any, encoded: Any, examples: list[Any]) -> list[str]:
    """Returns the text that the model generates, greedily, after each example's prompt, up to the end of the text."""
    from gpt_jax.generation import generate

    rows, tokenizer = encoded.format, encoded.tokenizer
    room = max(1, min(rows.max_new, encoded.length // 2))
    prompts = [cut_prompt(rows.prompt(example, tokenizer), encoded.length - room) for example in examples]
    new = generate(
        objective.model,
        params["model"],
        prompts,
        max_tokens=room,
        temperature=0.0,
        eot=tokenizer.eot,
        bidirectional_prompt=rows.bidirectional,
    )
    return [tokenizer.decode(ids).strip() for ids in new]
