"""report.py: the report of a run says what its files say."""

import struct

import numpy as np
import pytest

from gpt_jax import config as configs
from gpt_jax.errors import UserError
from gpt_jax.metrics import MetricsWriter
from gpt_jax.model.size import count_parameters
from gpt_jax.report import evaluation_table, plot_loss, write_report
from gpt_jax.workdir import open_workdir


@pytest.fixture
def run(tmp_path):
    config = configs.resolve(
        {
            "name": "demo",
            "steps": 40,
            "batch_size": 4,
            "context_length": 8,
            "model": {"vocab_size": 50, "max_positions": 8},
        }
    )
    with open_workdir(tmp_path / "run") as workdir:
        workdir.write_config(configs.to_dict(config))
        workdir.write_environment({"corpus": "python_docs", "sha256": "feedbeef", "bytes": 123})
        workdir.add_history("start", 0)
        workdir.add_history("resume", 30)
        workdir.add_history("change", 30, changes={"optimizer.learning_rate": [0.1, 0.2]})
        workdir.write_sample(20, "old sample")
        workdir.write_sample(40, "the newest ``` sample")
        with MetricsWriter(workdir.metrics_path) as writer:
            for step in range(1, 41):
                perf = {"perf/tokens_per_s": 1000.0, "perf/step_ms": 10.0, "perf/stall": 0.25}
                if step in (1, 31):  # compiles
                    perf = {"perf/tokens_per_s": 1.0, "perf/step_ms": 1e5, "perf/stall": 0.0}
                writer.add(step, {"train/loss": 4.0 / step} | perf)
                if step % 10 == 0:
                    writer.add(step, {"valid/loss": abs(step - 30) / 10 + 1.5})
    return workdir.path, config


def test_report_has_results_beside_baselines_and_what_made_them(run):
    path, config = run
    evaluation = {"loss": 2.5, "tokens": 33385.0, "bits_per_byte": 1.93}
    evaluation |= {"novels/bits_per_byte": 2.1, "novels/tokens": 57.0}
    report = write_report(path, evaluation, {"xz_bits_per_byte": 2.51, "unigram_bits_per_byte": 4.4})
    text = report.read_text()
    for expected in (
        f"{count_parameters(config.model):,} parameters",
        "Least validation loss 1.5000 nats per token at step 30",
        "| this model | 2.5000 | 33,385 | 1.9300 |",
        "| novels |  | 57 | 2.1000 |",
        "| xz -9 |  |  | 2.5100 |",
        "| unigram model |  |  | 4.4000 |",
        "| tokens | 1,280 |",
        "| tokens per second (median) | 1,000 |",
        "| time waiting for data | 25.00% |",
        "| sha256 | feedbeef |",
        "the newest ``` sample",
        "optimizer.learning_rate: 0.1 -> 0.2",
        '"learning_rate": 0.001',
        "![Training and validation loss by step](loss.png)",
    ):
        assert expected in text, expected
    assert "old sample" not in text


def test_loss_curve_is_a_png_of_readable_size(run):
    write_report(run[0])
    png = (run[0] / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 1000 and height >= 500


def test_loss_curve_shows_both_losses_and_their_units():
    from matplotlib import axes as matplotlib_axes

    drawn, labels = [], {}
    originals = {n: getattr(matplotlib_axes.Axes, n) for n in ("plot", "set_xlabel", "set_ylabel")}

    def plot(self, x, y, *args, **kwargs):
        drawn.append((kwargs.get("label"), np.array(x), np.array(y)))
        return originals["plot"](self, x, y, *args, **kwargs)

    rows = [{"step": s, "train/loss": 5.0 - s / 100} for s in range(1, 301)]
    rows[9]["train/loss"] = float("nan")
    rows[99]["valid/loss"] = 4.2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib_axes.Axes, "plot", plot)
        for axis in ("x", "y"):
            name = f"set_{axis}label"
            patch.setattr(
                matplotlib_axes.Axes,
                name,
                lambda self, text, _axis=axis, _name=name: (labels.update({_axis: text}), originals[_name](self, text))[
                    1
                ],
            )
        plot_loss(rows, tokens_per_step=64)
    assert labels == {"x": "step (of 64 tokens)", "y": "loss (nats per token)"}
    (_, raw_x, raw_y), (_, smooth_x, smooth_y), (_, valid_x, valid_y) = drawn
    assert len(raw_x) == 299 and np.isfinite(raw_y).all()
    np.testing.assert_allclose(smooth_y[20:], 5.0 - smooth_x[20:] / 100, rtol=1e-9)  # a line's mean lies on it
    assert list(valid_x) == [100] and list(valid_y) == [4.2]


def test_a_run_without_any_rows_still_gets_a_report(tmp_path):
    with open_workdir(tmp_path / "run") as workdir:
        workdir.write_config(
            configs.to_dict(configs.resolve({"model": {"vocab_size": 9, "max_positions": 9, "num_layers": 1}}))
        )
        MetricsWriter(workdir.metrics_path).close()
    text = write_report(workdir.path).read_text()
    assert "Not evaluated." in text and "0 of 1,000 steps" in text and " parameters, 1 layer, width " in text


def test_a_folder_that_is_no_run_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        write_report(tmp_path)


def test_evaluation_table_is_empty_without_values():
    assert evaluation_table({}, {}) == ""


def test_the_terms_of_a_loss_are_columns_beside_it():
    values = {"loss/mlm": 5.0, "loss/rtd": 0.25, "loss": 17.5, "novels/loss/mlm": 4.0, "novels/loss": 14.0}
    header, _, whole, novels = evaluation_table(values, {}).splitlines()
    assert header == "| | loss/mlm | loss/rtd | loss |"
    assert whole == "| this model | 5.0000 | 0.2500 | 17.5000 |"
    assert novels == "| novels | 4.0000 |  | 14.0000 |"


def test_a_loss_of_several_terms_has_no_unit(run):
    path, _ = run
    rows = (path / "metrics.jsonl").read_text().splitlines()
    terms = rows[-1].replace("{", '{"train/loss/mlm": 1.0, "train/loss/rtd": 0.5, ')
    (path / "metrics.jsonl").write_text("\n".join([*rows[:-1], terms]) + "\n")
    text = write_report(path).read_text()
    assert "Least validation loss 1.5000 at step 30" in text and "nats per token" not in text
