"""`gpt-jax sample` and `gpt_jax.load`: a run's workdir alone gives text, whole characters and the weights it should."""

import dataclasses
import io
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import gpt_jax
from gpt_jax.checkpoint import Checkpointer
from gpt_jax.cli import main
from gpt_jax.config import Config, to_dict
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.generation import generate
from gpt_jax.hooks import strip
from gpt_jax.model import ModelConfig, Transformer
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.sample import continue_prompts, continue_texts, read_prompts
from gpt_jax.sampling import Sampling
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step
from gpt_jax.workdir import Workdir

MODEL = ModelConfig(vocab_size=257, num_layers=1, d_model=16, num_heads=2, max_positions=48)


def save_run(path, optimizer, steps, *, ema=0.0):
    """A run of bytes as the training loop leaves it; returns the state of each checkpoint."""
    objective = CausalLM(Transformer(MODEL))
    mesh = make_mesh(devices=jax.devices()[:1])
    step = build_train_step(objective, optimizer, objective.batch_spec(2, 8), mesh=mesh, ema=ema)
    rng = np.random.default_rng(0)
    state, states = step.init(0), {}
    path.mkdir()
    ByteTokenizer(["eot"]).save(path / "tokenizer")
    config = to_dict(Config(model=MODEL, context_length=8))
    metadata = Workdir(path).checkpoint_metadata(config)
    with Checkpointer(path / "checkpoints", keep_last=9) as checkpointer:
        for number in steps:
            batch = {name: rng.integers(0, 257, (2, 8)).astype(np.int32) for name in ("tokens", "targets")}
            batch["target_weights"] = np.ones((2, 8), np.float32)
            state, _ = step(state, step.put(batch))
            states[number] = jax.tree.map(jnp.copy, state)
            checkpointer.save(number, strip(state), metadata=metadata)
    return states


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "plain"
    return path, save_run(path, optax.adam(0.1), (3, 7), ema=0.5)


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def sample(capsys, path, *flags):
    assert main(["sample", f"--workdir={path}", *flags]) == 0
    return capsys.readouterr().out


def texts(capsys, path, *flags):
    out = sample(capsys, path, "--json", *flags)
    return [row["text"] for row in json.loads(out.splitlines()[-1])["samples"]]


# -- load ----------------------------------------------------------------------------------------------------------


def test_load_gives_the_weights_that_evaluation_reads(run):
    path, states = run
    assert_same(gpt_jax.load(path).params, states[7].ema["model"])
    assert_same(gpt_jax.load(path, weights="raw").params, states[7].params["model"])
    assert_same(gpt_jax.load(path, step=3, weights="raw").params, states[3].params["model"])
    assert_same(gpt_jax.load(path / "checkpoints" / "3").params, states[3].ema["model"])


def test_load_averages_as_a_schedule_free_optimizer_does(tmp_path):
    optimizer = optax.chain(optax.identity(), optax.contrib.schedule_free(optax.sgd(0.3), 0.3, b1=0.7))
    state = save_run(tmp_path / "run", optimizer, (1, 2))[2]
    expected = state.eval_params("average")["model"]
    for weights in ("average", "auto"):
        loaded = gpt_jax.load(tmp_path / "run", weights=weights).params
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loaded, expected)
    raw = gpt_jax.load(tmp_path / "run", weights="raw").params
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), raw, expected))) > 1e-3


def test_load_gives_a_model_and_a_tokenizer_that_fit(run):
    loaded = gpt_jax.load(run[0], step=3, weights="raw")
    assert loaded.step == 3 and loaded.config.model == MODEL and loaded.tokenizer.eot == 256
    ids = loaded.tokenizer.encode("né")[None]
    logits = loaded.model.apply({"params": loaded.params}, ids).logits
    assert logits.shape == (1, 3, 257) and np.isfinite(logits).all()


def test_what_cannot_be_loaded_is_told_in_a_line(run, tmp_path, capsys):
    path, _ = run
    for flags, said in (
        ((f"--workdir={tmp_path / 'absent'}",), "no checkpoint in"),
        ((f"--workdir={path}", "--step=5"), "no checkpoint of step 5 in .*; there are 3, 7"),
        ((f"--workdir={path}", "--weights=average"), "keeps none"),
        ((f"--workdir={path}", "--weights=best"), "weights is 'best'"),
    ):
        assert main(["sample", *flags]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert re.search(said, err), err


# -- the command ---------------------------------------------------------------------------------------------------


def test_texts_depend_on_seed_and_prompt_alone(run, capsys):
    path, _ = run
    alone = texts(capsys, path, "--prompt=ab", "--max-tokens=12", "--seed=5")
    several = texts(capsys, path, "--prompt=abcdefg", "--prompt=ab", "--max-tokens=12", "--seed=4")
    assert several[1] == alone[0] and len(alone[0]) > 3
    other = texts(capsys, path, "--prompt=ab", "--max-tokens=12", "--seed=6")
    assert other != alone
    samples = texts(capsys, path, "--prompt=ab", "--max-tokens=12", "--seed=5", "--num-samples=3")
    assert samples[0] == alone[0] and samples[1] == other[0] and len(set(samples)) == 3


def test_text_on_the_terminal_is_prompt_and_the_text_of_the_json_line(run, capsys):
    path, _ = run
    flags = ("--prompt=ab", "--max-tokens=20", "--temperature=1.5")
    assert sample(capsys, path, *flags) == "ab" + texts(capsys, path, *flags)[0] + "\n"


def test_prompts_come_from_a_file_or_standard_input(run, capsys, tmp_path, monkeypatch):
    path, _ = run
    expected = texts(capsys, path, "--prompt=one", "--prompt=twoo", "--max-tokens=6")
    (tmp_path / "prompts.txt").write_text("one\ntwoo\n")
    assert texts(capsys, path, f"--prompts-file={tmp_path / 'prompts.txt'}", "--max-tokens=6") == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwoo\n"))
    assert texts(capsys, path, "--prompts-file=-", "--max-tokens=6") == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwoo\n"))
    shown = sample(capsys, path, "--interactive", "--max-tokens=6")
    assert shown == f"one{expected[0]}\ntwoo{expected[1]}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"one\n{'x' * 60}\ntwoo\n"))
    assert main(["sample", f"--workdir={path}", "--interactive", "--max-tokens=6"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"one{expected[0]}\ntwoo") and out.count("\n") == 2
    assert re.fullmatch("gpt-jax: a prompt of 61 tokens and max_tokens=6 do not fit the model's 48.*\n", err)


def test_prompts_are_cut_at_line_feeds_alone(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("one\u2028two\x0cthree\r\n\nfour\n".encode())
    assert read_prompts([], str(file)) == ["one\u2028two\x0cthree", "", "four"]
    file.write_text("")
    with pytest.raises(UserError, match=r"prompts\.txt' is empty"):
        read_prompts([], str(file))


def test_typed_lines_have_the_room_that_learned_positions_leave_each(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n" + "x" * 40 + "\n"))
    assert main(["sample", f"--workdir={run[0]}", "--interactive", "--temperature=0"]) == 0
    out, err = capsys.readouterr()
    assert not err
    for line in ("one", "", "x" * 40):
        assert sample(capsys, run[0], f"--prompt={line}", "--temperature=0") in out


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as Python reads in a locale of UTF-8 or of C
@pytest.mark.parametrize("flag", ["--prompts-file=-", "--interactive", "--prompt=\udcff"])
def test_a_prompt_that_is_no_text_is_one_line(run, capsys, monkeypatch, flag, errors):
    given = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", given)
    assert main(["sample", f"--workdir={run[0]}", flag, "--max-tokens=6"]) == 1
    source = "--prompt" if flag.startswith("--prompt=") else "standard input"
    said = f"gpt-jax: {source} is not valid UTF-8 \\(.*\\); a prompt is text\\.\n"
    assert re.fullmatch(said, capsys.readouterr().err)


def test_a_text_ends_before_the_first_stop_string(run):
    loaded = gpt_jax.load(run[0])
    settings = dict(max_tokens=40, sampling=Sampling(2.0), seed=3)
    whole = continue_texts(loaded, ["", "x"], **settings)
    stop = [whole[0][9:11], whole[0][5:7], ""]
    first = min(whole[0].find(s) for s in stop[:2])
    live = io.StringIO()
    cut = continue_texts(loaded, [""], stop=stop, live=live, **settings)
    assert cut == [whole[0][:first]] and live.getvalue() == cut[0] + "\n"
    both = continue_texts(loaded, ["", "x"], stop=stop, **settings)
    ends = [at for s in stop[:2] if (at := whole[1].find(s)) >= 0]
    assert both == [cut[0], whole[1][: min(ends, default=len(whole[1]))]]


class Pieces(io.StringIO):
    """A terminal that keeps each thing written to it, as bytes of UTF-8."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text.encode("utf-8"))  # half a surrogate pair cannot be
        return len(text)


def test_what_is_streamed_is_whole_characters(run):
    loaded = gpt_jax.load(run[0])
    terminal = Pieces()
    random_text = continue_texts(loaded, ["é"], max_tokens=40, sampling=Sampling(3.0), live=terminal)
    written = b"".join(terminal.pieces).decode("utf-8")
    assert written == "é" + random_text[0] + "\n" and "\ufffd" in written  # random bytes break, and are replaced whole
    assert len(terminal.pieces) > 4  # as they come, not at the end


def test_more_than_the_positions_is_an_error_that_names_both(run, capsys):
    assert main(["sample", f"--workdir={run[0]}", "--prompt=abcdefghi", "--max-tokens=40"]) == 1
    assert "prompt of 10 tokens and max_tokens=40 do not fit the model's 48" in capsys.readouterr().err


def test_mistaken_flags_are_told_before_anything_is_read(tmp_path, capsys):
    absent = f"--workdir={tmp_path / 'absent'}"
    for flag, said in (
        ("--temperature=-1", "temperature is -1.0"),
        ("--num-samples=0", "--num-samples is 0"),
        ("--max-tokens=0", "--max-tokens is 0"),
        (f"--prompts-file={tmp_path / 'none.txt'}", "none.txt' cannot be read"),
    ):
        assert main(["sample", absent, flag]) == 1
        assert said in capsys.readouterr().err


def test_without_a_number_of_tokens_a_text_fills_the_learned_positions(run, capsys):
    text = json.loads(sample(capsys, run[0], "--json", "--prompt=0123456789", "--temperature=0").splitlines()[-1])
    assert len(text["samples"][0]["text"]) <= MODEL.max_positions - 11  # EOT and ten bytes


def test_a_run_trained_under_a_prefix_mask_sees_all_of_a_prompt_at_once(run, monkeypatch, capsys):
    plain = gpt_jax.load(run[0])
    config = dataclasses.replace(plain.config, objective={"name": "supervised", "mask": "prefix"})
    model = Transformer(
        dataclasses.replace(MODEL, num_layers=2, init_std=0.5)
    )  # of one layer the last token sees alike
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    plain = dataclasses.replace(plain, model=model, params=nn.unbox(params))
    prefix = dataclasses.replace(plain, config=config)
    prompts = ["a long prompt of bytes", "b", *(f"prompt {i}" for i in range(40))]
    ids = [[256, *prompt.encode()] for prompt in prompts]
    settings = dict(max_tokens=5, temperature=0.0, eot=256)
    expected = generate(plain.model, plain.params, ids, bidirectional_prompt=True, **settings)
    found = [new for _, new in continue_prompts(prefix, prompts, max_tokens=5, sampling=Sampling(0.0))]
    assert found == expected != generate(plain.model, plain.params, ids, **settings)
    monkeypatch.setattr("gpt_jax.sample.load", lambda *_, **__: prefix)
    for flag in ("--beams=2", "--choice=x"):
        assert main(["sample", "--workdir=run", "--prompt=a", flag]) == 1
        assert "trained to see all" in capsys.readouterr().err


def test_many_prompts_go_in_batches_of_like_length(run):
    loaded = gpt_jax.load(run[0])
    prompts = ["abc"[: 1 + i % 3] * (1 + i % 5) for i in range(40)]
    settings = dict(max_tokens=4, sampling=Sampling(1.0), seed=0)
    together = continue_texts(loaded, prompts, **settings)
    for row in (0, 7, 39):
        assert continue_texts(loaded, [prompts[row]], **(settings | {"seed": row})) == [together[row]]
