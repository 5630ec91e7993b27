"""Scripts that no other test runs: tables of task results and of plans, and edit distance beside a discriminator."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import load_script


def call(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    return script.main()


# -- _venv ---------------------------------------------------------------------------------------------------------


# As Debian's python3 without python3-venv: the module leaves a folder without pip. A pip of its own it may have or not.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-c "* | --version) exec {python} "$@" ;;
  "-m venv"*)
    mkdir -p .venv/bin
    ln -sf {python} .venv/bin/python
    [[ "$*" = *--without-pip* ]] && exit 0
    echo "The virtual environment was not created successfully because ensurepip is not"
    echo "available."
    exit 1 ;;
  "-m pip --python .venv/bin/python install"*)
    [ -n "${HAS_PIP:-}" ] || { echo "No module named pip" >&2; exit 1; }
    printf '#!/bin/sh\\necho "$@" >> said\\n' > .venv/bin/pip
    rm .venv/bin/python
    mv .venv/bin/pip .venv/bin/python
    chmod +x .venv/bin/python ;;
esac
"""


@pytest.mark.parametrize("has_pip", ["", "yes"])
def test_no_half_made_venv_stays_where_the_module_venv_is_not_whole(tmp_path, has_pip):
    root = pathlib.Path(__file__).resolve().parent.parent
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/_venv.sh", "setup.cfg", "pyproject.toml"):
        shutil.copy(root / name, tmp_path / name)
    stub = tmp_path / "python3"
    stub.write_text(PYTHON.replace("{python}", sys.executable))
    stub.chmod(0o755)
    command = ["bash", "-c", "set -euo pipefail; source scripts/_venv.sh; ensure_venv test; echo made"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "HAS_PIP": has_pip}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    if has_pip:
        assert done.returncode == 0 and done.stdout.endswith("made\n"), done.stderr
        assert (tmp_path / "said").read_text().startswith("-m pip install") and (tmp_path / ".venv").exists()
    else:
        assert done.returncode == 1 and not (tmp_path / ".venv").exists()
        assert done.stderr.count("\n") == 1 and "ensurepip is not" in done.stderr
        assert done.stderr.endswith("on Debian and Ubuntu: apt install python3-venv\n")


# -- task_results --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    return load_script("task_results")


def entry(row, start, seed, score, metric="accuracy"):
    return {"row": row, "start": start, "seed": seed, "metric": metric, "score": score, "seconds": 60 + seed}


def test_the_table_of_task_results_has_means_and_the_interval_of_paired_seeds(results, tmp_path, monkeypatch, capsys):
    found = [
        entry("sst2", "pretrained", 0, 0.8),
        entry("sst2", "scratch", 0, 0.7),
        entry("e2e", "pretrained", 0, 31.3),
    ]
    found += [entry("sst2", "pretrained", 1, 0.9), entry("sst2", "scratch", 1, 0.6)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    assert call(results, monkeypatch, f"--out={tmp_path}", "--table") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    # Differences of 0.1 and 0.3: a standard deviation of 0.1 sqrt(2), over sqrt(2), times t(0.975; 1) = 12.7062.
    assert lines[2] == "| sst2 | accuracy | 0.850 | 0.650 | +0.200 (-1.071 to +1.471) | 2 | 60 |"
    assert lines[3] == "| e2e | accuracy | 31.3 |  |  | 1 | 60 |"
    assert json.loads(last)["sst2"]["scratch"] == [0.7, 0.6]


def test_runs_of_a_table_go_by_seeds_and_mistakes_are_told(results, tmp_path, monkeypatch, capsys):
    rows = [results.Row("a", "tasks/sst2", "accuracy", seeds=2, scratch=True), results.Row("b", "tasks/e2e", "bleu")]
    runs = [(row.name, start, seed) for row, start, seed in results.cells(rows)]
    first = [("a", "pretrained", 0), ("a", "scratch", 0), ("b", "pretrained", 0)]
    assert runs == [*first, ("a", "pretrained", 1), ("a", "scratch", 1)]
    for flags, said in (
        (["--rows=sst3", "--table"], "--rows has 'sst3'"),
        ([f"--base={tmp_path / 'none'}"], "it must be the workdir of a finished run"),
    ):
        with pytest.raises(SystemExit):
            call(results, monkeypatch, f"--out={tmp_path}", *flags)
        assert said in capsys.readouterr().err
    (tmp_path / "results.jsonl").write_text(json.dumps({**entry("sst2", "pretrained", 0, 0.8), "config": "old"}) + "\n")
    (tmp_path / "base" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit):
        call(results, monkeypatch, f"--base={tmp_path / 'base'}", f"--out={tmp_path}")
    assert "has 'sst2' of another config than today's" in capsys.readouterr().err


def test_a_part_of_a_mixture_is_what_the_config_has(results):
    from gpt_jax.config import load

    overrides = dict(text.removeprefix("--config.").split("=", 1) for text in results.alone("tasks/four", "wnut17"))
    config = load("tasks/four", overrides)
    assert list(config.objective["tasks"]) == ["wnut17"] and config.batch_size == 8
    assert config.objective["tasks"]["wnut17"] == load("tasks/four").objective["tasks"]["wnut17"]


# -- plan_vs_measured ----------------------------------------------------------------------------------------------


def test_the_error_of_plans_is_a_median_of_an_even_number_too_and_the_page_has_that_of_its_rows():
    script = load_script("plan_vs_measured")
    rows = {f"{error}": {"planned": 100.0 - error, "measured": 100.0} for error in (1, 12, 2, 5)}
    assert script.error_line(rows) == "Error of the plan: median 3.5%, at most 12.0%."
    assert script.error_line(script.rows_kept()) in script.PAGE.read_text()


# -- edit_distance_detector ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector():
    return load_script("edit_distance_detector")


def test_costs_of_a_window_are_those_around_a_token_cut_at_the_ends(detector):
    p = np.random.default_rng(0).random((2, 5, 5)).astype(np.float32)
    costs, lengths = detector.window_costs(p, np.array([1, 0]), np.array([0, 2]), 1)
    assert lengths.tolist() == [2, 3]
    np.testing.assert_array_equal(costs[0, :2, :2], 1 - p[1, :2, :2])
    assert (costs[0, 2] == 1).all() and (costs[0, :, 2] == 1).all()
    np.testing.assert_array_equal(costs[1], 1 - p[0, 1:4, 1:4])


DETECTORS = ["discriminator", *(f"edit distance, window {n}" for n in (0, 1, 3))]


@pytest.mark.parametrize("auc", [1.0, 0.0])
def test_what_separates_wrong_tokens_has_the_auc_1_and_what_is_reversed_0(detector, auc):
    at = np.array([*range(9), *range(15, 24)])  # windows of up to 7 around these are all right or all wrong
    wrong = np.arange(24) >= 12
    p = np.diag((wrong != auc).astype(np.float32))[None]  # sure of the right tokens; reversed: of the wrong ones
    sure = np.where(wrong == auc, 0.9, 0.1)
    found = detector.aucs(wrong[at], sure[at], p, np.zeros(len(at), int), at)
    assert found == dict.fromkeys(DETECTORS, auc)


@pytest.mark.slow
def test_the_detectors_are_compared_on_a_run(detector, tmp_path, monkeypatch, capsys):
    from gpt_jax.config import resolve
    from gpt_jax.train import train

    small = {
        "steps": 60,
        "batch_size": 8,
        "context_length": 32,
        "model": {"num_layers": 1, "d_model": 64, "num_heads": 2, "positions": "rope"},
        "objective": {"name": "replaced_token"},
        "optimizer": {"learning_rate": 1e-2},
        "data": {"tokenizer": {"kind": "byte"}},
        "eval": {"every_steps": 0, "max_batches": 1},
        "log": {"tensorboard": False},
        "sample": {"prompts": ()},
    }
    train(resolve(small), str(tmp_path / "run"), log=lambda line: None)
    capsys.readouterr()
    assert call(detector, monkeypatch, f"--workdir={tmp_path / 'run'}", "--rows=30") == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert result["step"] == 60 and result["rows"] == 30 and 0 < result["levenshtein"] <= result["hamming"]
    for where in ("selected", "all"):
        assert list(result["auc"][where]) == DETECTORS
        assert sum(line.startswith(f"{where} tokens: ") for line in out) == 1
    assert call(detector, monkeypatch, f"--workdir={tmp_path / 'none'}") == 1
    assert capsys.readouterr().err.startswith("edit_distance_detector: ")
