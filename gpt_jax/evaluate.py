"""Evaluation: the objective's own losses over a split, summed over batches and divided once.

Never a running mean of means: sums and weights are added in float64, so the result is exact to the last token,
whatever the batch size. Perplexity and bits per byte come from the metric 'nll', never from a total with z-loss,
smoothing or reweighting in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gpt_jax.data import Loader
from gpt_jax.objectives.base import Objective

Evaluator = Callable[[Any, Any, int], dict[str, Any]]


def evaluate(
    objective: Objective,
    evaluator: Evaluator,
    params: Any,
    source: Any,
    shardings: Any,
    *,
    max_batches: int = 0,
    step: int = 0,
) -> dict[str, float]:
    """Evaluates parameters on a validation source.

    Args:
      objective: whose coefficients make the total. evaluator: of `build_eval_step`. params: `state.eval_params()`.
      source: a validation source, its last batch padded with rows of weight 0. shardings: of its batches.
      max_batches: 0 is the whole split. step: at which coefficients that are schedules are taken.

    Returns:
      {"loss": total, "loss/<term>": nats per weight, "<metric>": value, ...} and, where the objective reports 'nll',
      "perplexity", "tokens" and "bits_per_byte" (of the original text's bytes).
    """
    batches = min(max_batches or source.num_batches, source.num_batches)
    sums: dict[str, np.ndarray] = {}
    previous = None
    with Loader(source, shardings, stop_step=batches) as loader:
        for index, batch in loader:
            result = evaluator(params, batch, index * source.batch_size(index))
            _add(sums, previous)
            previous = result
    _add(sums, previous)
    out = {name: float(total / weight) if weight else 0.0 for name, (total, weight) in sums.items()}
    out["loss"] = _total(objective, out, step)
    for name in [n for n in sums if n == "nll" or n.endswith("/nll")]:
        prefix = name[: -len("nll")]
        nll_sum, tokens = sums[name]
        out[f"{prefix}perplexity"] = math.exp(min(out[name], 700.0))
        out[f"{prefix}tokens"] = float(tokens)
        if name == "nll" and source.bytes:
            out["bits_per_byte"] = bits_per_byte(float(nll_sum) + source.unk_nats_in(batches), source.bytes_in(batches))
    return out


def bits_per_byte(nll_sum: float, num_bytes: int) -> float:
    """NLL_sum / (ln 2 * bytes): comparable across vocabularies, unlike perplexity."""
    return nll_sum / (math.log(2) * num_bytes)


def evaluate_all(
    run: Any, params: Any, *, max_batches: int = 0, evaluators: Mapping[str, Evaluator] | None = None, step: int = 0
) -> dict[str, float]:
    """Evaluates every validation source of a run: {"valid/loss": ..., ...}; of a mixture also "valid/<source>/loss"."""
    from gpt_jax.run import placements

    evaluators = evaluators or {}
    out: dict[str, float] = {}
    for name, source in run.data.valid.items():
        evaluator = evaluators.get(name) or run.evaluator(source)
        values = evaluate(
            run.objective, evaluator, params, source, placements(run, source), max_batches=max_batches, step=step
        )
        prefix = "valid/" if name == "valid" else f"valid/{name}/"
        out |= {prefix + key: value for key, value in values.items()}
    if out and "valid/loss" not in out:  # of a mixture: the mean over its sources
        losses = [value for key, value in out.items() if key.count("/") == 2 and key.endswith("/loss")]
        out["valid/loss"] = sum(losses) / len(losses)
    return out


def _add(sums: dict[str, np.ndarray], result: Mapping[str, Any] | None) -> None:
    for name, pair in jax.device_get(result or {}).items():
        sums[name] = sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)


def _total(objective: Objective, values: Mapping[str, float], step: int) -> float:
    total = 0.0
    for term, coef in objective.coefs.items():
        total += float(coef(step) if callable(coef) else coef) * values.get(f"loss/{term}", 0.0)
    return total
