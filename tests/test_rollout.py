"""Rollouts: a function of (seed, step, parameters), rewarded on the host, the same again after a restart."""

import collections
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import apply_of, params_of, tiny
from toy_tasks import reverse

from gpt_jax.cli import main
from gpt_jax.config import resolve
from gpt_jax.data.batches import BatchOrder, TrainSource
from gpt_jax.data.formats import TaskInfo
from gpt_jax.data.mixture import MixtureSource
from gpt_jax.data.task_rows import EncodedTask
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.generation import generate
from gpt_jax.metrics import read_rows
from gpt_jax.model import Transformer
from gpt_jax.objectives.base import Host
from gpt_jax.objectives.policy_gradient import PolicyGradient
from gpt_jax.optim import make_optimizer
from gpt_jax.rewards import make_rewards
from gpt_jax.rollout import RolloutSource
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step
from gpt_jax.tasks import TextToText
from gpt_jax.train import train

TOKENIZER = ByteTokenizer(["eot"])
CONFIG = tiny(vocab_size=257, max_positions=20)
OPTIONS = dict(rewards=("edit_distance", "length"), rollout_every=2, group=4, max_new=5, generate_rows=16)


def source_of(rows=8, length=20, **options):
    objective = PolicyGradient(Transformer(CONFIG), **OPTIONS | options)
    layout = PolicyGradient.rows(OPTIONS | options, Host({"eot": TOKENIZER.eot}, length, rows))
    task = reverse(train=6)
    encoded = EncodedTask(task, TaskInfo(0, "reverse"), task.examples("train"), layout, TOKENIZER, length)
    return RolloutSource(objective, TrainSource(encoded, BatchOrder(rows), 5, whole=False))


def step_of(source, devices=1):
    mesh = make_mesh(devices=jax.devices()[:devices])
    return build_train_step(source.objective, make_optimizer("adamw", 1e-3), source.spec(), mesh=mesh)


def both(params):
    return {"model": params, "reference": params}


@pytest.fixture(scope="module")
def served():
    """A source after its second rollout, and the step it serves."""
    source = source_of()
    step = step_of(source)
    source.refresh(2, both(params_of(CONFIG)), step)
    return source, step


def batches(source, first=2):
    return [source.rows(step, slice(None)) for step in range(first, first + source.every)]


def test_a_rollout_has_the_log_probabilities_that_its_sampler_drew_with(served):
    source, _ = served
    for batch in batches(source):
        logits = np.asarray(apply_of(CONFIG)(params_of(CONFIG), batch["tokens"]).logits, np.float64)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = np.take_along_axis(table, batch["targets"][..., None], -1)[..., 0]
        answer = batch["target_weights"] > 0
        assert answer.any(1).all()
        np.testing.assert_allclose(batch["behaviour_logprobs"][answer], expected[answer], atol=1e-4)
        assert (batch["reference_logprobs"] == batch["behaviour_logprobs"]).all()  # the reference is the policy


def test_rewards_are_those_of_the_answers_and_their_groups(served):
    source, _ = served
    owners = [example for _, example in source.examples(1) for _ in range(4)]
    texts = collections.Counter()
    rows = source.rollouts[1]
    for i, example in enumerate(owners):
        ids = rows["targets"][i][rows["target_weights"][i] > 0].tolist()
        text = TOKENIZER.decode([t for t in ids if t != TOKENIZER.eot])
        values = [function([text], [example])[0] for _, _, function in source.rewards]
        np.testing.assert_allclose(rows["rewards"][i], values, rtol=1e-6)
        assert rows["group_rewards"][i, rows["member"][i]] == pytest.approx(sum(values), rel=1e-6)
        texts[text] += 1
    assert len(texts) > 8  # the answers of a group are draws of their own
    groups = rows["group_rewards"].reshape(-1, 4, 4)
    assert (groups == groups[:, :1]).all()


def test_every_answer_is_served_once_an_epoch():
    for epochs in (1, 2):
        source = source_of(rollout_every=4, rollout_epochs=epochs)
        places = np.concatenate([source.places(step) for step in range(4, 8)])
        assert sorted(collections.Counter(places.tolist()).values()) == [epochs] * source.size
        assert source.size == 8 * 4 // epochs
    assert source.places(4).tolist() != source.places(8).tolist()


def test_all_prompts_come_before_any_comes_twice():
    source = source_of()
    prompts = [example.source for number in range(6) for _, example in source.examples(number)]
    count = len(source.makers[0].examples)
    assert count == 6 and set(prompts[:count]) == {e.source for e in source.makers[0].examples}
    assert prompts[:count] != prompts[count : 2 * count]


def test_several_tasks_are_mixed_by_prompts_however_many_of_them_a_row_holds():
    makers = []
    layout = PolicyGradient.rows(OPTIONS, Host({"eot": TOKENIZER.eot}, 40, 8))
    for number, source in enumerate(("ab", "long as a whole row of its own!")):
        task = reverse(train=12)
        examples = [TextToText(f"{source}{i}", "x") for i in range(12)]
        makers.append(EncodedTask(task, TaskInfo(number, str(number)), examples, layout, TOKENIZER, 40))
    assert makers[0].rows_per_epoch <= 3 and makers[1].rows_per_epoch == 12
    weights = [0.5 * maker.rows_per_epoch / 12 for maker in makers]  # as of data.task_rates='equal'
    source = RolloutSource(
        PolicyGradient(Transformer(CONFIG), **OPTIONS),
        MixtureSource(makers, weights, ["short", "long"], BatchOrder(8), 5, whole=False),
    )
    drawn = [maker for number in range(20) for maker, _ in source.examples(number)]
    assert abs(sum(maker is makers[0] for maker in drawn) - len(drawn) / 2) <= 2


def test_a_prompt_is_cut_to_what_the_models_positions_hold():
    source = source_of()
    prompt = source.prompt(source.makers[0], TextToText("long " * 20, "x"))
    assert len(prompt) == 20 - OPTIONS["max_new"] and prompt[0] == TOKENIZER.eot
    source.draw(params_of(CONFIG), [prompt], [0])  # of a model with 20 learned positions


def test_a_rollout_is_a_function_of_seed_step_and_parameters_whatever_the_devices(served):
    source, step = served
    expected = batches(source)
    again = source_of()
    again.refresh(0, both(params_of(CONFIG)), step)
    other = batches(again, 0)
    again.refresh(2, both(params_of(CONFIG)), step)
    for a, b, c in zip(expected, batches(again), other, strict=True):
        assert all((a[name] == b[name]).all() for name in a)
        assert not (a["targets"] == c["targets"]).all()  # another rollout, other draws
    spread = source_of()
    wide = step_of(spread, devices=8)
    placed = jax.tree.map(jax.device_put, both(params_of(CONFIG)), wide.param_shardings)
    spread.refresh(2, placed, wide)
    for a, b in zip(expected, batches(spread), strict=True):
        assert (a["targets"] == b["targets"]).all()
        np.testing.assert_allclose(a["behaviour_logprobs"], b["behaviour_logprobs"], atol=1e-5)


def test_the_sampler_draws_from_the_policy_at_its_temperature():
    """Answers of a cold policy are the greedy ones; group_kl is the sum of log-ratios to the reference."""
    source = source_of(temperature=1e-3)
    step = step_of(source)
    other = params_of(CONFIG, seed=1)
    source.refresh(0, {"model": params_of(CONFIG), "reference": other}, step)
    rows = source.rollouts[0]
    for i in (0, 9):
        answer = rows["target_weights"][i] > 0
        prompt = rows["tokens"][i, : answer.argmax() + 1].tolist()
        greedy = generate(
            Transformer(CONFIG), params_of(CONFIG), [prompt], max_tokens=5, temperature=0.0, eot=TOKENIZER.eot
        )[0]
        ids = rows["targets"][i][answer].tolist()
        assert [t for t in ids if t != TOKENIZER.eot] == greedy
    own = np.take_along_axis(rows["group_kl"], rows["member"][:, None], 1)[:, 0]
    mask = rows["target_weights"]
    expected = (mask * (rows["behaviour_logprobs"] - rows["reference_logprobs"])).sum(1)
    np.testing.assert_allclose(own, expected, rtol=1e-5)


TINY = {
    "steps": 8,
    "batch_size": 8,
    "context_length": 20,
    "model": {"num_layers": 1, "d_model": 16, "num_heads": 2, "positions": "rope"},
    "objective": {"name": "policy_gradient", **OPTIONS, "beta": 0.1},
    "data": {"tokenizer": {"kind": "byte"}, "tasks": ("toy_tasks:reverse",)},
    "optimizer": {"learning_rate": 1e-3},
    "eval": {"every_steps": 3, "max_batches": 1, "max_generated": 2},
    "checkpoint": {"every_steps": 4},
    "log": {"tensorboard": False},
    "sample": {"prompts": ()},
}


def quiet(line):
    pass


def rows_without_perf(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


@pytest.mark.slow
def test_a_run_that_is_continued_makes_the_same_rollouts(tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    summary = train(resolve(TINY), str(whole), log=quiet)
    assert "valid/exact_match" in summary and summary["step"] == 8
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "8")
    train(resolve(TINY), str(again), log=quiet)
    expected, found = rows_without_perf(whole), rows_without_perf(again)
    assert found == expected and len(found) == 8
    assert {"train/reward", "train/reward/length", "train/kl", "train/entropy", "train/length"} <= expected[0].keys()
    assert expected[0]["train/kl"] == 0 and expected[-1]["train/kl"] > 0  # the reference is where it began
    perf = [row for row in read_rows(whole / "metrics.jsonl") if "perf/rollout_tokens_per_s" in row]
    assert [row["step"] for row in perf] == [1, 3, 5, 7]


@pytest.mark.slow
def test_a_run_killed_in_a_rollout_goes_on_with_the_same_rollouts(tmp_path):
    """kill -9 while the answers of the fourth rollout are judged; the last checkpoint lies one rollout before."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    config = TINY | {"objective": TINY["objective"] | {"rewards": ("edit_distance", "toy_tasks:fatal")}}
    train(resolve(config), str(whole), log=quiet)
    code = "import json, sys; from gpt_jax.config import resolve; from gpt_jax.train import train; "
    code += "train(resolve(json.loads(sys.argv[1])), sys.argv[2])"
    command = [sys.executable, "-c", code, json.dumps(config), str(again)]
    saved = again / "checkpoints" / "4"
    paths = {"PYTHONPATH": os.path.dirname(__file__)}
    environment = os.environ | {"FATAL_CALL": "4", "FATAL_AFTER": str(saved)} | paths
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert sorted(os.listdir(again / "checkpoints")) == ["4", "frozen"]
    train(resolve(config), str(again), log=quiet)
    expected, found = rows_without_perf(whole), rows_without_perf(again)
    assert found == expected and [row["step"] for row in found] == list(range(1, 9))
    rollouts = [row["step"] for row in read_rows(again / "metrics.jsonl") if "perf/rollout_tokens_per_s" in row]
    assert rollouts == [1, 3, 5, 7]


@pytest.mark.slow
def test_a_run_asked_to_stop_stops_between_rollouts(tmp_path, monkeypatch):
    from gpt_jax.workdir import Preemption

    def agreed(self, step):
        self.requested = True
        return True

    monkeypatch.setattr(Preemption, "agreed", agreed)
    objective = TINY["objective"] | {"rollout_every": 4}
    summary = train(resolve(TINY | {"objective": objective}), str(tmp_path), log=quiet)
    assert summary["step"] == 4 and summary["exit_code"] == 75


@pytest.mark.slow
def test_a_step_of_a_run_is_replayed_with_its_rollout(tmp_path):
    from gpt_jax.forensics.replay import replay

    train(resolve(TINY | {"log": {"tensorboard": False, "spike_z": 0.01}}), str(tmp_path), log=quiet)
    found = replay(str(tmp_path), 7)  # the first step of the second rollout after the checkpoint of step 4
    assert found["same"] is True and found["from"] == 4
    assert np.ptp(found["rows"]["weights/policy"]) > 0  # the loss of each row


@pytest.mark.slow
def test_text_and_policy_gradient_share_an_update(tmp_path):
    tasks = {
        "text": {"name": "causal_lm", "rows": 8},
        "rl": {**TINY["objective"], "rows": 8, "data": {"tasks": ("toy_tasks:reverse",)}},
    }
    data = {"tokenizer": {"kind": "byte"}}
    changes = {"objective": {"name": "mixture", "tasks": tasks}, "data": data, "batch_size": 16, "steps": 4}
    train(resolve(TINY | changes), str(tmp_path), log=quiet)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert {"train/loss/text/lm", "train/loss/rl/policy", "train/rl/reward", "valid/rl/exact_match"} <= rows[-1].keys()


def test_mistakes_are_named_before_training(tmp_path, capsys):
    flags = ["--config.model.num_layers=1", "--config.model.d_model=16", "--config.model.num_heads=2"]
    for given, message in (
        ("--config.steps=7", "steps is 7; it must be a multiple of objective.rollout_every (2)"),
        ("--config.checkpoint.every_steps=3", "checkpoint.every_steps is 3"),
        ("--config.objective.rewards=exact_math", "did you mean 'exact_match'"),
        ("--config.objective.group=7", "objective.group is 7, which the 128 answers of a rollout"),
        ("--config.data.tasks=python_kinds", "takes 'text_to_text'"),
    ):
        assert main(["train", "--config=policy_gradient", f"--workdir={tmp_path}", *flags, given]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(UserError, match="neither batch_schedule nor data.skip"):
        source = source_of()
        order = BatchOrder(8, skip=((0, 1),))
        RolloutSource(source.objective, TrainSource(source.makers[0], order, 5, whole=False))


# Rewards.


def example(source="s", target="12"):
    return TextToText(source, target)


@pytest.mark.parametrize(
    "spec, answers, expected",
    [
        ("exact_match", ["12", " 12 ", "13"], [1, 1, 0]),
        ("edit_distance", ["12", "13", "", "1234"], [1, 0.5, 0, 0.5]),
        ({"name": "format", "pattern": r" \d+"}, [" 12", "12", " 12a", " 7\n"], [1, 0, 0, 0]),
        ("length", ["", "abc"], [0, 3]),
        ({"name": "length", "target": 2}, ["", "abc"], [-2, -1]),
    ],
)
def test_rewards(spec, answers, expected):
    [(_, weight, reward)] = make_rewards([spec])
    assert weight == 1 and reward(answers, [example()] * len(answers)) == pytest.approx(expected)


def test_arithmetic_is_computed_anew():
    [(_, _, reward)] = make_rewards(["arithmetic"])
    asked = ["Q: What is 48 plus 76?\n\nA:", "Q: What is 4 minus 7?\n\nA:", "Q: What is 3 times 9?\n\nA:", "no sum"]
    examples = [dataclasses.replace(example(), source=text) for text in asked]
    assert reward([" 124", " -3", " 28", "0"], examples) == [1, 1, 0, 0]


def test_mistakes_in_rewards_are_named():
    for spec, message in (
        ("exact_math", "did you mean 'exact_match'"),
        ({"name": "format", "patern": "x"}, "has no option 'patern' .did you mean 'pattern'"),
        ({"name": "format", "pattern": "("}, "is no regular expression"),
        ({"name": "classifier"}, "needs the option 'workdir'"),
        ({"weight": 1.0}, "has {'weight': 1.0}; a name, or a table with a 'name', is needed"),
        (3, "has 3; a name"),
        ({"name": "format", "pattern": 3}, "reward format: pattern is 3; a text is needed"),
        ({"name": "length", "target": "9"}, "reward length: target is '9'; a whole number is needed"),
        ({"name": "format", "weight": "much"}, "the weight of format is 'much'; a number is needed"),
        ({"name": "format", "weight": float("nan")}, "the weight of format is nan"),
    ):
        with pytest.raises(UserError, match=message):
            make_rewards([spec])
    with pytest.raises(UserError, match="is empty"):
        make_rewards([])
    with pytest.raises(UserError, match="objective.rewards is {'name': 'format'}; a list"):
        make_rewards({"name": "format"})


def test_the_arithmetic_task_has_gpt3s_format_and_no_problem_on_both_sides():
    from gpt_jax.tasks import load_task
    from gpt_jax.tasks.synthetic_arithmetic import solve

    task = load_task("synthetic_arithmetic")
    splits = {name: task.examples(name) for name in ("train", "valid", "test")}
    assert sum(map(len, splits.values())) == 10_000
    pairs = {name: {frozenset(e.where.split(" plus ")) for e in split} for name, split in splits.items()}
    assert not pairs["train"] & pairs["valid"] and not pairs["train"] & pairs["test"]
    assert all(solve(e.source) == e.target.strip() for e in splits["test"])
    one = splits["train"][0]
    a, _, b = one.where.split()
    assert one.source == f"Q: What is {a} plus {b}?\n\nA:" and one.target == f" {int(a) + int(b)}"
    assert len(load_task({"name": "synthetic_arithmetic", "digits": 5, "size": 50}).examples("train")) > 20


@pytest.mark.slow
def test_a_classifier_whose_task_has_other_labels_now_is_refused(tmp_path):
    from gpt_jax.classifier import load_classifier

    rows, path = "text\tlabel\na cat\tgood\na dog\tpoor\n", tmp_path / "x.tsv"
    path.write_text(rows)
    spec = {"name": "classification", "train": str(path), "hold_out": 0}
    changes = {"objective": {"name": "classify"}, "data": {"tokenizer": {"kind": "byte"}, "tasks": (spec,)}, "steps": 1}
    train(resolve(TINY | changes), str(tmp_path / "run"), log=quiet)
    assert load_classifier(tmp_path / "run").labels == ("good", "poor")
    path.write_text(rows + "a cow\tbad\n")
    with pytest.raises(UserError, match=r"has 2 outputs, but its task has 3 labels now \(bad, good, poor\)"):
        load_classifier(tmp_path / "run")


@pytest.mark.slow
def test_a_classifier_may_be_the_reward(tmp_path):
    from gpt_jax.classifier import load_classifier

    changes = {
        "objective": {"name": "classify"},
        "data": {"tokenizer": {"kind": "byte"}, "tasks": ("toy_tasks:colours",)},
        "steps": 2,
    }
    train(resolve(TINY | changes), str(tmp_path), log=quiet)
    [(_, _, reward)] = make_rewards([{"name": "classifier", "workdir": str(tmp_path), "label": "red"}])
    found = load_classifier(tmp_path)
    texts = ["red no. 1", "very green", "b" * 50]
    values = found.probabilities(texts)
    np.testing.assert_allclose(values.sum(1), 1, rtol=1e-5)
    assert reward(texts, [example()] * 3) == pytest.approx(values[:, found.labels.index("red")].tolist())
    alone = np.concatenate([found.probabilities([text]) for text in texts])
    np.testing.assert_allclose(values, alone, atol=1e-6)
    with pytest.raises(UserError, match="did you mean 'red'"):
        make_rewards([{"name": "classifier", "workdir": str(tmp_path), "label": "rad"}])
    assert json.loads((tmp_path / "config.json").read_text())["objective"]["name"] == "classify"
