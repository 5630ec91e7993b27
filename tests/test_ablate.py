"""gpt-jax ablate: grids; cells that are done, missing or of another config or data; what the report says of them."""

import json
import re
import textwrap

import numpy as np
import pytest
import scipy.stats

from gpt_jax import cli
from gpt_jax.ablation import Ablation, chain, over, product, zipped
from gpt_jax.ablation.cells import FILE, _flops
from gpt_jax.ablation.grid import cells_of, load_ablation
from gpt_jax.ablation.report import _positions, budget_table
from gpt_jax.ablation.results import compare_runs
from gpt_jax.config import resolve, to_dict
from gpt_jax.errors import UserError
from gpt_jax.run import order_of

ARMS = {"plain": {}, "wide": {"model.d_model": 32}, "slow": {"optimizer.learning_rate": 1e-4}}
# Made-up final losses: 'wide' is lower by 0.1 in every seed, 'slow' differs by noise alone.
LOSSES = {
    "plain": [2.0, 2.3, 1.9, 2.2, 2.1],
    "wide": [1.9, 2.21, 1.79, 2.1, 2.0],
    "slow": [2.1, 2.2, 2.0, 2.1, 2.15],
}


@pytest.fixture
def file(tmp_path):
    """An ablation of a model small enough to train in a second."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    path = tmp_path / "mine.py"
    path.write_text(
        textwrap.dedent(
            f"""
            from gpt_jax.ablation import Ablation
            from gpt_jax.config import base

            def get_ablation():
                config = base()
                config.steps, config.batch_size, config.context_length = 3, 8, 16
                config.model.update(num_layers=1, d_model=16, num_heads=2)
                config.data.update(path={str(tmp_path / "text.txt")!r}, split="tail")
                config.data.tokenizer.kind = "byte"
                config.eval.every_steps = 1
                config.checkpoint.every_steps = 0
                config.sample.prompts = ()
                return Ablation(question="Which is best?", config=config, arms={ARMS!r})
            """
        )
    )
    return str(path)


def pretend(file, workdir, skip=()):
    """Writes the records of cells as if they had run."""
    for cell in cells_of(load_ablation(file), workdir):
        if (cell.arm, cell.seed) in skip:
            continue
        cell.path.mkdir(parents=True)
        value = LOSSES[cell.arm][cell.seed - 1]
        record = {
            "arm": cell.arm,
            "seed": cell.seed,
            "identity": cell.identity,
            "data": "abc",
            "code": {"commit": "c0ffee", "dirty": cell.seed == 5},
            "flops_per_step": 2e12,
            "tokens_per_step": 128,
            "values": {"valid/loss": value, "train/loss": value},
            "config": json.loads(json.dumps(to_dict(cell.config))),
        }
        (cell.path / FILE).write_text(json.dumps(record))
        rows = [{"step": s, "valid/loss": value + 3 - s, "perf/step_ms": 500.0} for s in (1, 2, 3)]
        (cell.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(capsys, *arguments):
    code = cli.main(["ablate", *arguments])
    out = capsys.readouterr()
    return code, json.loads(out.out.strip().splitlines()[-1]) if code == 0 else {}, out


def test_the_algebra_of_grids():
    a, b = over("model.ffn", "gelu", "relu2"), over("steps", 1, 2)
    assert product(a, b)[1] == {"model.ffn": "gelu", "steps": 2} and len(product(a, b)) == 4
    assert zipped(a, b) == [{"model.ffn": "gelu", "steps": 1}, {"model.ffn": "relu2", "steps": 2}]
    assert chain(a, b) == [*a, *b]
    named = Ablation(question="", config={}, arms=product(a, b))
    assert next(iter(named.arms)) == named.baseline == "ffn=gelu, steps=1"
    with pytest.raises(UserError, match="2, 3 entries"):
        zipped(a, over("steps", 1, 2, 3))
    with pytest.raises(UserError, match="two grids set 'steps'"):
        product(b, b)


def test_a_seed_is_no_key_of_an_arm():
    for key, says in (("seed", "`seeds` and `first_seed`"), ("@pre.seed", "the config in `before` may set one")):
        with pytest.raises(UserError, match=f"the arm 'b' sets {key!r}.*{says}"):
            Ablation(question="", config={}, arms={"a": {}, "b": {key: 7}})
    assert Ablation(question="", config={}, arms={"b": {"data.seed": 7, "@pre.data.seed": 7}}).seeds == 5


def test_cells_are_paired_and_know_their_config_by_what_numbers_depend_on(file, tmp_path):
    cells = cells_of(load_ablation(file), tmp_path)
    assert [c.seed for c in cells[:4]] == [1, 1, 1, 2] and {c.config.seed for c in cells if c.arm == "wide"} == {
        *range(1, 6)
    }
    assert len({c.identity for c in cells}) == len({c.path for c in cells}) == 15
    free = cells_of(load_ablation(file, {"log.every_steps": "2", "microbatches": "2"}), tmp_path)
    assert [c.identity for c in free] == [c.identity for c in cells]
    other = cells_of(load_ablation(file, {"optimizer.b2": "0.9"}), tmp_path)
    assert not {c.identity for c in other} & {c.identity for c in cells}


def test_collect_compares_paired_differences_and_names_what_is_missing_or_does_not_match(file, tmp_path, capsys):
    work = tmp_path / "work"
    pretend(file, work, skip=[("slow", 5)])
    changed = work / "cells" / "wide" / "seed2" / FILE
    record = json.loads(changed.read_text())
    record["identity"], record["config"]["optimizer"]["b1"] = "other", 0.5
    changed.write_text(json.dumps(record))
    elsewhere = work / "cells" / "plain" / "seed4" / FILE
    elsewhere.write_text(elsewhere.read_text().replace('"abc"', '"xyz"'))

    code, summary, out = run(capsys, f"--config={file}", f"--workdir={work}", "--collect")
    assert code == 0 and summary["done"] == 12
    assert summary["missing"] == ["slow / seed 5"]
    assert summary["mismatched"] == ["wide / seed 2", "plain / seed 4"]
    assert "does not match: wide / seed 2: config: optimizer.b1: 0.5 -> 0.9" in out.out
    assert "does not match: plain / seed 4: data: hash xyz" in out.out

    got = summary["results"]
    seeds = [0, 2, 4]  # those that both have
    expected = scipy.stats.ttest_rel(*([LOSSES[arm][s] for s in seeds] for arm in ("wide", "plain")))
    assert got["wide"]["p"] == pytest.approx(expected.pvalue, rel=1e-9)
    assert got["wide"]["difference"] == pytest.approx(-0.103333, abs=1e-5) and got["wide"]["n"] == 4
    assert got["wide"]["differs"] and not got["slow"]["differs"]
    both = sorted([got["wide"]["p"], got["slow"]["p"]])
    assert got["wide"]["p_holm"] == pytest.approx(2 * both[0]) and got["slow"]["p_holm"] == pytest.approx(both[1])
    report = (work / "report.md").read_text()
    assert "wide is lower (-0.1033" in report and "slow does not differ" in report and "would need" in report
    assert "slow / seed 5 (not begun)" in report
    assert "several versions of the code (c0ffee: 10 cells, c0ffee with changes: 2 cells)" in report
    assert "| plain | 3 | 384 | 6.000 | 1.5 |" in report  # updates, tokens, TFLOP, seconds


def test_a_cell_lies_in_the_same_folder_whichever_arms_are_asked_for(tmp_path):
    path = tmp_path / "alike.py"
    path.write_text(
        "from gpt_jax.ablation import Ablation\n"
        "def get_ablation():\n"
        "    arms = {'b=0.9': {}, 'b 0.9': {'optimizer.b1': 0.8}, 'other': {'optimizer.b1': 0.7}}\n"
        "    return Ablation(question='', config={'batch_size': 8}, arms=arms, seeds=1)\n"
    )
    every = {cell.arm: cell.path for cell in cells_of(load_ablation(str(path)), tmp_path)}
    assert len({*every.values()}) == 3
    for arm in every:
        for cell in cells_of(load_ablation(str(path), {"steps": "3"}, arms=[arm]), tmp_path):
            assert cell.path == every[cell.arm]


def write_run(path, rows, **config):
    tree = to_dict(resolve({"steps": 3, "batch_size": 8, "context_length": 16, "model": {"vocab_size": 256}, **config}))
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(tree))
    (path / "environment.json").write_text("{}")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_runs_that_have_not_finished_are_named_and_left_out_of_a_comparison(tmp_path, capsys):
    rows = [{"step": s, "valid/loss": 9.0 - s} for s in (1, 2, 3)]
    runs = [
        write_run(
            tmp_path / f"{rate}-{seed}", rows[: 2 if seed == 3 else 3], seed=seed, optimizer={"learning_rate": rate}
        )
        for rate in (0.1, 0.2)
        for seed in (1, 2, 3)
    ]
    code, summary, out = run(capsys, f"--workdir={tmp_path / 'work'}", "--compare", *runs)
    assert code == 0 and summary["missing"] == [runs[2], runs[5]]
    assert f"missing: {runs[2]}: not finished: step 2 of 3" in out.out
    assert [(arm["n"], arm["mean"]) for arm in summary["results"].values()] == [(2, 6.0), (2, 6.0)]
    assert "2 cells missing" in (tmp_path / "work" / "report.md").read_text()
    assert cli.main(["ablate", f"--workdir={tmp_path / 'work'}", "--compare", runs[2]]) == 1
    assert "no run is finished" in capsys.readouterr().err


def test_tokens_and_compute_of_smaller_batches_are_those_that_the_run_read(tmp_path):
    rows = [{"step": s, "valid/loss": 1.0, "perf/step_ms": 1.0} for s in range(1, 11)]
    schedule = {"steps": 10, "microbatches": 4, "batch_schedule": ((3, 2), (5, 4)), "data": {"skip": ((1, 2), (4, 6))}}
    study = compare_runs([write_run(tmp_path / "run", rows, **schedule)])
    ((_, runs),) = study.results.items()
    ((_, result),) = runs.items()
    rows_of_steps = [2, 2, 4] + [8] * 7  # batches 0, 2, 3, 6, 7, ...
    expected = np.concatenate([[0], np.cumsum(rows_of_steps)])
    np.testing.assert_allclose(result.tokens(np.arange(11)), expected * 16)
    np.testing.assert_allclose(result.tokens(2.5), (4 + 2) * 16)
    np.testing.assert_allclose(result.flops(np.arange(11)), expected * result.flops_per_step / 8)
    _, ((_, steps, tokens, flops, _),) = budget_table(study)
    assert (steps, tokens) == (10, 64 * 16) and flops == f"{8 * result.flops_per_step / 1e12:.3f}"
    _, tokens, flops, _ = _positions([result], np.array([1.0, 3.0]))
    np.testing.assert_allclose(tokens, np.array([2, 8]) * 16 / 1e6)
    np.testing.assert_allclose(flops, np.array([2, 8]) / 8 * result.flops_per_step / 1e12)


@pytest.mark.slow
def test_the_compute_of_an_arm_with_smaller_batches_is_counted_on_a_whole_one(file):
    ablation = load_ablation(file, {"microbatches": "4", "batch_schedule": "((2, 4),)"}, seeds=1)
    ramped = cells_of(ablation, "work")[0].config
    whole = cells_of(load_ablation(file, seeds=1), "work")[0].config
    assert order_of(ramped).rows_before(3) == 16 and _flops(ramped) == _flops(whole) > 0


def test_the_html_report_stands_alone(file, tmp_path, capsys):
    pretend(file, tmp_path / "work")
    run(capsys, f"--config={file}", f"--workdir={tmp_path / 'work'}", "--collect")
    page = (tmp_path / "work" / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 2 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "http" not in page and "<td>wide</td>" in page and "<strong>differs</strong>" in page


def test_a_value_that_is_not_finite_is_said_and_left_out(file, tmp_path, capsys):
    work = tmp_path / "work"
    pretend(file, work)
    cell = work / "cells" / "slow" / "seed3" / FILE
    cell.write_text(cell.read_text().replace('"valid/loss": 2.0', '"valid/loss": NaN'))
    _, summary, _ = run(capsys, f"--config={file}", f"--workdir={work}", "--collect")
    assert summary["results"]["slow"]["not_finite"] == [3] and summary["results"]["slow"]["n"] == 4
    assert "without seeds 3, which are not finite" in (work / "report.md").read_text()


def test_a_command_for_each_cell(file, tmp_path, capsys):
    work = tmp_path / "work"
    shared = [f"--config={file}", f"--workdir={work}", "--seeds=2", "--config.steps=2"]
    code, summary, _ = run(capsys, *shared, "--emit=lines")
    lines = (work / "cells.txt").read_text().splitlines()
    assert code == 0 and len(lines) == summary["cells"] == 6
    assert lines[5] == f"gpt-jax ablate --config={file} --workdir={work} --config.steps=2 --seeds=2 --cell=5"
    run(capsys, *shared, "--emit=slurm")
    script = (work / "cells.sbatch").read_text()
    assert "#SBATCH --array=0-5" in script and '--cell="$SLURM_ARRAY_TASK_ID"' in script and "-eq 75" in script


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--emit=pbs"], "--emit is 'pbs'"),
        (["--cell=99"], "cells 0 to 14"),
        (["--arm=wied"], "did you mean 'wide'?"),
        (["--config.model.d_model=32"], "the arms 'plain' and 'wide' would be the same"),
        (["--config.stepz=3"], "did you mean 'steps'?"),
        (["--config.seed=3"], "--seeds says how many, `first_seed`"),
        (["--compare", "nowhere"], "--compare takes finished runs"),
    ],
)
def test_mistakes_are_one_sentence(file, tmp_path, capsys, arguments, message):
    assert cli.main(["ablate", f"--config={file}", f"--workdir={tmp_path / 'w'}", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_cell_of_another_ablation_is_not_overwritten(file, tmp_path, capsys):
    work = tmp_path / "work"
    pretend(file, work)
    assert cli.main(["ablate", f"--config={file}", f"--workdir={work}", "--config.batch_size=16"]) == 1
    assert "of another ablation (config: batch_size: 8 -> 16" in capsys.readouterr().err


@pytest.mark.slow
def test_a_grid_runs_resumes_and_can_be_run_by_hand(file, tmp_path, capsys):
    work = tmp_path / "work"
    shared = [f"--config={file}", f"--workdir={work}", "--seeds=2", "--arm=slow"]
    assert cli.main(["ablate", *shared, "--cell=3"]) == 0  # slow, seed 2
    record = json.loads((work / "cells" / "slow" / "seed2" / FILE).read_text())
    assert record["arm"] == "slow" and record["seed"] == 2 and record["flops_per_step"] > 0
    before = (work / "cells" / "slow" / "seed2" / FILE).stat().st_mtime_ns
    code, summary, out = run(capsys, *shared, "--processes=2")
    assert code == 0 and summary["done"] == 4 and "4 cells, 1 done already" in out.out
    assert (work / "cells" / "slow" / "seed2" / FILE).stat().st_mtime_ns == before  # what was done is kept
    runs = [str(work / "cells" / arm / f"seed{s}") for arm in ("plain", "slow") for s in (1, 2)]
    code, compared, _ = run(capsys, f"--workdir={tmp_path / 'by hand'}", "--compare", *runs)
    by_hand, grid = (list(s["results"].values()) for s in (compared, summary))
    assert [a["mean"] for a in by_hand] == [a["mean"] for a in grid]
    assert by_hand[1]["p"] == pytest.approx(grid[1]["p"]) and "learning_rate=0.0001" in compared["arms"][1]
    losses = [
        json.loads((work / "cells" / a / "seed1" / FILE).read_text())["values"]["train/loss"] for a in ("plain", "slow")
    ]
    assert np.isfinite(losses).all() and losses[0] != losses[1]
