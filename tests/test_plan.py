"""The command `gpt-jax plan`, on simulated devices; for TPUs and GPUs where their compilers are installed."""

import dataclasses
import functools
import json
import pathlib
import re
import shlex

import jax
import pytest
from test_topologies import needs_cuda, needs_libtpu

from gpt_jax.ahead import Compiled, abstract_step, compile_step, count_params, used_bytes, vocabulary_of
from gpt_jax.cli import main
from gpt_jax.compiler_flags import compile_options
from gpt_jax.config import load
from gpt_jax.data.batches import BatchOrder, resolve_batch_schedule
from gpt_jax.data.ramp import rows_before
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.hlo import Collective
from gpt_jax.model.size import count_parameters
from gpt_jax.plan import _guess, batches, largest, max_batch, mfu_bound, remats, roofline, summary, with_rows
from gpt_jax.preflight import state_bytes
from gpt_jax.presets import GPT3
from gpt_jax.run import build_run, mesh_of
from gpt_jax.topologies import CHIPS, simulated

TINY = {
    "batch_size": "8",
    "context_length": "128",
    "model.num_layers": "2",
    "model.d_model": "32",
    "model.num_heads": "2",
    "model.vocab_size": "300",
    "model.unroll": "1",
    "optimizer.name": "adamw",
}
KEYS = (
    *("chips", "params", "fits", "hbm_bytes_per_chip", "hbm_capacity_bytes", "flops_per_step"),
    *("collective_bytes", "mfu_bound", "max_batch_per_shard", "max_batch_per_chip", "compile_s"),
)


def plan(capsys, *arguments, **overrides):
    keys = [f"--config.{key}={value}" for key, value in (TINY | overrides).items()]
    code = main(["plan", "--config=quickstart", *arguments, *keys])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out.splitlines()[-1]), out


def test_a_plan_on_simulated_devices_says_what_closed_forms_say(capsys):
    result, out = plan(capsys, "--devices", "8")
    assert all(key in result for key in KEYS)
    config = load("quickstart", TINY)
    assert result["chips"] == 8 and result["params"] == count_parameters(config.model)
    # fp32 weights and two moments, an eighth of each but of the norms; and a row of tokens, targets and weights
    padded = result["params"] + (384 - 300) * 32
    state = padded * 12 / 8 + 3 * 128 * 4
    assert state <= result["state_bytes_per_chip"] <= 1.05 * state
    assert result["hbm_bytes_per_chip"] == result["state_bytes_per_chip"] + result["temporary_bytes_per_chip"]
    assert 0.9 < result["flops_over_model_flops"] < 1.3  # the padding of the vocabulary is a fifth here
    # each weight is gathered at least once, seven eighths of it from others, and its gradient goes the same way
    assert result["collective_bytes"] > 2 * 4 * result["params"] * 7 / 8
    assert result["fits"] is True and result["mfu_bound"] is None and result["roofline_s"] == {}
    assert "fits: " in out and "simulated: 8 chips, data 1 x fsdp 8" in out


def test_parameters_that_fsdp_leaves_whole_are_named_in_a_warning(capsys):
    keys = {**TINY, "mesh.rules": "(('mlp', None), ('embed', None))", "model.num_layers": "1"}
    assert (
        main(["plan", "--config=quickstart", "--devices=2", "--json", *(f"--config.{k}={v}" for k, v in keys.items())])
        == 0
    )
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["replicated_part"] > 0.9 and "model/embedding (" in result["replicated"][0]
    assert re.search(
        r"^gpt-jax: warning: \d\d\d?.\d% of the parameters' bytes are whole .* model/embedding \(", err, re.M
    )
    main(["plan", "--config=quickstart", "--devices=2", "--json", *(f"--config.{k}={v}" for k, v in TINY.items())])
    assert "warning" not in capsys.readouterr().err


def test_json_alone_is_one_line(capsys):
    _, out = plan(capsys, "--devices", "8", "--json")
    assert len(out.splitlines()) == 1


def test_all_configs_of_gpt3_have_their_parameters_without_a_tokenizer():
    for name in ("gpt3_125m", "gpt3_13b"):
        config, step = abstract_step(load(name), simulated(8))
        assert count_params(step, config) == GPT3[name].parameters


def test_the_batches_of_gpt3_grow_as_published_and_hold_its_tokens():
    for name, preset in GPT3.items():
        config = load(name)
        micro = 16  # 32k tokens
        schedule = resolve_batch_schedule(
            config.batch_schedule,
            batch_size=preset.batch_size,
            context_length=2048,
            steps=config.steps,
            micro=micro,
        )
        assert schedule[0][1] == 16 and schedule[-1][1] == preset.batch_size - micro
        order = BatchOrder(preset.batch_size, schedule)
        assert 4e9 <= rows_before(schedule[-1][0], order) * 2048 <= 12.1e9
        tokens = float(rows_before(config.steps, order)) * 2048
        assert tokens == pytest.approx(300e9, rel=1e-4), name


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ({"data.tokenizer.kind": "gpt2"}, 50257 + 3),
        ({"data.tokenizer.kind": "byte"}, 260),
        ({"data.tokenizer.vocab_size": "777"}, 777),
        ({"data.tokenizer.keep": "100"}, 104),
        ({"model.vocab_size": "321"}, 321),
    ],
)
def test_the_vocabulary_is_known_before_the_tokenizer(overrides, size):
    assert vocabulary_of(load("quickstart", overrides)) == size


def test_a_run_from_anothers_weights_is_planned_with_its_model_and_tokenizer(tmp_path):
    tokenizer = ByteTokenizer(("eot", "mask", "sep", "cls"))
    tokenizer.save(tmp_path / "tokenizer")
    theirs = {"num_layers": 3, "d_model": 48, "num_heads": 3, "vocab_size": 260, "max_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model": theirs}))
    given = {"init.from": str(tmp_path), "context_length": "64", "model.num_layers": "1", "model.d_model": "32"}
    config, step = abstract_step(load("quickstart", given), simulated(1))
    model = config.model
    assert (model.num_layers, model.d_model, model.vocab_size, model.max_positions) == (3, 48, 260, 64)
    assert count_params(step, config) == count_parameters(model)
    own = load("quickstart", given | {"init.model": "False"})
    config, _ = abstract_step(own, simulated(1))  # their tokenizer all the same
    assert (config.model.num_layers, config.model.d_model, config.model.vocab_size) == (1, 32, 260)
    assert state_bytes(load("quickstart", given)) == count_parameters(model) * 16 // jax.device_count()


@pytest.mark.parametrize(
    ("name", "head", "labels"),
    [("classify", "classifier", 6), ("tag", "tagger", 8), ("multitask", "classifier", 6), ("sst2", "classifier", 2)],
)
def test_a_head_has_an_output_for_each_label_of_the_tasks(name, head, labels, monkeypatch):
    monkeypatch.delenv("GPT_JAX_DATA", raising=False)  # no example is read
    tiny = {"model.num_layers": "1", "model.d_model": "32", "model.num_heads": "2"}
    _, step = abstract_step(load(name, tiny), simulated(1))
    step.trace()
    assert step.abstract.all_params[head]["bias"].shape == (labels,)


def test_labels_of_a_file_that_is_absent_are_missed_in_one_line(tmp_path):
    tasks = repr(({"name": "classification", "train": f"{tmp_path}/gone.tsv"},))
    with pytest.raises(UserError, match=r"gone.tsv: cannot read \(No such file or directory\)"):
        abstract_step(load("classify", {"data.tasks": tasks}), simulated(1))


OTHERS = ("masked_lm", "replaced_token", "distillation", "dialogue", "dpo", "multiple_choice", "span_qa", "tag", "lora")
TOYS = {
    "name": "mixture",
    "tasks": {
        "text": {"name": "causal_lm", "rows": 9},
        "reverse": {"name": "supervised", "rows": 4, "max_new": 4, "data": {"tasks": ("toy_tasks:reverse",)}},
        "colours": {"name": "classify", "rows": 3, "data": {"tasks": ("toy_tasks:colours", "toy_tasks:pairs")}},
    },
}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("quickstart", {}),
        ("quickstart", {"data.doc_mask": "True"}),
        ("quickstart", {"data.layout": "bins"}),
        ("denoising", {}),
        ("multitask", {"data.doc_mask": "True", "objective": repr(TOYS)}),
        ("multitask", {"data.layout": "padded", "objective": repr(TOYS)}),
        ("policy_gradient", {}),
        pytest.param("multitask", {"data.doc_mask": "True"}, marks=pytest.mark.slow),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in OTHERS),
    ],
)
def test_the_batches_that_are_planned_are_those_of_the_run(name, overrides, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt_jax.run.mesh_of", functools.partial(mesh_of, devices=jax.devices()[:1]))
    (tmp_path / "text.txt").write_text("\n\n".join(["to be or not to be, that is the question. "] * 99))
    tiny = {"model.num_layers": "1", "model.d_model": "16", "model.num_heads": "1", "model.embedding_size": "0"}
    tiny |= {"data.path": str(tmp_path / "text.txt"), "data.tokenizer.kind": "byte"}
    config = load(name, tiny | overrides)
    run = build_run(config, lambda line: None)
    _, step = abstract_step(config, simulated(1))
    assert step.batch_spec == run.step.batch_spec


CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
SMALL = [path for path in CONFIGS.rglob("*.py") if not re.match(r"gpt3_|llama2_|gpt2_", path.name)]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(SMALL), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_all_shipped_configs_have_a_step_without_data(path):
    config = load(str(path), {})
    if config.data.tokenizer.kind == "char" and not config.model.vocab_size:
        config = load(str(path), {"model.vocab_size": "100"})
    _, step = abstract_step(config, simulated(1))
    parts = step.batch_spec.values() if config.objective["name"] == "mixture" else [step.batch_spec]
    rows = [{leaf.shape[0] for leaf in jax.tree.leaves(part)} for part in parts]
    assert all(len(found) == 1 for found in rows) and sum(map(sum, rows)) == config.batch_size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--topology", "v5e:4"), "'v5e:4' is not v5e:SIZES"),
        (("--topology", "b200:1x8"), "the kind of a topology is 'b200'"),
        ((), "one of the arguments --topology --devices"),
        (("--devices", "2", "--topology", "v5e:2x2"), "not allowed with"),
        (("--devices", "3"), "batch_size is 16, which 3 devices"),
        (("--devices", "8", "--config.data.tokenizer.kind=char"), "not known before it is made or read"),
        (("--devices", "8", "--config.mesh.tensor=3"), "does not make up the 8 devices"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys, arguments, said):
    assert main(["plan", "--config=quickstart", *arguments]) == 1
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("chip", "overrides", "said"),
    [
        ("h100", {"mesh.sequence": "2"}, "a sequence that the mesh cuts"),
        ("h100", {"data.doc_mask": "True"}, "documents kept apart"),
        ("a100", {"model.head_dim": "192"}, "head sizes above 128 on a100"),
        ("h100", {"model.head_dim": "192"}, ""),
    ],
)
def test_a_plan_refuses_of_cudnn_what_the_run_would(chip, overrides, said):
    machine = dataclasses.replace(simulated(8), chip=CHIPS[chip])
    config = load("quickstart", TINY | {"model.dtype": "bfloat16", "model.attention": "cudnn"} | overrides)
    if said:
        with pytest.raises(UserError, match=f"model.attention is 'cudnn', which does not support {said}"):
            abstract_step(config, machine)
        config = load("quickstart", TINY | {"model.attention": "auto"} | overrides)
    assert abstract_step(config, machine)[0].model.attention == "chunks"


def test_a_plan_for_a_machine_is_compiled_with_the_flags_of_a_run_on_it(monkeypatch):
    given = []
    compile_ = jax.stages.Lowered.compile

    def watched(self, compiler_options=None):
        given.append(compiler_options)
        return compile_(self, compiler_options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", watched)
    machine = dataclasses.replace(simulated(2), chip=CHIPS["h100"])
    compiled = compile_step(load("quickstart", TINY | {"model.num_layers": "1"}), machine)
    assert given[0] == compile_options("gpu") != {} and compiled.stand_in
    extra = {"compiler.extra": "('--xla_gpu_enable_pipelined_all_gahter=true',)"}
    with pytest.raises(
        UserError, match="compiler.extra is .*No such compile option: 'xla_gpu_enable_pipelined_all_gah"
    ):
        compile_step(load("quickstart", TINY | extra), machine)


def test_mfu_is_bounded_by_what_the_run_itself_takes():
    machine = dataclasses.replace(simulated(8), chip=CHIPS["h100"], group=4)
    chip, gigabyte = machine.chip, 10**9
    collectives = (Collective("all-gather", 1, 7 * gigabyte, 8, gigabyte),)
    names = {field.name for field in dataclasses.fields(Compiled)}
    known = dict(collectives=collectives, memory_traffic=chip.hbm, flops=chip.peak, model_flops=4 * chip.peak)
    known |= dict(program=True, stand_in=False)
    compiled = Compiled(**dict.fromkeys(names, 0) | known)
    times = roofline(compiled, machine)
    assert times == {"compute": 1 / 8, "hbm": 1, "link": 6 * gigabyte / chip.link, "network": gigabyte / chip.network}
    assert mfu_bound(compiled, machine) == pytest.approx(0.5)  # a second of memory traffic for half a second's work
    assert mfu_bound(dataclasses.replace(compiled, stand_in=True), machine) == pytest.approx(4.0)
    assert mfu_bound(dataclasses.replace(compiled, program=False), machine) is None


def test_the_batch_of_a_shard_is_told_with_the_number_of_shards_which_is_not_that_of_chips():
    known = dict(config=load("quickstart", TINY | {"batch_size": "32", "microbatches": "2"}), model_flops=1)
    known |= dict(mesh={"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}, collectives=(), replicated=(0.0, []))
    compiled = Compiled(**dict.fromkeys([field.name for field in dataclasses.fields(Compiled)], 0) | known)
    result = summary(compiled, simulated(8))
    assert (result["chips"], result["shards"], result["batch_per_shard"]) == (8, 4, 4)
    assert result["shards"] * result["batch_per_shard"] * 2 == 32
    assert result["max_batch_per_chip"] is None


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 6, 7, 40, 1000])
@pytest.mark.parametrize("start", [1, 6, 64])
def test_the_search_finds_the_largest_batch_that_fits(limit, start):
    asked = []
    sizes = {}

    def holds(n):
        asked.append(n)
        sizes[n] = 100 + 10 * n
        return n <= limit

    assert largest(holds, start, lambda: _guess(sizes, 100 + 10 * limit + 5)) == limit
    assert len(set(asked)) <= 12 and min(asked) >= 1


def test_the_search_needs_no_guess():
    assert largest(lambda n: n <= 37, 4, lambda: None) == 37


def test_a_mixture_keeps_its_shares_in_other_batches(monkeypatch):
    known = dict(config=load("multitask", {}), mesh={"data": 2, "fsdp": 1, "tensor": 1, "sequence": 1}, program=True)
    compiled = Compiled(**dict.fromkeys([field.name for field in dataclasses.fields(Compiled)], 0) | known)
    rows = lambda config: [task["rows"] for task in config.objective["tasks"].values()]  # noqa: E731
    assert compiled.rows == 8 and rows(with_rows(compiled, 16)) == [12, 8, 12]
    assert [n for n in range(1, 33) if with_rows(compiled, n)] == [8, 16, 24, 32]  # 6, 6, 4: pairs on two devices
    asked = []

    def compiled_for(config, machine):
        asked.append(config.batch_size)
        assert sum(rows(config)) == config.batch_size
        return dataclasses.replace(compiled, config=config, state_bytes=config.batch_size)

    monkeypatch.setattr("gpt_jax.plan.compile_step", compiled_for)
    monkeypatch.setattr("gpt_jax.plan.capacity", lambda machine: 100)  # 92 of them
    assert max_batch(dataclasses.replace(compiled, state_bytes=16), simulated(2)) == 40 and 80 in asked
    assert list(batches(compiled)) == []

    def refused(config, machine):
        raise UserError("no such batch")

    monkeypatch.setattr("gpt_jax.plan.compile_step", refused)
    with pytest.raises(UserError, match="no such batch"):
        max_batch(compiled, simulated(2))


def test_smaller_batches_of_a_mixture_are_advised_with_their_rows():
    known = dict(config=load("multitask", {}), mesh={"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}, program=True)
    compiled = Compiled(**dict.fromkeys([field.name for field in dataclasses.fields(Compiled)], 0) | known)
    ((text, changed),) = batches(compiled)
    assert changed.batch_size == 8 and text.startswith("--config.batch_size=8 \"--config.objective={'name': 'mixture'")
    words = [word.removeprefix("--config.").split("=", 1) for word in shlex.split(text)]
    assert load("multitask", dict(words)).objective == changed.objective


@pytest.mark.parametrize(("remat", "less"), [("none", ["dots", "dots_no_batch", "full"]), ("offload_dots", ["full"])])
def test_remats_that_keep_less(remat, less):
    found = remats(load("quickstart", {"model.remat": remat}))
    assert [config.model.remat for _, config in found] == less
    assert not list(remats(load("quickstart", {"model.remat": "full"})))


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_would(capsys, monkeypatch):
    before, _ = plan(capsys, "--devices", "1", **{"model.num_layers": "8", "batch_size": "32"})
    room = int(before["hbm_bytes_per_chip"] * 0.8 / 0.92)
    monkeypatch.setattr("gpt_jax.plan.capacity", lambda machine: room)
    result, out = plan(capsys, "--devices", "1", "--max-batch", **{"model.num_layers": "8", "batch_size": "32"})
    assert result["fits"] is False and "does NOT fit" in out
    assert any("--config.microbatches=" in line for line in result["advice"])
    assert any("--config.batch_size=16" in line for line in result["advice"])
    assert 16 <= result["max_batch_per_shard"] < 32
    assert result["max_batch_per_chip"] == result["max_batch_per_shard"]  # of one chip


def test_a_compilers_refusal_says_how_much_it_wanted():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    assert used_bytes(text) == int(20.5 * 2**30)
    assert used_bytes("INTERNAL: something else") is None


ON_CHIPS = {"model.dtype": "bfloat16", "context_length": "256", "batch_size": "16", "model.remat": "full"}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
def test_a_train_step_compiles_for_a_tpu(capsys, topology):
    result, _ = plan(capsys, "--topology", topology, **ON_CHIPS, **{"mesh.tensor": "2"})
    assert result["chips"] == 8 and result["fits"] is True and 0 < result["mfu_bound"] < 1
    assert result["unknown_loops"] == 0 and result["roofline_s"]["network"] == 0
    assert result["collective_bytes"] > 2 * 2 * result["params"] / 2 * 3 / 4  # bf16 weights to each, and gradients back


@needs_libtpu
@pytest.mark.slow
def test_what_crosses_slices_is_told_apart(capsys):
    keys = ON_CHIPS | {"mesh.slices": "2", "mesh.data": "2", "model.attention": "blocks"}
    result, out = plan(capsys, "--topology", "v5e:2x2", **keys)
    assert result["chips"] == 8 and result["topology"] == "2*v5e:2x2" and "data 2 x fsdp 4" in out
    assert result["roofline_s"]["network"] > 0 and result["roofline_s"]["link"] > 0


@needs_cuda
@pytest.mark.slow
def test_a_train_step_compiles_for_gpus(capsys):
    result, out = plan(capsys, "--topology", "h100:2x4", **ON_CHIPS, **{"mesh.tensor": "4", "model.num_heads": "4"})
    assert result["chips"] == 8 and result["fits"] is True and 0 < result["mfu_bound"] < 1
    assert result["roofline_s"]["network"] > 0  # two hosts
    assert "attention chunks" in out
