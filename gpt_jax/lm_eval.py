"""The adapter to lm-evaluation-harness (extra `eval`): every request type, through the same sharded Scorer. No torch.

    import lm_eval
    from gpt_jax.lm_eval import HarnessModel
    lm_eval.simple_evaluate(HarnessModel(scorer), tasks=["arc_easy"])

The harness runs as one process; devices are used inside, by the Scorer's mesh. Local tasks need no network: the
functions below write a benchmark's items as the harness's task files.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax.errors import UserError
from gpt_jax.score import Scorer

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise UserError(f"lm-evaluation-harness is not installed ({error}): pip install -e '.[eval]'.") from None

_RESAMPLES = 100  # for standard errors without a formula
_MAX_TOKENS = 256  # generated where a task names no number: the harness's own default


class HarnessModel(LM):
    """A model of ours as the harness sees it.

    Args:
      scorer: of the model; its boundary, overflow and mesh are used. The default boundary, 'joint', is the harness's.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log P(continuation | context), is it what greedy decoding gives) of each request; also multiple choice."""
        scores = self.scorer.score([request.args for request in requests])
        return self._cached("loglikelihood", requests, [(score.total, score.greedy) for score in scores])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, every token once, in disjoint windows of the model's context."""
        scores = self.scorer.rolling([request.args[0] for request in requests])
        return self._cached("loglikelihood_rolling", requests, [score.total for score in scores])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to a stop string; requests of like settings go together."""
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for row, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(row)
        out = [""] * len(requests)
        for settings, rows in groups.items():
            texts = self._generate([requests[row].args[0] for row in rows], json.loads(settings))
            for row, text in zip(rows, texts, strict=True):
                out[row] = text
        return self._cached("generate_until", requests, out)

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        from gpt_jax.benchmarks.base import beam_texts, fit_texts
        from gpt_jax.sample import continue_texts
        from gpt_jax.sampling import Sampling

        until = settings.pop("until", [])
        stop = tuple([until] if isinstance(until, str) else until)
        given = settings.pop("max_gen_toks", None)
        most = int(given or settings.pop("max_new_tokens", None) or settings.pop("max_tokens", None) or _MAX_TOKENS)
        most = min(most, max(1, self.scorer.max_length // 2))
        beams = int(settings.pop("num_beams", 1))
        temperature, samples = float(settings.pop("temperature", 0.0)), settings.pop("do_sample", None)
        if samples is False or (samples is None and temperature == 0.0):
            temperature = 0.0
        elif temperature == 0.0:
            temperature = 1.0
        drawn = {
            name: settings.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in settings
        }
        if settings:
            raise UserError(f"generation setting {next(iter(settings))!r} of a harness task is not supported.")
        if beams > 1:
            return beam_texts(self.scorer, beams)(contexts, most, stop)
        fitted = fit_texts(self.scorer, contexts, most)
        return continue_texts(self.scorer, fitted, max_tokens=most, sampling=Sampling(temperature, **drawn), stop=stop)

    def _cached(self, name: str, requests: Sequence[Any], values: list) -> list:
        for request, value in zip(requests, values, strict=True):
            self.cache_hook.add_partial(name, request.args, value)
        return values

    @property
    def tokenizer_name(self) -> str:
        return f"gpt_jax-{self.scorer.tokenizer.hash[:16]}"

    @property
    def eot_token_id(self) -> int | None:
        return self.scorer.eot

    @property
    def max_length(self) -> int:
        return self.scorer.max_length


def run_harness(
    scorer: Scorer, tasks: Sequence[str], *, include_path: str = "", shots: int | None = None, limit: int = 0
) -> dict[str, dict[str, Any]]:
    """Runs tasks of the harness: {task: {metric: value, metric_stderr: value}}, 'metric,filter' of a filter.

    Args:
      include_path: a folder of task files; the harness's own tasks are then not looked at. shots: None: the task's own.
      limit: items of each task; 0 is all.

    Raises:
      UserError: an unknown task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=include_path or None, include_defaults=not include_path)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise UserError(f"lm-evaluation-harness has no task {task!r}.")
    with contextlib.redirect_stderr(io.StringIO()), _one_process():  # its bars
        found = simple_evaluate(
            HarnessModel(scorer),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit or None,
            task_manager=manager,
            bootstrap_iters=_RESAMPLES,
            log_samples=False,
        )
    return {name: _plain(values) for name, values in found["results"].items()}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """'acc,none' -> 'acc', and 'exact_match,strict-match' as it is; numbers only."""
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
    return {name.removesuffix(",none").removesuffix(","): value for name, value in numbers.items()}


@contextlib.contextmanager
def _one_process():
    """The harness resamples in forks otherwise, which a process with JAX's threads must not make."""
    given = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ["DISABLE_MULTIPROC"]


def write_tasks(name: str, kind: str, items: Sequence[Any], folder: str | pathlib.Path) -> list[str]:
    """Writes items of a benchmark as the harness's task files, one task a group; returns the tasks' names.

    Args:
      kind: 'choice' or 'greedy' (`gpt_jax.benchmarks.Benchmark.kind`). items: `Item`s whose options share a context.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Any]] = collections.defaultdict(list)
    for item in items:
        if item.contexts:
            raise UserError(f"benchmark {name}: options with contexts of their own have no such task file.")
        groups[item.group].append(item)
    names = []
    for group, members in groups.items():
        task = f"native_{name}_{group}" if group else f"native_{name}"
        choice = kind == "choice"  # the harness puts its delimiter before choices, not before a target
        space = choice and all(option.startswith(" ") for item in members for option in item.options)
        rows = []
        for item in members:
            options = [option.removeprefix(" ") if space else option for option in item.options]
            rows.append({"context": item.context, "choices": options, "answer": item.answer, "target": options[0]})
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        spec = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "output_type": "multiple_choice" if choice else "loglikelihood",
            "doc_to_text": "context",
            "target_delimiter": " " if space else "",
            **({"doc_to_choice": "choices", "doc_to_target": "answer"} if choice else {"doc_to_target": "target"}),
            "metric_list": [
                {"metric": metric, "aggregation": "perplexity" if metric == "perplexity" else "mean"}
                for metric in (("acc", "acc_bytes") if choice else ("acc", "perplexity"))
            ],
            "num_fewshot": 0,
        }
        (folder / f"{task}.yaml").write_text(json.dumps(spec), encoding="utf-8")  # JSON is YAML
        names.append(task)
    return names


# What the harness calls our figures.
SAME = {
    "choice": (("accuracy_sum", "acc"), ("accuracy_byte", "acc_bytes")),
    "greedy": (("accuracy", "acc"), ("perplexity", "perplexity")),
}


def compare(
    benchmark: Any, scorer: Scorer, native: Mapping[str, Any], folder: str | pathlib.Path, limit: int = 0
) -> dict[str, float]:
    """Runs the same items, without demonstrations, through the harness.

    Args:
      native: of `run_benchmark(benchmark, scorer, limit=limit)`. folder: for the task files.

    Returns:
      The harness's figures (of groups: their means) by its names, and 'largest_difference' from ours in any group.
    """
    from gpt_jax.benchmarks.base import take

    items = take(benchmark.items(), limit)
    names = write_tasks(benchmark.name, benchmark.kind, items, folder)
    found = run_harness(scorer, names, include_path=str(folder))
    groups = native.get("groups") or {"": native}
    out, largest = collections.defaultdict(list), 0.0
    for name, (_, ours) in zip(names, groups.items(), strict=True):
        for mine, theirs in SAME[benchmark.kind]:
            value = ours.get(f"{mine}_first", ours[mine])  # the harness takes the first of tied options
            out[theirs].append(found[name][theirs])
            scale = max(1.0, abs(value)) if theirs == "perplexity" else 1.0
            largest = max(largest, abs(found[name][theirs] - value) / scale)
    return {name: sum(values) / len(values) for name, values in out.items()} | {"largest_difference": largest}
