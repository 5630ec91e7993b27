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
from gpt_jax.errors import UserError
from gpt_jax.objectives.base import Objective
from gpt_jax.predictions import score_task

Evaluator = Callable[[Any, Any, int], dict[str, Any]]
Evaluators = tuple[Evaluator, Callable[[Any, Any], dict[str, Any]] | None]


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
      "perplexity", "tokens" and "bits_per_byte" (of the original text's bytes); of a sum's child "<child>/perplexity".
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
        if source.bytes:
            nats = float(nll_sum) + source.unk_nats_in(batches)
            out[f"{prefix}bits_per_byte"] = bits_per_byte(nats, source.bytes_in(batches))
    return out


def bits_per_byte(nll_sum: float, num_bytes: int) -> float:
    """NLL_sum / (ln 2 * bytes): comparable across vocabularies, unlike perplexity."""
    return nll_sum / (math.log(2) * num_bytes)


def evaluate_all(
    run: Any,
    params: Any,
    *,
    max_batches: int = 0,
    evaluators: Mapping[str, Evaluators] | None = None,
    step: int = 0,
    limit: int = 0,
) -> dict[str, float]:
    """Evaluates every validation source of a run: {"valid/loss": ..., ...}; of several also "valid/<source>/loss".

    Args:
      run: of `build_run`. params: `state.eval_params()`. max_batches: of the losses, 0 is the whole split.
      evaluators: compiled ones by source, of `evaluators_of`. step: at which coefficients are taken.
      limit: examples of a task for which text is generated, 0 is all.

    Returns:
      The losses; a task's metrics beside its loss; "valid/loss" of several sources: their mean within an objective,
      and the sum over a mixture's objectives, each times its coefficient.
    """
    from gpt_jax.run import placements

    evaluators = evaluators or evaluators_of(run)
    out: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    for name, source in run.data.valid.items():
        objective, placed, (evaluator, predictor) = run.part(source), placements(run, source), evaluators[name]
        values = evaluate(objective, evaluator, params, source, placed, max_batches=max_batches, step=step)
        if hasattr(source, "encoded"):
            values |= score_task(objective, predictor, params, source, placed, limit=limit)
        losses.setdefault(source.part, []).append(values["loss"])
        prefix = "valid/" if name == "valid" else f"valid/{name}/"
        out |= {prefix + key: value for key, value in values.items()}
    if out and "valid/loss" not in out:
        coefs = {part: coef for part, (_, coef) in run.objective.parts().items()}
        out["valid/loss"] = sum(coefs[part] * sum(found) / len(found) for part, found in losses.items())
    if run.config.eval.tasks:
        out |= evaluate_tasks(run, params)
    return out


def evaluate_tasks(run: Any, params: Any) -> dict[str, float]:
    """Runs the benchmarks of `eval.tasks` on the run's own mesh: {"tasks/lambada/accuracy": ..., "..._se": ...}.

    What could be refused was before the first step: see `check_tasks`.
    """
    from gpt_jax.benchmarks import load_benchmarks, run_benchmark
    from gpt_jax.score import Scorer

    settings, out = run.config.eval, {}
    benchmarks = load_benchmarks(settings.tasks, "valid", "eval.tasks")
    scorer = Scorer(run.objective.model, params["model"], run.data.tokenizer, mesh=run.step.mesh, rules=run.step.rules)
    for benchmark in benchmarks:
        found = run_benchmark(benchmark, scorer, shots=settings.task_shots, limit=settings.task_limit)
        for name, value in found.items():
            if f"{name}_se" in found and not name.startswith("accuracy_"):
                out[f"tasks/{benchmark.name}/{name}"] = value
                out[f"tasks/{benchmark.name}/{name}_se"] = found[f"{name}_se"]
    return out


def check_tasks(run: Any) -> list[Any]:
    """Returns the benchmarks of `eval.tasks`, scored on their validation split where they have one.

    Raises:
      UserError: an objective whose model does not continue a text, an unknown benchmark, and what scoring the items
        would refuse: a file that is missing or malformed, an option longer than the model's context.
    """
    from gpt_jax.benchmarks import check_benchmark, load_benchmarks
    from gpt_jax.score import Scorer

    if not run.objective.generates or not hasattr(run.objective, "model"):
        raise UserError("eval.tasks names benchmarks, but the objective does not teach its model to continue a text.")
    settings = run.config.eval
    benchmarks = load_benchmarks(settings.tasks, "valid", "eval.tasks")
    scorer = Scorer(run.objective.model, None, run.data.tokenizer)
    for benchmark in benchmarks:
        check_benchmark(benchmark, scorer, shots=settings.task_shots, limit=settings.task_limit)
    return benchmarks


def evaluators_of(run: Any) -> dict[str, Evaluators]:
    """Returns the compiled evaluation of every validation source and, for tasks, its predictor."""
    return {
        name: (run.evaluator(source), run.predictor(source) if hasattr(source, "encoded") else None)
        for name, source in run.data.valid.items()
    }


def _add(sums: dict[str, np.ndarray], result: Mapping[str, Any] | None) -> None:
    for name, pair in jax.device_get(result or {}).items():
        sums[name] = sums.get(name, np.zeros(2)) + np.asarray(pair, np.float64)


def _total(objective: Objective, values: Mapping[str, float], step: int) -> float:
    total = 0.0
    for term, coef in objective.coefs.items():
        total += float(coef(step) if callable(coef) else coef) * values.get(f"loss/{term}", 0.0)
    return total
