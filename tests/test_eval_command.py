"""`gpt-jax eval --tasks`: from a run's folder to figures with standard errors, in one line of JSON."""

import argparse
import json

import jax
import optax
import pytest
from test_sample_command import save_run

from gpt_jax import cluster
from gpt_jax.cli import main
from gpt_jax.eval_command import _READ_BY, add_arguments


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "plain"
    save_run(path, optax.adam(0.1), (3,))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    rows = [{"prompt": f"item {i} is", "choices": ["one", "two", "some"], "answer": i % 3} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(capsys, *flags):
    assert main(["eval", *map(str, flags)]) == 0
    return capsys.readouterr().out.splitlines()


def test_figures_have_standard_errors_and_the_last_line_is_json(run, file, capsys):
    lines = evaluate(capsys, f"--workdir={run}", f"--tasks=choices:{file},toy_tasks:colours", "--shots=1")
    result = json.loads(lines[-1])
    assert result["step"] == 3 and set(result["tasks"]) == {"choices", "colours"}
    choices = result["tasks"]["choices"]
    assert 0 <= choices["accuracy"] <= 1 and choices["accuracy_se"] < 0.1 and choices["shots"] == 1
    assert 30 <= choices["items"] < 40  # some of them demonstrate
    assert lines[0].startswith("choices") and "±" in lines[0] and "1 shots" in lines[0]
    for how in ("sum", "byte", "unconditional"):
        flags = (f"--workdir={run}", f"--tasks=choices:{file}", f"--normalise={how}", "--limit=12")
        found = json.loads(evaluate(capsys, *flags)[-1])["tasks"]["choices"]
        assert found["items"] == 12 and found["accuracy"] == found[f"accuracy_{how}"]


def test_it_is_said_where_a_run_was_trained_under_another_mask(run, file, capsys, monkeypatch):
    monkeypatch.setattr("gpt_jax.loading.Loaded.bidirectional_prompt", True)
    assert main(["eval", f"--workdir={run}", f"--tasks=choices:{file}", "--limit=4"]) == 0
    assert "here contexts are read left to right" in capsys.readouterr().err


def test_a_mesh_gives_the_same_figures(run, file, capsys):
    flags = (f"--workdir={run}", f"--tasks=choices:{file}")
    assert jax.device_count() == 8
    spread = json.loads(evaluate(capsys, *flags, "--config.mesh.data=4", "--config.mesh.fsdp=2")[-1])
    tensor = json.loads(evaluate(capsys, *flags, "--config.mesh.tensor=2", "--config.mesh.fsdp=4")[-1])
    assert spread["tasks"] == tensor["tasks"]


def test_the_harness_runs_beside(run, file, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (the extra 'eval') is not installed")
    lines = evaluate(capsys, f"--workdir={run}", f"--tasks=choices:{file}", "--harness", "--limit=10")
    assert json.loads(lines[-1])["tasks"]["choices"]["harness"]["largest_difference"] < 1e-9


def test_a_table_names_a_task_of_ones_own_files_and_the_split_is_in_the_result(run, file, tmp_path, capsys):
    (tmp_path / "reviews.tsv").write_text("text\tstars\n" + "".join(f"review {i}\t{i % 3}\n" for i in range(40)))
    table = {"name": "classification", "train": str(tmp_path / "reviews.tsv"), "label": "stars", "hold_out": 0.4}
    lines = evaluate(capsys, f"--workdir={run}", f"--tasks={table}", "--shots=1", "--limit=5")
    alone = json.loads(lines[-1])["tasks"]
    assert set(alone) == {"classification"} and "5 items of valid" in lines[0]
    assert alone["classification"]["split"] == "valid" and 0 <= alone["classification"]["accuracy"] <= 1
    flags = (f"--workdir={run}", f"--tasks={[f'choices:{file}', table]}", "--shots=1", "--limit=5", "--split=valid")
    both = json.loads(evaluate(capsys, *flags)[-1])["tasks"]
    assert both["classification"] == alone["classification"] and "split" not in both["choices"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tasks=choises"], "unknown benchmark 'choises' (did you mean 'choices'"),
        (["--shots=2"], "--shots is 2, but no --tasks are named"),
        (["--tasks=choices:FILE", "--shots=-1"], "--shots is -1"),
        (["--tasks=choices:FILE", "--shots=300"], "300 demonstrations are asked for, but there are"),
        (["--tasks=choices:FILE", "--normalise=mean"], "normalise is 'mean'"),
        (["--tasks=choices:FILE", "--config.steps=2"], "only the mesh"),
        (["--tasks=choices:FILE", "--boundary=none"], "boundary is 'none'"),
        (["--tasks=choices:/none.jsonl"], "/none.jsonl"),
        (["--tasks=toy_tasks:colours", "--split=vlaid"], "split of task colours is 'vlaid' (did you mean 'valid'?)"),
        (["--tasks={'name'"], "--tasks \"{'name'\" is no table such as"),
        (["--tasks=[{'limit': 3}]"], "is no table such as"),
        (["--tasks={'name': 'clasification'}"], "'clasification' (did you mean 'classification'?)"),
        (["--tasks=toy_tasks:colours,toy_tasks:colours"], "--tasks names a benchmark twice: colours, colours"),
        (["--tasks=toy_tasks:colours,choices:/none.jsonl"], "/none.jsonl"),
        (["--tasks=choices:FILE", "--split=valid"], "--split is 'valid', but no task named has splits"),
        (["--tasks=choices:FILE", "--include-path=x"], "--include-path is 'x', but no --harness-tasks are named"),
        (["--tasks=choices:FILE", "--max-batches=2"], "--max-batches is 2, which --tasks does not read"),
        (["--tasks=choices:FILE", "--texts=2"], "--texts is 2, which --tasks does not read"),
        (["--generation", "--beams=2"], "--beams is 2, which --generation does not read"),
        (["--texts=2"], "--texts is 2, but no --generation is given"),
        (["--harness"], "--harness is True, but no --tasks are named"),
        (["--tasks=choices:FILE", "--harness", "--shots=1"], "--harness compares scores without demonstrations"),
        (["--tasks=toy_tasks:reverse", "--harness"], "--harness compares scores without demonstrations"),
        (["--max-batches=-1"], "--max-batches is -1; it must be at least 0"),
        (["--tasks=choices:FILE", "--limit=-2"], "--limit is -2; it must be at least 0"),
    ],
)
def test_mistakes_are_told_in_a_line(run, file, capsys, flags, said):
    assert main(["eval", f"--workdir={run}", *(flag.replace("FILE", str(file)) for flag in flags)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_a_negative_seed_draws_demonstrations(run, file, capsys):
    lines = evaluate(capsys, f"--workdir={run}", f"--tasks=choices:{file}", "--shots=1", "--limit=4", "--seed=-1")
    assert json.loads(lines[-1])["tasks"]["choices"]["items"] == 4


def test_a_generated_answer_takes_half_the_positions_at_most(run, capsys):
    # 64 tokens would not fit the 48 learned positions.
    lines = evaluate(capsys, f"--workdir={run}", "--tasks=toy_tasks:reverse", "--limit=3")
    assert "exact_match" in json.loads(lines[-1])["tasks"]["reverse"]


def test_the_flags_that_only_some_evaluations_read_are_all_named():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    others = {"help", "workdir", "step", "weights", "tasks", "generation"}
    cluster_flags = argparse.ArgumentParser()
    cluster.add_arguments(cluster_flags)
    others |= {action.dest for action in cluster_flags._actions}
    assert set(_READ_BY) == {action.dest for action in parser._actions} - others
