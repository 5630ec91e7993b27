"""`gpt-jax train` continued after kills, on other devices, with changes. At length: scripts/stress_resume.py."""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import load_script

from gpt_jax.ablation.cells import final_values
from gpt_jax.checkpoint import Checkpointer, list_steps
from gpt_jax.cli import main
from gpt_jax.config import resolve
from gpt_jax.data import load_tokenizer, prepare_data
from gpt_jax.data.batches import BatchOrder
from gpt_jax.errors import Unavailable, UserError
from gpt_jax.evaluate import evaluate_all
from gpt_jax.metrics import read_rows
from gpt_jax.resume import agreed_latest, check_skip, continued_state
from gpt_jax.run import restore_run
from gpt_jax.train_state import TrainState

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def stress():
    return load_script("stress_resume")


# ---- the state, without a loop


def make_state(tx, value, ema=False):
    params = {"model": {"w": jnp.full((3, 2), float(value)), "b": jnp.full((2,), float(value))}}
    average = jax.tree.map(lambda x: x + 0.5, params) if ema else None
    return TrainState(
        step=jnp.int32(value),
        params=params,
        frozen={},
        opt_state=jax.tree.map(lambda x: jnp.full_like(x, value), tx.init(params)),
        ema=average,
        skipped=jnp.zeros(2, jnp.int32),
    )


def adam(schedule=lambda count: 0.1):
    return optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))


def momentum(schedule=lambda count: 0.1):
    return optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(schedule))


@pytest.fixture
def saver(tmp_path):
    with Checkpointer(tmp_path) as saver:
        saver.save(7, make_state(adam(), 7))
        saver.wait()
        yield saver


def continue_with(saver, state, changed):
    lines = []
    abstract = jax.eval_shape(lambda: state)
    return continued_state(saver, 7, abstract, lambda: state, changed, lines.append), lines


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_new_learning_rate_keeps_the_optimizer_state(saver):
    state, lines = continue_with(saver, make_state(adam(), 0), {"optimizer.learning_rate": [1, 2]})
    assert_equal(state, make_state(adam(), 7))
    assert not lines


def test_another_optimizer_starts_afresh_from_the_weights_with_the_schedule_where_it_was(saver):
    state, lines = continue_with(saver, make_state(momentum(), 0), {"optimizer.name": ["adamw", "sgd"]})
    kept = make_state(adam(), 7)
    assert_equal(state.params, kept.params)
    assert state.step == 7
    trace, schedule = state.opt_state
    assert_equal(trace, make_state(momentum(), 0).opt_state[0])
    assert schedule.count == 7
    assert "its optimizer state at step 7 is not used" in lines[0]


def test_another_optimizer_of_the_same_form_starts_afresh_too(saver):
    state, _ = continue_with(saver, make_state(adam(), 0), {"optimizer.name": ["adamw", "lamb"]})
    assert_equal(state.opt_state[0], make_state(adam(), 0).opt_state[0])
    assert state.opt_state[1].count == 7


def test_an_average_turned_on_starts_at_the_weights(saver):
    state, lines = continue_with(saver, make_state(adam(), 0, ema=True), {"optimizer.ema": [0.0, 0.9]})
    assert_equal(state.ema, make_state(adam(), 7).params)
    assert_equal(state.opt_state, make_state(adam(), 7).opt_state)
    assert "its average of the weights at step 7" in lines[0]


def test_an_average_turned_on_or_off_after_skipped_updates_leaves_the_schedule_where_it_was(tmp_path):
    kept = dataclasses.replace(make_state(adam(), 7, ema=True), skipped=jnp.int32([0, 3]))
    kept = dataclasses.replace(kept, opt_state=jax.tree.map(lambda x: jnp.full_like(x, 4), kept.opt_state))
    with Checkpointer(tmp_path) as saver:
        saver.save(6, dataclasses.replace(kept, ema=None))
        saver.save(7, kept)
        for step, ema in ((6, True), (7, False)):
            fresh = make_state(adam(), 0, ema=ema)
            changed, lines = {"optimizer.ema": [0.0, 0.9]}, []
            state = continued_state(
                saver, step, jax.eval_shape(lambda s=fresh: s), lambda s=fresh: s, changed, lines.append
            )
            assert_equal(state.opt_state, kept.opt_state)
            assert len(lines) == ema
        fresh = make_state(momentum(), 0, ema=True)
        state = continued_state(saver, 7, jax.eval_shape(lambda: fresh), lambda: fresh, {"optimizer.name": []}, print)
        assert state.opt_state[1].count == 4  # updates that were made, as the step counts them


@pytest.mark.parametrize("name", ["sgd", "lamb"])  # of another form, of the same
def test_a_change_that_a_kill_left_without_a_checkpoint_still_counts(tmp_path, name):
    def config(optimizer):
        return {"optimizer": {"name": optimizer}, "steps": 9}

    new = make_state(momentum() if name == "sgd" else adam(), 0)
    with Checkpointer(tmp_path) as saver:
        saver.save(7, make_state(adam(), 7), metadata={"config": config("adamw")})
        saver.wait()
        lines = []

        def continued(state, name, changed):
            abstract = jax.eval_shape(lambda: state)
            return continued_state(saver, 7, abstract, lambda: state, changed, lines.append, config(name))

        first = continued(new, name, {"optimizer.name": ["adamw", name]})
        assert_equal(continued(new, name, {}), first)  # its config.json has the new name by now
        assert len(lines) == 2 and first.opt_state[1].count == 7
        back = continued(make_state(adam(), 0), "adamw", {"optimizer.name": [name, "adamw"]})
        assert_equal(back, make_state(adam(), 7))


class LateFolder:
    """A folder of checkpoints on a network file system: each listing is the next of these, the last one stays."""

    directory = pathlib.Path("/shared/run/checkpoints")

    def __init__(self, *listings):
        self.listings = list(listings)

    def all_steps(self):
        return self.listings.pop(0) if len(self.listings) > 1 else self.listings[0]

    def latest(self):
        return max(self.all_steps(), default=None)


def test_all_processes_continue_at_the_checkpoint_that_process_0_sees(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    first = [400]  # what process 0 sees; this one is process 1
    monkeypatch.setattr(
        "gpt_jax.distributed.gather",
        lambda value: [["first", True], value] if isinstance(value, list) else [first[0], value],
    )
    assert agreed_latest(LateFolder([200], [200], [200], [200, 400])) == 400  # it shows late
    assert agreed_latest(LateFolder([400, 600])) == 400  # what was removed is still shown here
    with pytest.raises(
        Unavailable, match="process 1 on .* does not see the checkpoint of step 400 in '/shared/run/check"
    ) as error:
        agreed_latest(LateFolder([200]), seconds=0.01)
    assert error.value.exit_code == 75
    first[0] = None
    assert agreed_latest(LateFolder([200])) is None


def test_parameters_that_do_not_fit_are_an_error_whatever_changed(saver):
    wrong = make_state(momentum(), 0)
    wrong.params["model"]["w"] = jnp.zeros((4, 2))
    for changed in ({}, {"optimizer.name": ["adamw", "sgd"]}):
        with pytest.raises(UserError, match="params/model/w is float32"):
            continue_with(saver, wrong, changed)
    with pytest.raises(UserError, match="does not fit"):
        continue_with(saver, make_state(momentum(), 0), {"data.skip": []})


@pytest.mark.parametrize(
    ("old", "new", "step", "allowed"),
    [
        ([], [[70, 75]], 60, True),
        ([], [[60, 75]], 60, True),
        ([[40, 50]], [[40, 55]], 40, True),  # step 40 is about to read batch 50
        ([[40, 50]], [], 40, True),
        ([[40, 50]], [], 41, False),
        ([[0, 5]], [], 0, True),
        ([[40, 50]], [[40, 45], [44, 50], [80, 90]], 60, True),
        ([], [[10, 20]], 60, False),
        ([], [[55, 75]], 60, False),
        ([[10, 20]], [], 60, False),
        ([[40, 50]], [[40, 45]], 60, False),
    ],
)
def test_what_is_skipped_can_only_change_ahead_of_the_run(old, new, step, allowed):
    order = BatchOrder(4, skip=tuple(map(tuple, new)))
    with contextlib.nullcontext() if allowed else pytest.raises(UserError, match=r"data\.skip is now"):
        check_skip({"data.skip": [old, new]}, order, step)
    check_skip({"data.seed": [0, 1]}, order, step)


# ---- the command


@pytest.mark.slow
def test_a_killed_training_run_is_bitwise_the_uninterrupted_one(stress, tmp_path):
    found = stress.check_kills(tmp_path, kills=4, steps=100, seed=1, say=print)
    assert found["bitwise"] and found["kills"] == 4 and found["unreadable"] == 0 and found["in_a_save"] >= 1


@pytest.mark.slow
def test_a_run_moves_between_one_and_eight_devices(stress, tmp_path):
    found = stress.check_devices(tmp_path, half=15)
    assert len(found) == 4 and all(difference <= 1e-5 for difference in found.values()), found


@pytest.mark.slow
def test_skipped_batches_leave_exactly_the_others_also_after_a_kill(stress, tmp_path):
    found = stress.check_skip(tmp_path, (40, 50), 60)
    assert found["skip_in_order"] and found["skip_given_later"] and found["skip_killed_at"] > 0


@pytest.fixture(scope="module")
def begun(stress, tmp_path_factory):
    """A finished run of 10 steps with a checkpoint each 5; tests copy nothing but must leave its rows as they are."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    stress.train(workdir, {"steps": 10})
    return workdir


def gpt_jax(stress, workdir, settings=(), flags=()):
    before = workdir.with_suffix(".log").stat().st_size if workdir.with_suffix(".log").exists() else 0
    code = stress.start(workdir, dict(settings), flags=flags).wait()
    with open(workdir.with_suffix(".log")) as log:
        log.seek(before)
        return types.SimpleNamespace(code=code, lines=log.read().strip().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "flags", "expected"),
    [
        ({"optimizer.learning_rate": 0.5}, [], "optimizer.learning_rate: 0.001 -> 0.5"),
        ({"data.skip": "[(3,5)]"}, [], "data.skip: [] -> [[3, 5]]"),
        ({"model.d_model": 64}, ["--accept-changes"], "cannot be continued with another model.d_model: 32 -> 64"),
        ({"steps": "ten"}, [], "config key 'steps' takes a whole number"),
    ],
    ids=["learning_rate", "skip", "d_model", "mistyped"],
)
def test_refused_changes_are_one_line_and_exit_1(stress, begun, settings, flags, expected):
    rows = stress.values(begun)
    done = gpt_jax(stress, begun, {"steps": 10} | settings, flags)
    assert done.code == 1
    assert done.lines[-1].startswith("gpt-jax: ") and expected in done.lines[-1]
    assert not any("Traceback" in line for line in done.lines)
    assert stress.values(begun) == rows


@pytest.mark.slow
def test_more_steps_and_another_optimizer_go_on_from_the_same_rows(stress, begun):
    rows = stress.values(begun)
    settings = {"steps": 15, "optimizer.name": "adafactor", "log.console_every_steps": 1}
    done = gpt_jax(stress, begun, settings, ["--accept-changes"])
    assert done.code == 0, done.lines
    assert any("changed (accepted) optimizer.name: 'adamw' -> 'adafactor'" in line for line in done.lines)
    assert any("starts afresh" in line for line in done.lines)
    assert stress.values(begun)[:10] == rows and len(stress.values(begun)) == 15
    history = [json.loads(line) for line in (begun / "history.jsonl").read_text().splitlines()]
    (change,) = [entry for entry in history if entry["event"] == "change"]
    assert change["step"] == 10 and change["changes"]["optimizer.name"] == ["adamw", "adafactor"]
    assert json.loads(done.lines[-1])["step"] == 15


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_with_the_good_one_and_exit_1(stress, tmp_path):
    workdir = tmp_path / "run"
    stress.train(workdir, {"steps": 10})
    assert list_steps(workdir / "checkpoints") == [5, 10]
    for file in (workdir / "checkpoints" / "10" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-7])
    done = gpt_jax(stress, workdir, {"steps": 20})
    assert done.code == 1 and "checkpoint 10" in done.lines[-1] and "newest good one is 5" in done.lines[-1]
    advice = done.lines[-1].split("delete ")[1].split(" to go on")[0]
    subprocess.run(["rm", "-r", advice], check=True)
    assert gpt_jax(stress, workdir, {"steps": 20}).code == 0
    assert [row["step"] for row in stress.values(workdir)] == list(range(1, 21))


@pytest.mark.slow
def test_sigterm_saves_and_exits_75_and_a_second_run_in_the_workdir_is_refused(stress, tmp_path):
    workdir = tmp_path / "run"
    process = stress.start(workdir, {"steps": 100_000, "checkpoint.every_steps": 3})
    stress.wait_for(lambda: stress.latest(workdir / "checkpoints") > 0, process, 120)
    second = gpt_jax(stress, workdir, {"steps": 100_000})
    assert second.code == 1
    line = next(line for line in second.lines if line.startswith("gpt-jax: "))
    assert f"in use by process {process.pid}" in line
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    rows = stress.values(workdir)
    assert rows[-1]["step"] == stress.latest(workdir / "checkpoints")


PROCESSES = """
    import sys, time
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
    import jax.numpy as jnp
    from gpt_jax.checkpoint import Checkpointer
    from gpt_jax.metrics import MetricsWriter
    from gpt_jax.workdir import EXIT_PREEMPTED, Preemption, open_workdir

    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = {"w": jax.sharding.NamedSharding(mesh, jax.P("fsdp")), "n": jax.sharding.NamedSharding(mesh, jax.P())}
    make = lambda: {"w": jnp.arange(64.0), "n": jnp.int32(0)}
    update = jax.jit(lambda s: {"w": s["w"] * 0.5 + jnp.mean(s["w"]), "n": s["n"] + 1}, out_shardings=shardings)
    with open_workdir(sys.argv[3]) as run, Preemption() as stop, Checkpointer(run.checkpoints_path) as saver:
        start = saver.latest() or 0
        state = jax.jit(make, out_shardings=shardings)()
        if start:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            state = saver.restore(None, shapes)
        assert int(state["n"]) == start
        with MetricsWriter(run.metrics_path, resume_step=start, writes=run.writes) as writer:
            print("ready", flush=True)
            for step in range(start + 1, int(sys.argv[4]) + 1):
                state = update(state)
                writer.add(step, {"train/loss": float(jnp.sum(state["w"]))})
                stopping = stop.agreed(step)
                if stopping or step % 20 == 0:
                    writer.flush()
                    saver.save(step, state)
                if stopping:
                    saver.wait()
                    print("stopped", step, flush=True)
                    sys.exit(EXIT_PREEMPTED)
                time.sleep(0.005)
    print("done", step)
"""


@pytest.mark.slow
def test_several_processes_agree_on_the_step_to_stop_at_and_restore_what_they_saved(tmp_path):
    def run(steps, ask):
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        command = [sys.executable, "-c", textwrap.dedent(PROCESSES), str(port)]
        both = [
            subprocess.Popen([*command, rank, str(tmp_path / "run"), str(steps)], env=environment, stdout=-1, text=True)
            for rank in "01"
        ]
        for process in both:
            while process.stdout.readline() not in ("ready\n", ""):
                pass
        if ask:
            both[1].send_signal(signal.SIGTERM)  # one of them is told
        ends = [process.communicate(timeout=120)[0].strip().splitlines()[-1] for process in both]
        return [process.returncode for process in both], ends

    codes, (first, second) = run(100_000, ask=True)
    assert codes == [75, 75] and first == second and first.startswith("stopped ")
    step = int(first.split()[1])
    assert list_steps(tmp_path / "run" / "checkpoints")[-1] == step
    codes, ends = run(step + 30, ask=False)
    assert codes == [0, 0] and ends == [f"done {step + 30}"] * 2
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == list(range(1, step + 31))


def test_the_stress_script_says_what_it_takes():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "scripts" / "stress_resume.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--kills" in done.stdout


def small_config(folder, text="to be or not to be, that is the question. ", **data):
    (folder / "text.txt").write_text(text * 40)
    return {
        "steps": 5,
        "batch_size": 8,
        "context_length": 16,
        "model": {"num_layers": 1, "d_model": 16, "num_heads": 1},
        "data": {"path": str(folder / "text.txt"), "tokenizer": {"kind": "byte"}, **data},
        "eval": {"every_steps": 0},
        "checkpoint": {"every_steps": 0},
        "sample": {"prompts": ()},
    }


def test_sigterm_before_the_first_step_exits_75_too_and_the_handler_comes_back(tmp_path, monkeypatch, capsys):
    module = importlib.import_module("gpt_jax.train")
    tree = small_config(tmp_path)
    (tmp_path / "config.py").write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({tree!r})\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(module, "build_run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]) == 75
    assert "run the same command again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_validation_loses_no_step(tmp_path, monkeypatch):
    module = importlib.import_module("gpt_jax.train")
    tree = small_config(tmp_path)
    said = []

    def fails(*_, **__):
        raise RuntimeError("a metric that cannot be had")

    with monkeypatch.context() as patch:
        patch.setattr("gpt_jax.hooks.evaluate_all", fails)
        with pytest.raises(RuntimeError, match="a metric"):
            module.train(resolve(tree), str(tmp_path / "run"), log=said.append)
    assert list_steps(tmp_path / "run" / "checkpoints") == [5]
    assert sum("saved before the error" in line for line in said) == 1
    done = module.train(resolve(tree), str(tmp_path / "run"), log=said.append)  # the same again: it makes up for it
    assert done["step"] == 5 and "valid/loss" in done
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["loss"] == done["valid/loss"] == final_values(tmp_path / "run", 5)["valid/loss"]
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]

    whole = module.train(resolve(tree), str(tmp_path / "whole"), log=said.append)
    with monkeypatch.context() as patch:
        patch.setattr("gpt_jax.hooks.evaluate_all", fails)  # a run that has ended knows what it was worth
        again = module.train(resolve(tree), str(tmp_path / "whole"), log=said.append)
    skipping = resolve(tree | {"steps": 7}, {"data.skip": "[(1, 3)]"})
    with pytest.raises(UserError, match=r"batches before 5 are behind the run, at step 5"):
        module.train(skipping, str(tmp_path / "whole"), accept_changes=True, log=said.append)
    assert again["valid/loss"] == whole["valid/loss"] and again["valid/bits_per_byte"] == whole["valid/bits_per_byte"]


@pytest.mark.slow
def test_a_change_whose_first_checkpoint_a_kill_took_goes_on_as_the_uninterrupted_run(tmp_path, monkeypatch):
    module = importlib.import_module("gpt_jax.train")
    tree = small_config(tmp_path)
    said = []
    module.train(resolve(tree), str(tmp_path / "whole"), log=said.append)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    other = resolve(tree | {"steps": 8, "optimizer": {"name": "adafactor"}})
    done = module.train(other, str(tmp_path / "whole"), accept_changes=True, log=said.append)

    def killed(*_, **__):
        raise SystemExit(137)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("gpt_jax.hooks.MetricsWriter", killed)
        module.train(other, str(tmp_path / "killed"), accept_changes=True, log=said.append)
    assert json.loads((tmp_path / "killed" / "config.json").read_text())["optimizer"]["name"] == "adafactor"
    assert list_steps(tmp_path / "killed" / "checkpoints") == [5]
    again = module.train(other, str(tmp_path / "killed"), log=said.append)
    assert said.count(next(line for line in said if "starts afresh" in line)) == 3
    assert again["valid/loss"] == done["valid/loss"]
    rows = [
        [
            {k: v for k, v in row.items() if not k.startswith("perf/")}
            for row in read_rows(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 8


OTHER = "an umbrella above us, and rain on it all day long; "  # other frequencies, so other ids of a char tokenizer


@pytest.fixture(scope="module")
def of_characters(tmp_path_factory):
    """A run of 2 steps on text.txt, beside other.txt: (folder, its config)."""
    folder = tmp_path_factory.mktemp("characters")
    tree = small_config(folder, tokenizer={"kind": "char"}, split="tail", valid_fraction=0.3) | {"steps": 2}
    (folder / "other.txt").write_text(OTHER * 40)
    importlib.import_module("gpt_jax.train").train(resolve(tree), str(folder / "run"), log=lambda line: None)
    return folder, tree


def same_tokens(data, expected):
    for name in ("train", "valid"):
        count = expected.splits[name].num_tokens
        np.testing.assert_array_equal(data.splits[name].read(0, count), expected.splits[name].read(0, count))


@pytest.mark.slow
def test_another_text_is_read_with_the_runs_own_tokenizer(of_characters, capsys):
    folder, tree = of_characters
    path = {"data.path": str(folder / "other.txt")}
    run, params, step = restore_run(str(folder / "run"), overrides=path)
    given = resolve(tree, path | {"data.tokenizer.path": str(folder / "run" / "tokenizer")})
    own = prepare_data(given.data, context_length=16, batch_size=8, seed=0)
    same_tokens(run.data, own)
    expected = evaluate_all(dataclasses.replace(run, data=own), params, step=step)
    capsys.readouterr()
    flag = f"--config.data.path={folder / 'other.txt'}"
    assert main(["eval", f"--workdir={folder / 'run'}", flag]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["valid/loss"] == expected["valid/loss"] and found["valid/bits_per_byte"] < 12
    for key, value in (("kind", "byte"), ("vocab_size", "9")):
        assert main(["eval", f"--workdir={folder / 'run'}", flag, f"--config.data.tokenizer.{key}={value}"]) == 1
        assert f"data.tokenizer.{key}: the run in" in capsys.readouterr().err


@pytest.mark.slow
def test_other_data_are_refused_or_recorded_and_keep_the_ids(of_characters, tmp_path, capsys):
    folder, tree = of_characters
    workdir = tmp_path / "run"
    shutil.copytree(folder / "run", workdir)
    tokenizer = load_tokenizer(workdir / "tokenizer")
    environment = json.loads((workdir / "environment.json").read_text())

    def go_on(steps, *flags):
        code = main(["train", f"--workdir={workdir}", f"--config.steps={steps}", *flags])
        return code, capsys.readouterr().err

    (folder / "text.txt").write_text((folder / "text.txt").read_text() + "that is another line\n")
    code, err = go_on(3)
    assert (
        code == 1 and "the content of the data: " in err and "texts.data.corpus.sha256" in err and "bytes.train" in err
    )
    assert json.loads((workdir / "environment.json").read_text()) == environment
    code, err = go_on(3, f"--config.data.path={folder / 'other.txt'}", "--accept-changes")
    assert code == 0, err
    change = json.loads((workdir / "history.jsonl").read_text().splitlines()[-3])
    assert change["event"] == "change" and change["step"] == 2
    assert {"data.path", "the content of the data"} < change["changes"].keys()
    assert go_on(4)[0] == 0  # the same again is no change
    saved = json.loads((workdir / "config.json").read_text())["data"]
    assert saved["path"] == str(folder / "other.txt") and saved["tokenizer"]["path"] == ""
    assert json.loads((workdir / "environment.json").read_text())["data"]["tokenizer"]["hash"] == tokenizer.hash
    given = resolve(tree, {"data.path": saved["path"], "data.tokenizer.path": str(workdir / "tokenizer")})
    own = prepare_data(given.data, context_length=16, batch_size=8, seed=0)
    same_tokens(restore_run(str(workdir))[0].data, own)


@pytest.mark.slow
def test_an_older_run_that_does_not_tell_of_its_data_goes_on(of_characters, tmp_path):
    folder, tree = of_characters
    shutil.copytree(folder / "run", tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    (tmp_path / "run" / "environment.json").write_text(json.dumps({**environment, "data": None}))
    (folder / "text.txt").write_text((folder / "text.txt").read_text() + "and another line\n")
    module = importlib.import_module("gpt_jax.train")
    done = module.train(resolve(tree | {"steps": 3}), str(tmp_path / "run"), log=lambda line: None)
    assert done["step"] == 3


def test_without_a_config_there_must_be_a_run_to_continue(tmp_path, capsys):
    for flags in ([], [f"--workdir={tmp_path}"], [f"--workdir={tmp_path / 'none'}"]):
        assert main(["train", *flags]) == 1
        err = capsys.readouterr().err
        assert err.startswith("gpt-jax: --config is missing") and err.count("\n") == 1
