"""Does augmentation help with ten examples per class? One process, one compiled classifier, resumable.

    python scripts/augment_experiment.py --config=augment/sst2_low --base=RUN --mlm=RUN --rtd=RUN --splits=15 --out=DIR

RUNs are pre-trained: --base with causal_lm (the classifier and the LM generator start from it), --mlm with masked_lm,
--rtd with replaced_token; without the last two their arms are left out. Writes results.jsonl, a row per split and arm,
and table.md; a second start goes on where the first was stopped. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys

from gpt_jax import config as configs
from gpt_jax.augment.command import task_classifier
from gpt_jax.augment.controls import distributional_neighbours
from gpt_jax.augment.experiment import ARMS, Experiment, Models, Protocol, compare, table
from gpt_jax.augment.finetune import Recipe
from gpt_jax.cli import split_overrides, use_compilation_cache
from gpt_jax.data.corpora import iter_documents
from gpt_jax.errors import UserError, choose
from gpt_jax.loading import load
from gpt_jax.tasks import load_task


def main(argv: list[str]) -> int:
    rest, overrides = split_overrides(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="of the classifier: augment/sst2_low, augment/ag_news_low")
    parser.add_argument("--base", required=True, metavar="RUN", help="pre-trained causal_lm")
    parser.add_argument("--mlm", default="", metavar="RUN", help="pre-trained masked_lm")
    parser.add_argument("--rtd", default="", metavar="RUN", help="pre-trained replaced_token")
    parser.add_argument("--oracle", default="", metavar="RUN", help="a classifier of all data, for label fidelity")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated")
    parser.add_argument("--splits", type=int, default=15)
    parser.add_argument("--per-class", type=int, default=10, help="originals")
    parser.add_argument("--count", type=int, default=40, help="synthetic examples per class")
    parser.add_argument("--oversample", type=int, default=5, help="candidates before a filter, times --count")
    parser.add_argument("--generator-steps", type=int, default=20, help="more, and it says its originals by heart")
    parser.add_argument("--generator-rate", type=float, default=0.0, help="learning rate; 0: the classifier's")
    parser.add_argument("--test-limit", type=int, default=0, help="0 tests on all examples")
    parser.add_argument("--neighbours-of", default="", metavar="FILES", help="text for EDA; default: the task's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    args = parser.parse_args(rest)
    use_compilation_cache()
    arms = [choose("an arm", arm, ARMS) for arm in args.arms.split(",")]
    if not args.mlm:
        arms = [arm for arm in arms if not arm.startswith("mlm")]
    if not args.rtd:
        arms = [arm for arm in arms if not arm.endswith("rtd")]
    config = configs.load(args.config, overrides)
    task = load_task(config.data.tasks[0])
    oracle = task_classifier(args.oracle, task, "--oracle") if args.oracle else None
    models = Models(*(load(path) if path else None for path in (args.base, args.mlm, args.rtd)), oracle)
    texts = (text for _, text in iter_documents(path=args.neighbours_of)) if args.neighbours_of else None
    neighbours = distributional_neighbours(texts or (e.text for e in task.examples("train"))) if "eda" in arms else {}
    recipe = Recipe(
        config.steps,
        config.batch_size,
        config.context_length,
        config.optimizer.learning_rate,
        config.optimizer.weight_decay,
        config.optimizer.name,
    )
    rate = args.generator_rate or recipe.learning_rate
    generator = dataclasses.replace(recipe, steps=args.generator_steps, batch_size=8, learning_rate=rate)
    protocol = Protocol(args.per_class, args.count, args.oversample, args.splits, generator, args.test_limit, args.seed)
    out = pathlib.Path(args.out)
    experiment = Experiment(task, config.objective, recipe, models, protocol, neighbours, out)
    summary = compare(experiment.run(arms))
    (out / "table.md").write_text(table(summary))
    print(table(summary))
    print(json.dumps({"out": str(out), "task": task.name, "arms": summary}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"augment_experiment: {error}", file=sys.stderr)
        sys.exit(1)
