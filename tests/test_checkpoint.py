"""checkpoint.py: what is saved comes back bit for bit, or the user is told which checkpoint to use instead."""

import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import checkpoint, checkpoint_folder
from gpt_jax.checkpoint import Checkpointer, steps_to_keep
from gpt_jax.checkpoint_parts import load_params, restore_some, restore_subset
from gpt_jax.errors import UserError
from gpt_jax.hooks import Save
from gpt_jax.train_state import TrainState

# Orbax abandons coroutines when the read of a damaged file fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def run_python(code, *arguments, devices=1, check=True, **kwargs):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **kwargs)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def make_state(seed=0, size=40):
    key = jax.random.key(seed)
    w = jax.random.normal(key, (size, 7))
    return {
        "step": jnp.int32(seed),
        "params": {"model": {"w": w, "b": w[0].astype(jnp.bfloat16)}},
        "opt_state": ({"mu": {"w": -w}}, (), jnp.arange(5, dtype=jnp.int8)),
        "ema": {},
        "flag": jnp.array([True, False]),
    }


def bits(tree):
    """Every leaf's name, dtype, shape and bytes: equal only if bitwise equal."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    plain = [(p, jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for p, x in leaves]
    return [(jax.tree_util.keystr(p), str(x.dtype), x.shape, np.asarray(x).tobytes()) for p, x in plain]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def test_state_comes_back_bit_for_bit_with_metadata(folder):
    state = make_state(3)
    odd = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    odd[:1].view(np.uint32)[0] = 0x7FC12345  # a NaN with a payload
    state["odd"] = jnp.asarray(odd)
    with Checkpointer(folder) as saver:
        saver.save(3, state, metadata={"config": {"steps": 5}, "text": "é"})
        saver.wait()
        back = saver.restore(None, abstract(state))
        assert saver.metadata() == {"config": {"steps": 5}, "text": "é"}
    assert bits(back) == bits(state)
    assert jax.tree.structure(back) == jax.tree.structure(state)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_prng_keys_come_back_as_keys_that_draw_the_same(folder, impl):
    state = {"one": jax.random.key(7, impl=impl), "many": jax.random.split(jax.random.key(8, impl=impl), (2, 3))}
    with Checkpointer(folder) as saver:
        saver.save(1, state)
        saver.wait()
        back = saver.restore(1, abstract(state))
    assert back["many"].dtype == state["many"].dtype and back["many"].shape == (2, 3)
    draw = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (4,))))
    np.testing.assert_array_equal(draw(back["many"]), draw(state["many"]))
    np.testing.assert_array_equal(jax.random.bits(back["one"], (4,)), jax.random.bits(state["one"], (4,)))


def test_save_keeps_its_values_while_donated_buffers_are_overwritten(folder):
    update = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    state = {f"w{i}": jnp.full((500_000,), float(i)) for i in range(8)}
    jax.block_until_ready(state)
    with Checkpointer(folder) as saver:
        saver.save(0, state)
        committed_early = 0 in saver.all_steps()
        for _ in range(30):
            state = update(state)
        jax.block_until_ready(state)
        saver.wait()
        back = saver.restore(0, abstract(state))
    assert not committed_early, "the save was not asynchronous, so this test shows nothing"
    for i in range(8):
        np.testing.assert_array_equal(back[f"w{i}"], float(i))
        np.testing.assert_array_equal(state[f"w{i}"], float(i) + 30)


def test_no_pickle_is_written_or_read(folder, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    state = make_state() | {"key": jax.random.key(1)}
    with Checkpointer(folder) as saver:
        saver.save(1, state, metadata={"a": [1]})
        saver.wait()
        assert bits(saver.restore(1, abstract(state))) == bits(state)


# ---- which are kept


def brute_force_keep(steps, losses, last, best, every):
    """Keeps a step if any reason speaks for it, each judged by counting the others that beat it."""
    keep = set()
    for s in steps:
        newer = sum(t > s for t in steps)
        better = sum((losses[t], t) < (losses[s], s) for t in steps if t in losses) if s in losses else math.inf
        if newer < max(last, 1) or better < best or (every and s > 0 and s % every == 0):
            keep.add(s)
    return keep


def test_kept_are_the_last_n_the_best_n_and_the_multiples_of_k():
    draw = random.Random(0)
    for _ in range(300):
        steps = draw.sample(range(0, 60, 2), draw.randint(0, 8))
        losses = {s: draw.choice([1.0, 2.0, 3.0, 4.0]) for s in steps if draw.random() < 0.7}
        last, best, every = draw.randint(0, 3), draw.randint(0, 3), draw.choice([0, 0, 4, 10])
        assert steps_to_keep(steps, losses, last, best, every) == brute_force_keep(steps, losses, last, best, every)


def test_a_loss_that_is_not_finite_is_never_the_best():
    assert steps_to_keep([1, 2, 3], {1: math.nan, 2: 5.0, 3: math.inf}, 1, 1, 0) == {2, 3}


def test_policy_on_disk_also_after_reopening(folder):
    losses = {1: 3.0, 2: 1.0, 3: 2.0}
    with Checkpointer(folder, keep_last=1, keep_best=1, keep_every_steps=3) as saver:
        for step in (1, 2, 3):
            saver.save(step, {"x": jnp.float32(step)}, valid_losses={s: v for s, v in losses.items() if s <= step})
    with Checkpointer(folder, keep_last=1, keep_best=1, keep_every_steps=3) as saver:
        assert saver.all_steps() == [2, 3]
        saver.save(4, {"x": jnp.float32(4)}, valid_losses=losses | {4: 9.0})
        saver.save(5, {"x": jnp.float32(5)}, valid_losses=losses | {4: 9.0, 5: 8.0})
        saver.wait()
        assert saver.all_steps() == [2, 3, 5] and saver.latest() == 5


def test_saving_a_stored_step_again_changes_nothing(folder):
    with Checkpointer(folder) as saver:
        saver.save(1, {"x": jnp.float32(1)})
        saver.save(1, {"x": jnp.float32(2)})
        saver.wait()
        assert saver.restore(1, {"x": jax.ShapeDtypeStruct((), jnp.float32)})["x"] == 1


# ---- damage, kills, full disks


def files_of(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_to_any_file_is_named_with_the_good_one_or_harmless(folder, damage):
    state = make_state(1)
    with Checkpointer(folder, keep_last=9) as saver:
        saver.save(300, state)
        saver.save(400, state)
    names = [p.relative_to(folder / "400") for p in files_of(folder / "400")]
    noticed = []
    for name in names:
        victim = folder / "400" / name
        before = victim.read_bytes()
        if damage == "delete":
            victim.unlink()
        elif damage == "truncate":
            victim.write_bytes(before[: len(before) // 2])
        else:
            middle = len(before) // 2
            victim.write_bytes(before[:middle] + bytes([before[middle] ^ 16] if before else []) + before[middle + 1 :])
        try:
            assert bits(checkpoint.restore(folder, 400, abstract(state))) == bits(state), f"{name}: silently wrong"
        except UserError as error:
            noticed.append(name)
            message = str(error)
            assert "checkpoint 400" in message and "newest good one is 300" in message and "\n" not in message, message
        victim.write_bytes(before)
    assert noticed, "no file mattered"
    assert bits(checkpoint.restore(folder, 400, abstract(state))) == bits(state)


def test_a_flipped_bit_anywhere_in_the_data_is_noticed(folder):
    state = {"w": jax.random.normal(jax.random.key(0), (64, 8))}
    with Checkpointer(folder) as saver:
        saver.save(1, state)
    raw = np.asarray(state["w"]).tobytes()
    (data,) = [p for p in files_of(folder) if raw in p.read_bytes()]
    content = data.read_bytes()
    start = content.index(raw)
    draw = random.Random(0)
    for _ in range(12):
        position, bit = start + draw.randrange(len(raw)), 1 << draw.randrange(8)
        data.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
        with pytest.raises(UserError, match="there is no other good one"):
            checkpoint.restore(folder, 1, abstract(state))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool", "float16"])
def test_check_sum_is_the_formula_and_changes_with_every_single_bit(dtype):
    x = np.asarray(jax.random.bits(jax.random.key(0), (3, 5), "uint8") % 2).astype(jnp.dtype(dtype))
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    bits_of_x = x.view(unsigned)

    def formula(elements):
        return sum((2 * i + 1) * int(e) for i, e in enumerate(elements.ravel())) % 2**32

    total = int(checkpoint_folder.check_sum(jnp.asarray(x)))
    assert total == formula(bits_of_x)
    if dtype == "bool":
        return
    for i in range(x.size):
        for bit in range(8 * x.dtype.itemsize):
            changed = bits_of_x.copy()
            changed.ravel()[i] ^= unsigned(1 << bit)
            assert formula(changed) != total


def test_the_good_one_named_is_itself_checked(folder):
    state = make_state(1)
    with Checkpointer(folder, keep_last=9) as saver:
        for step in (1, 2, 3):
            saver.save(step, state)
    for step in (2, 3):
        shutil.rmtree(folder / str(step) / "state")
    with pytest.raises(UserError, match=r"checkpoint 3 in .* is damaged .*; the newest good one is 1: delete .*/3 to"):
        checkpoint.restore(folder, None, abstract(state))


def test_what_killed_processes_left_is_ignored_and_removed(folder):
    with Checkpointer(folder) as saver:
        saver.save(1, {"x": jnp.float32(1)})
    for name in ("2.orbax-checkpoint-tmp", ".0.deleting"):
        shutil.copytree(folder / "1", folder / name)
    assert checkpoint.list_steps(folder) == [1]
    Checkpointer(folder).close()
    assert sorted(p.name for p in folder.iterdir()) == ["1"]


SAVES = """
    import sys, jax, jax.numpy as jnp
    from gpt_jax.checkpoint import Checkpointer
    saver = Checkpointer(sys.argv[1], keep_last=2, keep_best=0)
    start = saver.latest() or 0
    state = {"x": jnp.full((300_000,), float(start)), "n": jnp.int32(start)}
    for step in range(start + 1, 10_000):
        state = jax.tree.map(lambda x: x + 1, state)
        saver.save(step, state)
        print(step, flush=True)
"""


def test_kills_during_saves_and_deletions_never_leave_an_unreadable_checkpoint(folder):
    draw = random.Random(0)
    for _ in range(4):
        command = [sys.executable, "-c", textwrap.dedent(SAVES), str(folder)]
        process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE)
        for _ in range(draw.randint(2, 5)):
            begun = int(process.stdout.readline())
        time.sleep(draw.uniform(0, 0.1))  # a save follows on the other: every moment lies in one
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for step in checkpoint.list_steps(folder):
            wanted = {"n": jax.ShapeDtypeStruct((), jnp.int32), "x": jax.ShapeDtypeStruct((300_000,), jnp.float32)}
            back = checkpoint.restore(folder, step, wanted)
            assert back["n"] == step and (np.asarray(back["x"]) == step).all()
        assert max(checkpoint.list_steps(folder)) >= begun - 1  # each save waits for the one before


FULL = """
    import resource, sys, jax.numpy as jnp
    from gpt_jax.checkpoint import Checkpointer
    from gpt_jax.errors import UserError
    saver = Checkpointer(sys.argv[1])
    saver.save(1, {"x": jnp.ones((1000,))})
    saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    saver.save(2, {"x": jnp.arange(1_000_000.0)})
    try:
        saver.wait()
    except UserError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(saver.all_steps())
    saver.save(3, {"x": jnp.arange(1_000_000.0)})
    saver.close()
    print(saver.all_steps())
"""


def test_a_quota_reached_is_one_sentence_and_loses_nothing(folder):
    message, before, after = run_python(FULL, folder).stdout.strip().splitlines()
    assert "no space left on the device for checkpoint 2" in message and "nothing written before is lost" in message
    assert (before, after) == ("[1]", "[1, 3]")
    assert sorted(p.name for p in folder.iterdir()) == ["1", "3"]


def test_a_full_device_is_one_sentence_and_loses_nothing(tmp_path):
    device = tmp_path / "small"
    device.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(device)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        small, large = {"x": jnp.ones((1000,))}, {"x": jnp.arange(2_000_000.0)}
        saver = Checkpointer(device / "checkpoints")
        saver.save(1, small)
        saver.wait()
        saver.save(2, large)
        with pytest.raises(UserError, match=r"no space left on the device for checkpoint 2 at .*MiB free"):
            while True:
                saver.check()
                time.sleep(0.01)
        assert saver.all_steps() == [1]
        assert bits(saver.restore(None, abstract(small))) == bits(small)
        saver.save(3, small)
        saver.close()
        assert saver.all_steps() == [1, 3]
    finally:
        subprocess.run(["umount", str(device)], check=True)


# ---- other meshes


SHAPES = {"w": ((16, 24), "float32"), "r": ((7,), "float32"), "b": ((8,), "int32")}
SPECS = {"w": jax.P("fsdp", "tensor"), "r": jax.P(), "b": jax.P("tensor"), "keys": jax.P("fsdp")}


def on_mesh(rows, columns):
    devices = np.array(jax.devices()[: rows * columns]).reshape(rows, columns)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tensor"))
    values = {k: jax.random.normal(jax.random.key(0), shape).astype(dtype) for k, (shape, dtype) in SHAPES.items()}
    values["keys"] = jax.random.split(jax.random.key(5), 8)
    return jax.device_put(values, {k: jax.sharding.NamedSharding(mesh, spec) for k, spec in SPECS.items()})


@pytest.mark.parametrize(("saved", "restored"), [((1, 1), (2, 4)), ((8, 1), (1, 1)), ((2, 4), (4, 2))], ids=str)
def test_a_checkpoint_restores_onto_any_mesh(folder, saved, restored):
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    state, wanted = on_mesh(*saved), on_mesh(*restored)
    with Checkpointer(folder) as saver:
        saver.save(1, state)
        saver.wait()
        back = saver.restore(None, abstract(wanted))
    assert bits(back) == bits(state)
    for name, leaf in back.items():
        assert leaf.sharding.is_equivalent_to(wanted[name].sharding, leaf.ndim), name


def test_a_process_with_one_device_reads_what_eight_wrote(folder):
    state = on_mesh(2, 4)
    with Checkpointer(folder) as saver:
        saver.save(1, state)
    code = """
        import sys, jax, numpy as np
        from gpt_jax.checkpoint import restore
        assert len(jax.devices()) == 1
        shapes = {"w": ((16, 24), "float32"), "r": ((7,), "float32"), "b": ((8,), "int32")}
        wanted = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
        wanted["keys"] = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
        w = restore(sys.argv[1], None, wanted)
        print(np.asarray(w["w"]).tobytes().hex())
    """
    assert run_python(code, folder).stdout.strip() == np.asarray(state["w"]).tobytes().hex()


# ---- what does not fit


def test_a_state_of_other_shapes_is_refused_naming_them(folder):
    state = make_state(1)
    with Checkpointer(folder) as saver:
        saver.save(1, state)
    wrong = abstract(state)
    wrong["params"]["model"]["w"] = jax.ShapeDtypeStruct((50, 7), jnp.float32)
    wrong["params"]["model"]["bias"] = wrong["params"]["model"].pop("b")
    with pytest.raises(UserError) as caught:
        checkpoint.restore(folder, None, wrong)
    message = str(caught.value)
    assert "params/model/b is only in the checkpoint" in message
    assert "params/model/bias is only in this run" in message
    assert "params/model/w is float32[40, 7] there and float32[50, 7] here" in message


@pytest.mark.parametrize(
    ("path", "step", "message"),
    [("nothing", None, "no checkpoint in"), (".", 7, "no checkpoint of step 7 in .*; there are 1, 2")],
)
def test_a_checkpoint_that_is_not_there_is_a_sentence(folder, path, step, message):
    with Checkpointer(folder) as saver:
        saver.save(1, {"x": jnp.ones(())})
        saver.save(2, {"x": jnp.ones(())})
    with pytest.raises(UserError, match=message):
        checkpoint.find_checkpoint(folder / path, step)


def test_a_checkpoint_is_found_by_run_folder_and_itself(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as saver:
        saver.save(1, {"x": jnp.ones(())})
        saver.save(2, {"x": jnp.ones(())})
    folder = tmp_path / "checkpoints"
    assert checkpoint.find_checkpoint(tmp_path) == (folder, 2)
    assert checkpoint.find_checkpoint(folder, 1) == (folder, 1)
    assert checkpoint.find_checkpoint(folder / "1") == (folder, 1)


# ---- parts of a state


@pytest.fixture(scope="module")
def run_with_frozen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    state = {
        "params": {"model": {"w": jnp.arange(6.0).reshape(2, 3), "head": jnp.ones(4)}},
        "ema": {"model": {"w": jnp.full((2, 3), 9.0), "head": jnp.zeros(4)}},
        "opt_state": {"mu": jnp.ones(3)},
    }
    frozen = {"model": {"base": jnp.arange(5.0)}, "reference": {"w": jnp.full((2,), 3.0)}}
    with Checkpointer(folder) as saver:
        saver.save_frozen(frozen)
        saver.save_frozen(jax.tree.map(jnp.zeros_like, frozen))  # stored once: this is not
        saver.save(1, state)
        saver.save(2, state)
    return folder.parent, state, frozen


def test_frozen_parameters_are_stored_once_and_come_back(run_with_frozen):
    run, state, frozen = run_with_frozen
    with Checkpointer(run / "checkpoints") as saver:
        assert bits(saver.restore_frozen(abstract(frozen))) == bits(frozen)
        assert bits(saver.restore(2, abstract(state))) == bits(state)
    stored = checkpoint_folder.read_manifest(run / "checkpoints" / "2")["arrays"]
    assert not any("base" in name or "reference" in name for name in stored)


def test_damaged_frozen_parameters_are_named_and_no_checkpoint_is_blamed(run_with_frozen, tmp_path):
    run, _, frozen = run_with_frozen
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    for file in (folder / "frozen" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-5])
    for read in (lambda: checkpoint.restore_frozen(folder, abstract(frozen)), lambda: load_params(tmp_path, step=2)):
        with pytest.raises(checkpoint.DamagedCheckpoint) as error:
            read()
        assert f"the frozen parameters at {folder / 'frozen'} are damaged" in str(error.value)
        assert "checkpoint 2" not in str(error.value)


@pytest.mark.parametrize("root", ["params", "ema"])
def test_load_params_merges_frozen_ones(run_with_frozen, root):
    run, state, frozen = run_with_frozen
    want = {"model": state[root]["model"] | frozen["model"], "reference": frozen["reference"]}
    assert bits(load_params(run, root=root)) == bits(want)
    assert bits(load_params(run / "checkpoints" / "1", abstract(want), root=root)) == bits(want)
    with pytest.raises(UserError, match="has no parameter other"):
        load_params(run, {"other": jax.ShapeDtypeStruct((), jnp.float32)}, root=root)


def test_restore_subset_says_what_it_restored_initialised_and_ignored(run_with_frozen):
    run, state, _ = run_with_frozen
    new = {"model": {"w": jnp.zeros((2, 3), jnp.bfloat16), "head": jnp.full((7,), -1.0), "new": jnp.full((2,), -2.0)}}
    params, done = restore_subset(run, new)
    assert done.restored == ("model/w",)
    assert done.initialised == ("model/head (float32[4] there, float32[7] here)", "model/new")
    assert done.ignored == ("model/base", "reference/w")
    assert params["model"]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["model"]["w"], state["params"]["model"]["w"])
    np.testing.assert_array_equal(params["model"]["head"], new["model"]["head"])
    assert "restored 1: model/w" in done.describe() and "ignored 2: model/base" in done.describe()


def test_restore_subset_renames(run_with_frozen):
    run, state, _ = run_with_frozen
    new = {"generator": {"w": jnp.zeros((2, 3))}, "head": jnp.zeros(4)}
    params, done = restore_subset(run, new, rename=[("^model/w$", "generator/w"), ("^model/head", "head")])
    assert done.restored == ("generator/w", "head") and not done.initialised
    np.testing.assert_array_equal(params["generator"]["w"], state["params"]["model"]["w"])
    with pytest.raises(UserError, match="already"):
        restore_subset(run, new, rename=[("^model/w$", "model/head")])


def test_restore_subset_that_fits_nothing_is_refused(run_with_frozen):
    with pytest.raises(UserError, match=r"no parameter of .* has a name and shape"):
        restore_subset(run_with_frozen[0], {"other": jnp.zeros(3)})


def test_restore_some_keeps_what_is_not_asked_for(run_with_frozen):
    run, state, _ = run_with_frozen
    fresh = jax.tree.map(lambda x: jnp.full_like(x, -5.0), state)
    fresh["opt_state"] = {"other": jnp.zeros(2)}
    mixed, done = restore_some(run, None, fresh, only="^params/")
    assert bits(mixed["params"]) == bits(state["params"]) and bits(mixed["ema"]) == bits(fresh["ema"])
    assert "opt_state/other" in done.initialised and not done.ignored


def test_a_run_saves_no_parameters_that_are_not_finite(tmp_path):
    said = []
    writer = types.SimpleNamespace(flush=lambda: None, column=lambda name: {})
    with Checkpointer(tmp_path) as checkpointer:
        save = Save(checkpointer, writer, {}, every_steps=1, every_minutes=0.0, log=said.append)
        for step, value in ((1, 1.0), (2, jnp.nan), (3, jnp.inf)):
            params = {"good": jnp.ones(3), "odd": jnp.array([0.0, value])}
            save(step, TrainState(jnp.int32(step), params, {}, {}, {}, jnp.zeros(2, jnp.int32)))
        checkpointer.wait()
        assert checkpointer.all_steps() == [1]
    assert [line.split(":")[0] for line in said] == [f"step {k}" for k in (2, 3)] and "not finite" in said[0]
