"""metrics.py, throughput.py, console.py: rows that read back exactly and survive a crash; honest numbers of speed."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import types

import numpy as np
import pytest

from gpt_jax.console import Console, console_line, format_seconds
from gpt_jax.errors import UserError
from gpt_jax.hooks import Validate
from gpt_jax.metrics import MetricsWriter, best, cut_rows, format_row, open_wandb, parse_row, read_rows, zscore
from gpt_jax.throughput import Clock, measure_cpu_peak, model_flops_per_token, peak_flops


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


# ---- rows


def test_floats_read_back_exactly_and_lines_are_valid_json():
    rng = np.random.default_rng(0)
    bits64 = rng.integers(0, 2**63, 500, dtype=np.uint64).view(np.float64)
    bits32 = rng.integers(0, 2**32, 500, dtype=np.uint32).view(np.float32)
    values = {f"v{i}": v for i, v in enumerate([*bits64, *bits32, 0.1, -0.0, 5e-324, np.float32(0.1)])}
    line = format_row(7, values)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(line, parse_constant=refuse)["step"] == 7
    row = parse_row(line)
    for name, value in values.items():
        value = float(value)
        assert row[name] == value or (math.isnan(row[name]) and math.isnan(value)), name
        assert math.isnan(value) or math.copysign(1, row[name]) == math.copysign(1, value)


def test_values_that_are_not_finite_are_strings_that_read_back():
    line = format_row(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    assert json.loads(line) == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
    row = parse_row(line)
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


def test_one_row_per_step_with_everything_measured_there(path):
    with MetricsWriter(path) as writer:
        writer.add(1, {"train/loss": 3.0})
        writer.add(2, {"train/loss": 2.0})
        writer.add(2, {"valid/loss": 2.5})
        writer.add(4, {"train/loss": np.float32(1.5), "count": np.int64(3)})
    assert read_rows(path) == [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": 2.0, "valid/loss": 2.5},
        {"step": 4, "train/loss": 1.5, "count": 3},
    ]


def test_a_row_once_flushed_or_passed_cannot_change(path):
    with MetricsWriter(path) as writer:
        writer.add(2, {"a": 1.0})
        with pytest.raises(ValueError, match="twice"):
            writer.add(2, {"a": 1.0})
        with pytest.raises(ValueError, match="after row"):
            writer.add(1, {"a": 1.0})
        writer.flush()
        with pytest.raises(ValueError, match="written already"):
            writer.add(2, {"b": 1.0})


def test_flushed_rows_survive_kill_9(path):
    code = (
        "import os, signal, sys; from gpt_jax.metrics import MetricsWriter; w = MetricsWriter(sys.argv[1]);"
        "w.add(1, {'a': 1.0}); w.add(2, {'a': 2.0}); w.flush(); w.add(3, {'a': 3.0}); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_flush_puts_the_row_on_the_disk(path, monkeypatch):
    synced, fsync = [], os.fsync
    with MetricsWriter(path) as writer:
        monkeypatch.setattr(os, "fsync", lambda file: (synced.append(path.read_text()), fsync(file)))
        writer.add(1, {"a": 1.0})
        assert not synced
        writer.flush()
        assert synced[-1] == format_row(1, {"a": 1.0})


def test_resume_cuts_a_torn_line_and_later_rows_and_keeps_the_bytes_of_the_rest(path):
    lines = [format_row(s, {"train/loss": 1 / s, "note": 0.1 * s}) for s in range(1, 8)]
    whole = "".join(lines)
    for end in range(len(whole) + 1):
        for resume in (0, 3, 7, None):
            path.write_text(whole[:end])
            complete = whole[:end].count("\n")
            MetricsWriter(path, resume_step=resume).close()
            keep = complete if resume is None else min(complete, resume)
            assert path.read_text() == "".join(lines[:keep])


def test_cutting_is_atomic(path, monkeypatch):
    path.write_text("".join(format_row(s, {"a": 1.0}) for s in range(5)))
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cut_rows(path, 2)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_damaged_line_before_the_last_is_named(path):
    path.write_text(format_row(1, {}) + "{half\n" + format_row(3, {}))
    with pytest.raises(UserError, match=r"line 2 is not a row"):
        read_rows(path)


def test_no_space_is_a_sentence_and_keeps_the_rows_before(path):
    code = """if True:
        import resource, sys
        from gpt_jax.errors import UserError
        from gpt_jax.metrics import MetricsWriter
        w = MetricsWriter(sys.argv[1])
        w.add(1, {"a": 1.0}); w.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
        try:
            w.add(2, {"a": 2.0, "b": 1 / 3}); w.flush()
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("no space left on the device for metrics.jsonl at "), done.stderr
    assert [row["step"] for row in read_rows(path)] == [1]


def test_columns_and_z_scores_are_the_same_after_a_resume(path):
    rng = np.random.default_rng(0)
    rows = {s: {"train/loss": rng.normal(), "train/grad_norm": rng.gamma(2.0)} for s in range(1, 301)}
    for s in range(50, 301, 50):
        rows[s]["valid/loss"] = 10.0 - s
    straight = MetricsWriter(path)
    zs = {}
    for s, row in rows.items():
        straight.add(s, row)
        assert straight.zscore("train/loss") == zscore([rows[t]["train/loss"] for t in range(1, s + 1)])
        zs[s] = straight.zscore("train/loss"), straight.zscore("train/grad_norm")
    straight.close()
    for at in (0, 10, 137, 250, 300):
        resumed = MetricsWriter(path, resume_step=at)
        for s in range(at + 1, 301):
            resumed.add(s, rows[s])
            assert (resumed.zscore("train/loss"), resumed.zscore("train/grad_norm")) == zs[s]
        assert resumed.column("valid/loss") == {s: 10.0 - s for s in range(50, 301, 50)}
        resumed.close()


def test_zscore_is_the_textbooks_over_the_last_128():
    rng = np.random.default_rng(1)
    values = list(rng.normal(5, 2, 400))
    window = values[-128:]
    mean = sum(window) / 128
    std = math.sqrt(sum((v - mean) ** 2 for v in window) / 128)
    assert zscore(values) == pytest.approx((values[-1] - mean) / std, rel=1e-12)
    assert zscore([*values, mean + 50 * std]) > 8
    assert zscore(values[:15]) is None and zscore(values[:16]) is not None
    assert zscore([1.0] * 50) is None and zscore([*values, math.nan]) is None
    assert zscore([math.inf, *values[-127:]]) == pytest.approx(zscore(values[-127:]))


def test_best_is_the_earliest_least_finite_value():
    rows = [{"step": s, "valid/loss": v} for s, v in ((1, 3.0), (2, math.nan), (3, 1.5), (4, 1.5), (5, -math.inf))]
    assert best(rows) == (3, 1.5)
    assert best([{"step": 1, "train/loss": 1.0}]) is None


def test_other_processes_write_nothing(path):
    with MetricsWriter(path, writes=False) as writer:
        writer.add(1, {"valid/loss": 2.0})
        assert writer.column("valid/loss") == {1: 2.0}
    assert not path.exists()
    path.write_text(format_row(1, {"valid/loss": 2.0}) + format_row(2, {"valid/loss": 1.0}))
    with MetricsWriter(path, writes=False, resume_step=1) as writer:
        assert writer.column("valid/loss") == {1: 2.0}
    assert len(read_rows(path)) == 2


def test_tensorboard_gets_every_value_and_purges_what_a_resume_repeats(path, tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    def events(folder):
        for file in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
            data = file.read_bytes()
            while data:  # TFRecord: length, crc of it, content, crc of it
                size = int.from_bytes(data[:8], "little")
                yield Event.FromString(data[12 : 12 + size])
                data = data[16 + size :]

    with MetricsWriter(path, tensorboard=tmp_path / "events") as writer:
        for s in (1, 2, 3):
            writer.add(s, {"train/loss": float(s)})
    with MetricsWriter(path, tensorboard=tmp_path / "events", resume_step=2) as writer:
        writer.add(3, {"train/loss": 30.0})
    seen, purged = [], []
    for event in events(tmp_path / "events"):
        if event.session_log.status == 1:  # START: a reader drops the events from this step on
            purged.append(event.step)
        seen += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    assert seen == [(1, "train/loss", 1.0), (2, "train/loss", 2.0), (3, "train/loss", 3.0), (3, "train/loss", 30.0)]
    assert purged[-1] == 3


def test_wandb_run_is_continued_under_its_id(path, tmp_path, monkeypatch):
    calls, logged = [], []

    def init(**kwargs):
        calls.append(kwargs)
        return types.SimpleNamespace(
            id=kwargs["id"] or "abc123", log=lambda values, step: logged.append((step, values)), finish=lambda: None
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume in (None, 1):
        run = open_wandb("project", tmp_path, "name", {"steps": 3})
        with MetricsWriter(path, wandb=run, resume_step=resume) as writer:
            writer.add(1 if resume is None else 2, {"a": 1.0})
    assert [call["id"] for call in calls] == [None, "abc123"] and calls[1]["resume"] == "allow"
    assert logged == [(1, {"a": 1.0}), (2, {"a": 1.0})]


def test_wandb_that_is_not_installed_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        open_wandb("project", tmp_path, "", {})


# ---- speed


class Time:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_clock_measures_steps_without_pauses():
    time = Time()
    clock = Clock(flops_per_token=50.0, peak=1e5, now=time)
    time.now += 2.0
    assert clock.tick(1, tokens=1000)["perf/tokens_per_s"] == 500.0
    assert clock.eta(10) is None
    time.now += 0.25
    with clock.pause():
        time.now += 60.0
    time.now += 0.25
    values = clock.tick(2, tokens=1000, stall_seconds=0.1)
    assert values == {"perf/step_ms": 500.0, "perf/tokens_per_s": 2000.0, "perf/stall": 0.2, "perf/mfu": 1.0}
    assert clock.eta(10) == pytest.approx(60.5 * 8)  # at the pace since the first tick, pauses included
    time.now += 1.0
    assert clock.tick(6, tokens=4000, steps=4)["perf/step_ms"] == 1500.0 / 5  # the mean of ticks since the first
    for step in range(7, 15):
        time.now += 0.25 if step % 2 else 0.0  # a tick that holds two steps, then one that holds none
        values = clock.tick(step, tokens=500)
    assert values["perf/step_ms"] == 125.0 and values["perf/tokens_per_s"] == 4000.0


def test_mfu_is_left_out_where_the_peak_is_not_known():
    assert "perf/mfu" not in Clock(1.0, None).tick(1, 10)
    others = ("TPU v99", "NVIDIA GeForce RTX 3090", "NVIDIA RTX A1000", "NVIDIA GH2000")
    assert [peak_flops(kind) for kind in others] == [None] * 4


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
    ],
)
def test_published_peaks(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


def test_model_flops_per_token_of_gpt3_is_the_articles_total():
    # GPT-3 175B, Table D.1: 3.14e23 FLOPs for 300B tokens, without attention.
    without_attention = model_flops_per_token(174_600_000_000, 96, 12288, 0) * 300e9
    assert without_attention == pytest.approx(3.14e23, rel=2e-3)
    assert model_flops_per_token(0, 2, 3, 5) == 12 * 2 * 3 * 5


def test_cpu_peak_is_plausible_and_no_less_than_numpy_once():
    import time

    a = np.ones((512, 512), np.float32)
    a @ a
    start = time.perf_counter()
    a @ a
    numpy_rate = 2 * 512**3 / (time.perf_counter() - start)
    assert 0.05 * numpy_rate < measure_cpu_peak(size=512, repeats=3) < 1e14


# ---- console


def test_console_line_is_the_one_in_the_style_guide():
    parts = {"loss": 3.99831, "loss_z": 0.31, "gnorm": 0.912, "gnorm_z": -0.1, "lr": 6e-4}
    parts |= {"ms": 412.3, "tokens_per_s": 9942.4, "mfu": 0.4121, "eta": 13 * 60 + 5}
    assert console_line(42, 2000, **parts) == (
        "step 00042/02000 ( 2.1%) | loss 3.9983 (+0.3z) | gnorm 0.91 (-0.1z) | lr 6.0e-04 | 412 ms | 9,942 tok/s | "
        "mfu 41.2% | eta 13m"
    )
    assert console_line(1, 10, loss=float("nan")) == "step 00001/00010 (10.0%) | loss nan | mfu n/a"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (60, "1m"), (3599, "1h00m"), (7500, "2h05m"), (270_000, "3d03h")]
)
def test_durations_in_two_units(seconds, text):
    assert format_seconds(seconds) == text


def test_a_bar_only_on_a_terminal():
    plain = io.StringIO()
    with Console(10, stream=plain) as console:
        console.show("one [bold] line")
        console.progress(5)
    assert plain.getvalue() == "one [bold] line\n"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    with Console(10, stream=terminal) as console:
        console.show("[bold] 00001/00010 | " + "x" * 150)
        console.progress(5)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "[bold] 00001/00010 | " + "x" * 150 in shown and "5/10" in shown


def test_quiet_processes_print_nothing():
    stream = io.StringIO()
    with Console(10, stream=stream, quiet=True) as console:
        console.show("line")
    assert stream.getvalue() == ""


def test_a_validation_without_text_shows_what_there_is(path):
    shown = io.StringIO()
    with MetricsWriter(path) as writer, Console(10, stream=shown) as console:
        writer.add(5, {"train/loss": 1.0})
        values = {"tasks/blimp/accuracy": 0.6}
        assert Validate(writer, console, lambda params, step: values)(5, None) == values
    assert "accuracy 0.6000" in shown.getvalue() and "valid" not in shown.getvalue()
