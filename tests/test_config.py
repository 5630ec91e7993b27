"""config.py and config_changes.py: strict reading, exact round trips, and which changes a continued run takes."""

import dataclasses
import json
import pathlib
import textwrap

import pytest

from gpt_jax import config_changes
from gpt_jax.config import Config, describe, dumps, find_config, load, loads, resolve, to_dict
from gpt_jax.config_changes import FREE, IMPOSSIBLE, NUMERICS, classify, compare, compare_data, decide, flatten, undo
from gpt_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def config_file(tmp_path):
    def write(body, name="mine.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(body))
        return str(path)

    return write


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and prefix + key != "objective" and not key.endswith("kwargs"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# ---- reading


def test_a_file_states_only_what_differs(config_file):
    path = config_file(
        """
        from gpt_jax.config import base

        def get_config():
            config = base()
            config.steps = 7
            config.model.num_layers = 2
            return config
        """
    )
    config = load(path)
    assert config == dataclasses.replace(
        Config(), name="mine", steps=7, model=dataclasses.replace(Config().model, num_layers=2)
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.py")), ids=lambda p: p.stem)
def test_every_config_file_loads_by_path_and_by_name(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # found from anywhere
    monkeypatch.setenv("GPT_JAX_DATA", "/nowhere")
    assert load(str(path)) == load(path.stem)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.model.num_layer = 3", "num_layers"),
        ("config.stepz = 3", "steps"),
        ("config.optimizer.learning_rte = 3", "learning_rate"),
        ("config.steps = 'many'", "steps"),
        ("config.model.num_heads = 5", "num_heads"),
        ("config.model.ffn = 'swigloo'", "swiglu"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence_with_the_closest_name(config_file, line, message):
    path = config_file(
        f"""
        from gpt_jax.config import base

        def get_config():
            config = base()
            {line}
            return config
        """
    )
    with pytest.raises(UserError) as caught:
        load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("model.num_layer", "3", "unknown config key 'model.num_layer' (did you mean 'num_layers'?)"),
        ("modle.num_layers", "3", "did you mean 'model'?"),
        ("steps", "3.5", "config key 'steps' takes a whole number, not 3.5"),
        ("steps", "ten", "config key 'steps' takes a whole number, not 'ten'"),
        ("steps", "True", "config key 'steps' takes a whole number, not True"),
        ("optimizer.learning_rate", "fast", "config key 'optimizer.learning_rate' takes a number, not 'fast'"),
        ("model.bias", "1", "config key 'model.bias' takes true or false, not 1"),
        ("steps.more", "1", "'steps' is a value, not a group of keys"),
        ("model", "3", "'model' is a group of keys"),
        ("init.source", "x", "unknown config key 'init.source'"),
        ("objective", "3", "config key 'objective' takes a mapping, not 3"),
        ("steps", "1e999", "config key 'steps' takes a whole number, not inf"),
        ("steps", "0", "steps is 0; it must be at least 1"),
        ("checkpoint.every_steps", "-1", "checkpoint.every_steps is -1; it must be at least 0"),
        ("log.every_steps", "0", "log.every_steps is 0; it must be at least 1"),
        ("data.skip", "[(50, 40)]", "data.skip has (50, 40); it is a list of ranges"),
        ("data.skip", "(40, 50)", "data.skip has 40; it is a list of ranges"),
        ("optimizer.clip_norm", "-1", "optimizer.clip_norm is -1.0; it must be above 0, or 0 (off)"),
        ("optimizer.ema", "1", "optimizer.ema is 1.0; it must be at least 0 (off) and below 1"),
        ("optimizer.b1", "1", "optimizer.b1 is 1.0; it must be at least 0 and below 1"),
        ("optimizer.b2", "-0.1", "optimizer.b2 is -0.1; it must be at least 0 and below 1"),
        ("optimizer.learning_rate", "1e999", "optimizer.learning_rate is inf; it must be a finite number"),
        ("optimizer.max_skipped", "-1", "optimizer.max_skipped is -1; it must be at least 0"),
        ("data.tokenizer.vocab_size", "-5", "data.tokenizer.vocab_size is -5; it must be at least 0"),
        ("data.tokenizer.keep", "-5", "data.tokenizer.keep is -5; it must be at least 0"),
        ("seed", str(2**64), f"seed is {2**64}; it must be a whole number of 64 bits with its sign"),
        ("sample.prompts", "(1, None)", "config key 'sample.prompts' takes text, not None"),
        ("sample.max_tokens", "0", "sample.max_tokens is 0; it must be at least 1"),
        ("sample.temperature", "-1", "sample.temperature is -1.0; it must be at least 0"),
        ("sample.top_k", "-1", "sample.top_k is -1; it must be at least 0"),
        ("sample.top_p", "1.5", "sample.top_p is 1.5; it must be between 0 and 1"),
        ("eval.weights", "emma", "eval.weights is 'emma' (did you mean 'ema'?); allowed: auto, raw, ema, average"),
        ("batch_schedule", "(('10%','8'),)", "batch_schedule has ('10%', '8'); each is (until, sequences)"),
    ],
)
def test_a_mistyped_override_is_one_sentence(key, text, message):
    with pytest.raises(UserError) as caught:
        resolve(to_dict(Config()), {key: text})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_take_the_type_of_their_key():
    config = resolve(
        {},
        {
            "steps": "1e3",
            "name": "2024",
            "optimizer.learning_rate": "3e-4",
            "model.bias": "false",
            "data.skip": "[(40, 50)]",
            "model.pattern": "dense,band",
            "data.tokenizer.specials": "('eot',)",
            "init.from": "runs/1",
            "objective.name": "masked_lm",
            "objective.rate": "0.15",
            "optimizer.warmup": "200",
            "optimizer.kwargs": "{'nesterov': True}",
        },
    )
    assert config.steps == 1000 and isinstance(config.steps, int)
    assert config.name == "2024" and config.optimizer.learning_rate == 3e-4 and config.model.bias is False
    assert config.data.skip == ((40, 50),) and config.model.pattern == ("dense", "band")
    assert config.data.tokenizer.specials == ("eot",) and config.init.source == "runs/1"
    assert config.objective == {"name": "masked_lm", "rate": 0.15}
    assert config.optimizer.warmup == "200" and config.optimizer.kwargs == {"nesterov": True}


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("1,2", ("1", "2")),
        ("7", ("7",)),
        ("None", ("None",)),
        ("('a, b', 3)", ("a, b", "3")),
        ("one, two", ("one", "two")),
        ("()", ()),
    ],
)
def test_prompts_are_texts(text, prompts):
    assert resolve({}, {"sample.prompts": text}).sample.prompts == prompts


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().steps = 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def get_confg(): pass", "does not define get_config"),
        ("def get_config(): return 1 +", "SyntaxError"),
        ("import no_such_package\ndef get_config(): pass", "no_such_package"),
        ("def get_config(): return None", "get_config"),
        ("def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError"),
    ],
)
def test_a_broken_file_is_a_sentence(config_file, body, message):
    with pytest.raises(UserError, match=message):
        load(config_file(body))


def test_a_runs_own_config_is_no_config_file(tmp_path):
    (tmp_path / "config.json").write_text(dumps(Config()))
    with pytest.raises(UserError, match=r"config\.json is no Python file; to continue a run give --workdir alone\."):
        load(str(tmp_path / "config.json"))


def test_an_unknown_name_lists_the_closest_and_all():
    with pytest.raises(UserError, match=r"no config file 'quikstart' \(did you mean 'quickstart'\?\).*gpt2_124m"):
        find_config("quikstart")


# ---- writing


def test_resolved_config_reads_back_exactly():
    config = resolve(
        {},
        {
            "data.skip": "[(40, 50), (7, 9)]",
            "optimizer.groups": "(('bias', {'weight_decay': 0.0}),)",
            "init.from": "x",
            "objective": "{'name': 'sum', 'terms': [{'name': 'causal_lm', 'coef': 0.5}]}",
            "optimizer.learning_rate": "0.1",
        },
    )
    assert loads(dumps(config)) == config
    assert '"from": "x"' in dumps(config)


def test_describe_shows_every_key_with_its_meaning():
    lines = describe(Config()).splitlines()
    keys = [key for key, _ in leaves(to_dict(Config()))]
    assert [line.split(" = ")[0] for line in lines] == keys
    for line in lines:
        assert line.split("  # ", 1)[1].strip(), f"no meaning: {line}"
    layouts = lines[keys.index("data.layout")].split("  # ")[1].split(" | ")
    assert [text.split(": ")[0] for text in layouts] == ["packed", "padded", "bins"]


# ---- changes of a continued run


def tree(**overrides):
    overrides = {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return to_dict(resolve({"model": {"vocab_size": 100, "max_positions": 256}}, overrides))


def test_every_key_of_the_config_is_in_the_table():
    for key, _ in leaves(to_dict(Config())):
        assert any(config_changes.fnmatch.fnmatchcase(key, pattern) for pattern, _, _ in config_changes._TABLE), key


def test_other_micro_batches_are_other_batches_where_the_batch_grows():
    for schedule, kind in (([["4Btok", [16, 0]]], "numerics"), ([["4Btok", 16]], "numerics"), ([], "free")):
        config = {"microbatches": 4, "batch_schedule": schedule}
        assert [c.key for c in getattr(compare(config, config | {"microbatches": 8}), kind)] == ["microbatches"]


def test_every_line_of_the_table_is_about_a_key_that_exists():
    keys = [key for key, _ in leaves(to_dict(Config()))] + ["objective.x"]
    for pattern, _, _ in config_changes._TABLE:
        assert any(config_changes.fnmatch.fnmatchcase(key, pattern) for key in keys), pattern


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (FREE, {"mesh__fsdp": 2, "mesh__data": 4}),
        (FREE, {"microbatches": 2}),
        (FREE, {"log__every_steps": 5, "log__wandb": "project"}),
        (FREE, {"eval__every_steps": 7}),
        (FREE, {"checkpoint__every_steps": 7, "checkpoint__keep_last": 9, "checkpoint__every_minutes": 1.0}),
        (FREE, {"sample__every_steps": 7}),
        (FREE, {"data__prefetch": 7, "data__workers": 1}),
        (FREE, {"steps": 2000}),
        (FREE, {"model__remat": "full", "model__unroll": 1, "model__attention": "dense"}),
        (NUMERICS, {"model__dropout": 0.1, "model__attention": "chunks", "model__query_block": 64}),  # other draws
        (NUMERICS, {"microbatches": 2, "batch_schedule": "[('10', 16)]"}),
        (FREE, {"name": "other"}),
        (NUMERICS, {"optimizer__learning_rate": 1e-4}),
        (NUMERICS, {"optimizer__name": "muon"}),
        (NUMERICS, {"data__skip": "[(40, 50)]"}),
        (NUMERICS, {"data__path": "other.txt"}),
        (NUMERICS, {"seed": 1}),
        (NUMERICS, {"batch_size": 64}),
        (NUMERICS, {"steps": 500}),
        (NUMERICS, {"model__dropout": 0.1}),
        (NUMERICS, {"model__dtype": "bfloat16"}),
        (NUMERICS, {"model__ffn": "relu2"}),
        (NUMERICS, {"model__window": 9}),
        (NUMERICS, {"objective__smoothing": 0.1}),
        (NUMERICS, {"eval__max_batches": 1}),
        (IMPOSSIBLE, {"model__num_layers": 8}),
        (IMPOSSIBLE, {"model__d_model": 64}),
        (IMPOSSIBLE, {"model__num_heads": 2}),
        (IMPOSSIBLE, {"model__vocab_size": 7}),
        (IMPOSSIBLE, {"model__max_positions": 512}),
        (IMPOSSIBLE, {"model__ffn": "swiglu"}),
        (IMPOSSIBLE, {"model__positions": "rope"}),
        (IMPOSSIBLE, {"data__tokenizer__kind": "byte"}),
        (IMPOSSIBLE, {"init__from": "runs/other"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_changes_are_sorted_into_free_numerics_and_impossible(kind, changes):
    found = compare(tree(), tree(**changes))
    classes = {FREE: found.free, NUMERICS: found.numerics, IMPOSSIBLE: found.impossible}
    assert {c.key for c in classes[kind]} == {key.replace("__", ".") for key in changes}
    assert sum(map(len, classes.values())) == len(changes)


def test_a_config_equals_itself_read_back_from_json():
    config = resolve({}, {"data.skip": "[(1, 2)]", "model.pattern": "dense,band"})
    assert not compare(to_dict(loads(dumps(config))), to_dict(config))


def test_context_length_is_impossible_only_where_it_sizes_learned_positions():
    def of(positions, length):
        return to_dict(resolve({}, {"model.positions": positions, "context_length": str(length)}))

    assert compare(of("learned", 8), of("learned", 16)).impossible
    assert compare(of("rope", 8), of("rope", 16)).numerics
    assert compare(tree(context_length=64), tree(context_length=128)).numerics  # the table of 256 stays


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"optimizer__schedule": "cosine", "optimizer__warmup": "5%"}, ["optimizer.warmup", "optimizer.decay"]),
        ({"optimizer__schedule": "cosine", "optimizer__warmup": "10", "optimizer__decay": "500"}, []),
        ({"optimizer__schedule": "constant", "optimizer__warmup": "10"}, []),
        (
            {"optimizer__schedule": "wsd", "optimizer__warmup": "10", "optimizer__cooldown": "50"},
            ["optimizer.cooldown"],
        ),
    ],
)
def test_more_steps_say_what_of_the_schedule_depends_on_them(overrides, named):
    (change,) = compare(tree(**overrides), tree(**overrides, steps=5000)).free
    for name in named:
        assert name in change.note
    assert bool(change.note) == bool(named)


def test_more_steps_are_other_batches_where_the_batch_schedule_has_percents():
    for schedule, kind in (("[('5%', 16)]", "numerics"), ("[('10', 16)]", "free"), ("[('4Btok', (16, 0))]", "free")):
        changes = compare(tree(batch_schedule=schedule), tree(batch_schedule=schedule, steps=5000))
        assert [c.key for c in getattr(changes, kind)] == ["steps"]


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        ({"name": "causal_lm", "reweight": "perplexity"}, "objective.alpha_warmup_steps"),
        ({"name": "causal_lm", "reweight": "perplexity", "alpha_warmup_steps": 9}, ""),
        ({"name": "causal_lm"}, ""),
        ({"name": "masked_lm", "coefs": {"mlm": 1.0, "edit": 0.1}}, "objective.edit_after"),
        ({"name": "replaced_token", "coefs": {"edit": 0.1}, "edit_after": 0.5}, "objective.edit_after"),
        ({"name": "masked_lm", "coefs": {"edit": 0.1}, "edit_after": 0.0}, ""),
        ({"name": "masked_lm"}, ""),
        (
            {"name": "mixture", "tasks": {"a": {"name": "masked_lm", "coefs": {"edit": 1.0}}}},
            "objective.tasks.a.edit_after",
        ),
    ],
)
def test_more_steps_say_what_of_the_objective_depends_on_them(objective, named):
    given = {"objective": objective, "optimizer": {"schedule": "constant", "warmup": "10"}}
    (change,) = compare(to_dict(resolve(given)), to_dict(resolve(given | {"steps": 5000}))).free
    assert change.note == (f"{named} is a part of steps" if named else "")


def test_data_compare_by_what_both_tell_of_their_content():
    def info(sha256="aa", size=100, **corpus):
        corpus = {"sha256": sha256, "files": ["a.txt"], "python": "3.11.1", **corpus}
        return {"texts": {"data": {"store": "here", "corpus": corpus}}, "bytes": {"train": size}}

    moved = info(files=["b.txt"], python="3.11.9", more=1)
    moved["texts"]["data"]["store"] = "there"
    assert compare_data(info(), info()) is None and compare_data(info(), moved) is None
    change = compare_data(info(), info("bb", 120))
    assert change.old != change.new and change.note == "texts.data.corpus.sha256, bytes.train 100 -> 120"
    assert compare_data(info("bb", 120), info()).old == change.new


def test_refusal_shows_the_differences_and_acceptance_lists_them():
    changes = compare(tree(), tree(optimizer__learning_rate=0.5, log__every_steps=3, data__skip="[(40, 50)]"))
    with pytest.raises(UserError) as caught:
        decide(changes, accept=False, path="runs/1")
    message = str(caught.value)
    assert "optimizer.learning_rate: 0.001 -> 0.5" in message and "data.skip: [] -> [[40, 50]]" in message
    assert "--accept-changes" in message and "\n" not in message and "log.every_steps" not in message
    lines = decide(changes, accept=True)
    assert len(lines) == 3 and any("log.every_steps: 1 -> 3" in line for line in lines)
    assert changes.as_history()["data.skip"] == [[], [[40, 50]]]


def test_impossible_changes_are_refused_even_if_accepted():
    with pytest.raises(UserError, match=r"model.d_model: 192 -> 64 \(the width\).*new --workdir"):
        decide(compare(tree(), tree(model__d_model=64)), accept=True)


def test_free_changes_need_no_flag():
    assert decide(compare(tree(), tree(mesh__fsdp=8)), accept=False) == [
        "changed (free) mesh.fsdp: -1 -> 8 (same batches, losses equal up to rounding)"
    ]


def test_a_key_that_one_config_lacks_is_a_difference():
    new = tree()
    new["objective"]["extra"] = None
    assert [c.key for c in compare(tree(), new).numerics] == ["objective.extra"]
    assert classify("no.such.key")[0] == NUMERICS


def test_an_override_of_one_option_keeps_the_objectives_name():
    assert resolve({}, {"objective.smoothing": "0.1"}).objective == {"name": "causal_lm", "smoothing": 0.1}


@pytest.mark.parametrize(
    "then",
    [
        {"steps": 5, "optimizer": {"learning_rate": 0.1, "schedule": "linear"}},
        {"objective": {"name": "causal_lm", "z_loss": 0.1}, "batch_schedule": ((3, 4),)},
        {"objective": {"name": "masked_lm", "coefs": {"mlm": 1.0, "edit": 0.5}, "rate": 0.3}},
        {"objective": {"name": "masked_lm", "coefs": {}}},
    ],
)
def test_what_the_history_tells_of_changes_is_enough_to_undo_them(then):
    old = json.loads(json.dumps(to_dict(resolve(then))))
    now = {"steps": 9, "objective": {"name": "masked_lm", "coefs": {"mlm": 2.0}, "select": "spans"}}
    new = json.loads(json.dumps(to_dict(resolve(now))))
    changes = json.loads(json.dumps(compare(old, new).as_history()))
    for before, after, of in ((old, new, changes), (new, old, {key: [b, a] for key, (a, b) in changes.items()})):
        found = undo(after, of)
        assert flatten(found) == flatten(before) and resolve(found) == resolve(before)
    assert flatten(new) == flatten(json.loads(json.dumps(to_dict(resolve(now)))))  # as it was
