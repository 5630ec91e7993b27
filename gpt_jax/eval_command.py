"""The command `gpt-jax eval`: losses of the validation split, or benchmarks, or the quality of generated text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from gpt_jax import cluster
from gpt_jax.distributed import is_first
from gpt_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to evaluate; default: the newest")
    parser.add_argument("--weights", default="auto", help="raw | ema | average | auto")
    parser.add_argument("--max-batches", type=int, default=0, help="0 evaluates the whole split")
    parser.add_argument("--max-generated", type=int, default=0, help="task examples generated for; 0 is all")
    tasks = parser.add_argument_group("benchmarks, zero- or few-shot (docs/evaluate.md)")
    tasks.add_argument(
        "--tasks",
        default="",
        help="names, comma-separated: lambada,blimp,choices:FILE.jsonl,sst2; or tables of tasks: [{'name': ...}, ...]",
    )
    tasks.add_argument("--shots", type=int, default=0, help="demonstrations before each item")
    tasks.add_argument("--limit", type=int, default=0, help="items of each task (of each of its groups); 0 is all")
    tasks.add_argument("--normalise", default="", help="sum | token | byte | unconditional; default: the task's")
    tasks.add_argument("--split", default="", help="split of a task that is scored; default: test, or valid")
    tasks.add_argument("--boundary", default="joint", help="how context and continuation are encoded: joint | separate")
    tasks.add_argument("--overflow", default="left", help="a context too long is cut on the left | is an error")
    tasks.add_argument("--beams", type=int, default=1, help="answers that are generated: beams; 1 is greedy")
    tasks.add_argument("--harness", action="store_true", help="the same items through lm-evaluation-harness too")
    tasks.add_argument("--harness-tasks", default="", help="tasks of lm-evaluation-harness, comma-separated")
    tasks.add_argument(
        "--include-path", default="", help="folder of the harness's task files; its own then are not read"
    )
    tasks.add_argument("--seed", type=int, default=0, help="of the demonstrations and of generated text")
    cluster.add_arguments(parser)
    quality = parser.add_argument_group("quality of generated text, beside human text")
    quality.add_argument("--generation", action="store_true", help="measure the texts of each decoding method")
    quality.add_argument("--methods", default="", help="comma-separated; default: all (docs/evaluate.md)")
    quality.add_argument("--texts", type=int, default=100, help="texts of each")
    quality.add_argument("--prompt-tokens", type=int, default=32, help="tokens of validation text before each")
    quality.add_argument("--new-tokens", type=int, default=64, help="tokens of each")
    quality.add_argument("--reference", default="", help="a run that measures perplexity; default: the run itself")


# Flags that only some evaluations read, those without --tasks and --generation under "".
_READ_BY = {
    **dict.fromkeys(("max_batches", "max_generated"), ("",)),
    **dict.fromkeys(("shots", "limit", "harness_tasks"), ("tasks",)),
    **dict.fromkeys(("normalise", "split", "boundary", "overflow", "beams", "harness", "include_path"), ("tasks",)),
    **dict.fromkeys(("methods", "texts", "prompt_tokens", "new_tokens", "reference"), ("generation",)),
    "seed": ("tasks", "generation"),
}


def _refuse_unread(args: argparse.Namespace, mode: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, modes in _READ_BY.items():
        value = getattr(args, name)
        if mode in modes or value == parser.get_default(name):
            continue
        flag, wanted = f"--{name.replace('_', '-')}", " or ".join(f"--{m}" for m in modes if m)
        if mode:
            raise UserError(f"{flag} is {value!r}, which --{mode} does not read.")
        raise UserError(f"{flag} is {value!r}, but no {wanted} {'are named' if wanted == '--tasks' else 'is given'}.")


def main(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs the command."""
    for name in ("max_batches", "max_generated", "limit", "shots"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 0.")
    if args.generation and (args.tasks or args.harness_tasks):
        raise UserError("--generation and --tasks are two evaluations: run one after the other.")
    mode = "generation" if args.generation else "tasks" if args.tasks or args.harness_tasks else ""
    _refuse_unread(args, mode)
    if mode:
        _join(args, overrides)  # before anything touches a device
    if args.generation:
        values = _generation(args, overrides)
    elif args.tasks or args.harness_tasks:
        values = _tasks(args, overrides)
    else:
        values = _losses(args, overrides)
    if is_first():
        print(json.dumps({"workdir": args.workdir, **values}))
    return 0


def _losses(args: argparse.Namespace, overrides: Mapping[str, str]) -> dict[str, Any]:
    from gpt_jax import config as configs
    from gpt_jax.cli import join_job
    from gpt_jax.evaluate import evaluate_all
    from gpt_jax.inherit import saved_config
    from gpt_jax.run import restore_run

    join_job(args, configs.resolve(saved_config(args.workdir), overrides))
    run, params, step = restore_run(args.workdir, step=args.step, weights=args.weights, overrides=overrides)
    values = evaluate_all(run, params, max_batches=args.max_batches, step=step, limit=args.max_generated)
    if is_first():
        for name, value in values.items():
            print(f"{name.ljust(32)} {value:.6g}")
    return {"step": step, **values}


def _tasks(args: argparse.Namespace, overrides: Mapping[str, str]) -> dict[str, Any]:
    from gpt_jax.benchmarks import check_benchmark, load_benchmarks, run_benchmark
    from gpt_jax.benchmarks.base import beam_texts
    from gpt_jax.tasks.base import parse_specs

    benchmarks = load_benchmarks(parse_specs(args.tasks, "--tasks"), args.split, "--tasks")
    if args.split and not any(benchmark.split for benchmark in benchmarks):
        raise UserError(f"--split is {args.split!r}, but no task named has splits.")
    if args.include_path and not args.harness_tasks:
        raise UserError(f"--include-path is {args.include_path!r}, but no --harness-tasks are named.")
    if args.harness and (not benchmarks or args.shots or any(b.kind == "generate" for b in benchmarks)):
        raise UserError("--harness compares scores without demonstrations (--shots 0), of tasks that generate nothing.")
    if args.harness and (own := [b.name for b in benchmarks if any(item.contexts for item in b.items())]):
        raise UserError(f"--harness has no form for benchmark {own[0]}, whose options have contexts of their own.")
    if args.harness or args.harness_tasks:
        import gpt_jax.lm_eval  # noqa: F401  says whether the harness is there
    loaded, scorer = open_scorer(
        args.workdir,
        overrides,
        step=args.step,
        weights=args.weights,
        boundary=args.boundary,
        overflow=args.overflow,
    )
    generate = beam_texts(scorer, args.beams) if args.beams != 1 else None
    for benchmark in benchmarks[1:]:  # before the figures of the first
        check_benchmark(benchmark, scorer, shots=args.shots, limit=args.limit, seed=args.seed)
    found = {}
    for benchmark in benchmarks:
        result = run_benchmark(
            benchmark,
            scorer,
            shots=args.shots,
            limit=args.limit,
            normalisation=args.normalise,
            seed=args.seed,
            generate=generate,
        )
        found[benchmark.name] = result
        for line in describe(benchmark.name, result) if is_first() else ():
            print(line, flush=True)
        if args.harness:
            result["harness"] = _parity(benchmark, scorer, result, args)
    values = {"step": loaded.step, "tasks": found}
    if args.harness_tasks:
        from gpt_jax.lm_eval import run_harness

        names = [name.strip() for name in args.harness_tasks.split(",") if name.strip()]
        settings = dict(include_path=args.include_path, shots=args.shots or None, limit=args.limit)
        values["harness_tasks"] = run_harness(scorer, names, **settings)
        for name, metrics in values["harness_tasks"].items() if is_first() else ():
            print(f"{name.ljust(20)} " + ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items()))
    return values


def _generation(args: argparse.Namespace, overrides: Mapping[str, str]) -> dict[str, Any]:
    from gpt_jax.generation_quality import METHODS, evaluate_generation, human_prompts, training_documents
    from gpt_jax.run import rebuild_run

    loaded, scorer = open_scorer(args.workdir, overrides, step=args.step, weights=args.weights)
    reference = open_scorer(args.reference, overrides)[1] if args.reference else None
    data = rebuild_run(args.workdir, overrides).data
    valid = [split for name, split in data.splits.items() if name.rpartition("/")[2] == "valid"]
    if not valid:
        raise UserError(f"the run in {args.workdir!r} holds out no text to take prompts from.")
    given = human_prompts(valid, args.texts, args.prompt_tokens, args.new_tokens)
    methods = [name.strip() for name in args.methods.split(",") if name.strip()] or list(METHODS)
    shown = ("distinct_2", "self_bleu_4", "seq_rep_4", "perplexity", "copy_rate")
    if is_first():
        print("".ljust(16) + "".join(name.rjust(30) for name in shown))

    def say(name: str, values: Mapping[str, float]) -> None:
        cells = (f"{values[m]:.3g} ({values[m + '_low']:.3g} to {values[m + '_high']:.3g})" for m in shown)
        print(name.ljust(16) + "".join(cell.rjust(30) for cell in cells), flush=True)

    settings = dict(methods=methods, seed=args.seed, reference=reference, say=say if is_first() else None)
    found = evaluate_generation(scorer, given, training_documents(data.splits, data.tokenizer), **settings)
    return {"step": loaded.step, "texts": len(given.prompts), "generation": found}


def _parity(benchmark: Any, scorer: Any, result: Mapping[str, Any], args: argparse.Namespace) -> dict[str, float]:
    import tempfile

    from gpt_jax.lm_eval import compare

    with tempfile.TemporaryDirectory() as folder:
        values = compare(benchmark, scorer, result, folder, args.limit)
    if is_first():
        print(f"{'  by the harness'.ljust(20)} " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    return values


def _join(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    from gpt_jax.cli import join_job
    from gpt_jax.config import resolve
    from gpt_jax.inherit import saved_config

    _only_mesh(overrides)
    if cluster.find_place(cluster.environment_of(args)) is not None:  # one process also reads a checkpoint alone
        join_job(args, resolve(saved_config(args.workdir), overrides))


def _only_mesh(overrides: Mapping[str, str]) -> None:
    for key in overrides:
        if not key.startswith("mesh."):
            raise UserError(f"--config.{key}: of a run that is scored only the mesh (--config.mesh.*) can be changed.")


def open_scorer(
    workdir: str, overrides: Mapping[str, str], *, step: int | None = None, weights: str = "auto", **settings: Any
) -> tuple[Any, Any]:
    """Opens a run for scoring, its parameters on the mesh of its config.

    Args:
      overrides: of the mesh ('mesh.tensor') only. settings: of `Scorer`.

    Returns:
      (Loaded, Scorer).

    Raises:
      UserError: no run; one whose objective does not teach it to continue a text; an override of something else.
    """
    from gpt_jax.config import resolve, to_dict
    from gpt_jax.loading import load
    from gpt_jax.run import mesh_of
    from gpt_jax.score import Scorer
    from gpt_jax.sharding import DEFAULT_RULES

    _only_mesh(overrides)
    loaded = load(workdir, step=step, weights=weights)
    if not loaded.objective.generates:
        name = loaded.config.objective["name"]
        raise UserError(
            f"the run in {workdir!r} has the objective {name!r}, which does not teach it to continue a text."
        )
    if loaded.bidirectional_prompt and is_first():
        said = (
            "was trained to see all of a prompt at once (objective.mask=prefix); here contexts are read left to right"
        )
        print(f"the run in {workdir!r} {said}", file=sys.stderr)
    config = resolve(to_dict(loaded.config), overrides)
    mesh, rules = mesh_of(config), (*config.mesh.rules, *DEFAULT_RULES)
    scorer = Scorer(loaded.model, loaded.params, loaded.tokenizer, mesh=mesh, rules=rules, **settings)
    return loaded, scorer


def describe(name: str, result: Mapping[str, Any]) -> list[str]:
    """Lines for people: each metric with its standard error, and the groups if there are any."""
    items = f"{result['items']} items" + (f" of {result['split']}" if "split" in result else "")
    if "groups" not in result:
        return [f"{name.ljust(20)} {_metrics(result)} | {items}, {result['shots']:.3g} shots"]
    lines = [f"  {group.ljust(40)} {_metrics(values)}" for group, values in result["groups"].items()]
    whole = f"{name.ljust(20)} {_metrics(result)} | mean of {len(lines)} groups, {items}, "
    return [*lines, whole + f"{result['shots']:.3g} shots"]


def _metrics(values: Mapping[str, Any]) -> str:
    names = [name for name in values if f"{name}_se" in values]
    chosen = [n for n in names if n != "nll" and not n.startswith("accuracy_")] or names
    return ", ".join(f"{name} {values[name]:.4g} ± {values[f'{name}_se']:.2g}" for name in chosen)
