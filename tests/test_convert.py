"""`gpt-jax convert` against Hugging Face's transformers: logits both ways, files, and what is refused.

Needs the extra `peer` (torch and transformers); skipped by name without it. The files themselves are tested in
test_interop.py, without it.
"""

import json
import re

import jax
import numpy as np
import pytest

import gpt_jax
from gpt_jax.cli import main
from gpt_jax.convert import from_hf, to_hf

torch = pytest.importorskip("torch", reason="torch is not installed (extra `peer`)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `peer`)")

V, T = 97, 24
_LLAMA = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
_SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GPT2 = dict(vocab_size=V, n_positions=T, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
CASES = {
    "gpt2": ("GPT2", _GPT2),
    "gpt2_untied": ("GPT2", _GPT2 | dict(tie_word_embeddings=False, n_inner=48, activation_function="gelu")),
    "llama": ("Llama", _LLAMA | dict(tie_word_embeddings=False)),
    "llama_tied_grouped_scaled": (
        "Llama",
        _LLAMA | dict(num_key_value_heads=2, rope_parameters=_SCALED, tie_word_embeddings=True, rms_norm_eps=1e-3),
    ),
    "llama_biased_linear": (
        "Llama",
        _LLAMA
        | dict(
            attention_bias=True,
            mlp_bias=True,
            head_dim=12,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
        ),
    ),
    "qwen3": ("Qwen3", _LLAMA | dict(num_key_value_heads=1, head_dim=16, tie_word_embeddings=True)),
    "qwen3_untied_biased": (
        "Qwen3",
        _LLAMA | dict(num_key_value_heads=4, head_dim=8, attention_bias=True, tie_word_embeddings=False),
    ),
}


def peer_of(case):
    name, options = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")(config).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide a mistake in them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ids(rows=2, length=T, seed=0):
    return np.random.default_rng(seed).integers(3, V, (rows, length)).astype(np.int32)


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(ids(), dtype=torch.long)).logits.numpy()


def silent(line):
    pass


@pytest.fixture(scope="module", params=CASES)
def converted(request, tmp_path_factory):
    """(their model, its folder in two files or more, our run of it)."""
    model, path = peer_of(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path / "hf", max_shard_size="40KB")
    from_hf(path / "hf", path / "run", log=silent)
    return model, path / "hf", path / "run"


def test_logits_are_the_same_both_ways(converted, tmp_path):
    model, folder, run = converted
    assert len(list(folder.glob("*.safetensors"))) > 1
    expected = theirs(model)
    loaded = gpt_jax.load(run)
    got = jax.jit(loaded.model.apply)({"params": loaded.params}, ids()).logits
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=1e-4)

    result = to_hf(tmp_path / "back", run, most=30_000, log=silent)
    assert len(result["files"]) > 1
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert type(back) is type(model)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(theirs(back.eval()), expected, atol=1e-5)
    state, again = model.state_dict(), back.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.slow
def test_the_run_samples_evaluates_and_starts_another(tmp_path, capsys):
    model = peer_of("qwen3")
    model.save_pretrained(tmp_path / "hf")
    run = str(tmp_path / "run")
    assert main(["convert", f"--from-hf={tmp_path / 'hf'}", f"--workdir={run}", "--config.context_length=16"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["family"] == "qwen3" and result["tokenizer"] == "ids"
    assert result["parameters"] == sum(p.numel() for p in model.parameters())

    prompt = ids(1, 6)[0].tolist()
    text = " ".join(map(str, prompt))
    assert main(["sample", f"--workdir={run}", f"--prompt={text}", "--max-tokens=8", "--temperature=0", "--json"]) == 0
    sample = json.loads(capsys.readouterr().out.splitlines()[-1])["samples"][0]["text"]
    greedy = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 6:].tolist()
    assert [int(word) for word in sample.split()] == [i for i in greedy if i != 2]

    stream = ids(1, 400, seed=1)[0]
    (tmp_path / "ids.txt").write_text(" ".join(map(str, stream)))
    assert (
        main(
            [
                "eval",
                f"--workdir={run}",
                f"--config.data.path={tmp_path / 'ids.txt'}",
                f"--config.data.valid_path={tmp_path / 'ids.txt'}",
            ]
        )
        == 0
    )
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["valid/tokens"] == 401  # its EOT's successor counts, and the last token's does
    assert 3 < values["valid/loss"] < 20

    again = [
        "train",
        f"--workdir={tmp_path / 'second'}",
        "--config=causal_lm",
        f"--config.init.from={run}",
        f"--config.data.path={tmp_path / 'ids.txt'}",
        "--config.data.valid_fraction=0",
        "--config.steps=1",
        "--config.batch_size=8",
        "--config.context_length=16",
        "--config.log.tensorboard=False",
        "--config.sample.prompts=()",
    ]
    assert main(again) == 0
    out = capsys.readouterr().out
    assert re.search(r"restored 1\d: ", out) and "initialised 0\n" in out


@pytest.mark.slow
def test_a_run_trained_here_says_the_same_there(tmp_path, capsys):
    """Trained for a few steps on bytes, exported with its tokenizer: the same greedy text."""
    for name, flags in {
        "gpt2": ["--config.model.positions=learned"],
        "llama": [
            *("--config.model.positions=rope", "--config.model.norm=rmsnorm", "--config.model.ffn=swiglu"),
            *("--config.model.bias=False", "--config.model.num_kv_heads=2", "--config.model.tie_embeddings=False"),
            *("--config.data.tokenizer.kind=unigram", "--config.data.tokenizer.vocab_size=400"),
        ],
    }.items():
        (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog ran to the cat.\n" * 400)
        run, folder = tmp_path / f"{name}_run", tmp_path / f"{name}_hf"
        train = [
            *("train", "--config=causal_lm", f"--workdir={run}", f"--config.data.path={tmp_path / 'text.txt'}"),
            *("--config.steps=60", "--config.batch_size=8", "--config.context_length=64", "--config.model.d_model=32"),
            *("--config.model.num_layers=2", "--config.model.num_heads=4", "--config.log.tensorboard=False"),
            *("--config.data.tokenizer.kind=byte", "--config.optimizer.learning_rate=0.01"),
            *("--config.eval.max_batches=1", "--config.sample.prompts=()", *flags),
        ]
        assert main(train) == 0
        assert main(["convert", f"--to-hf={folder}", f"--workdir={run}"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["tokenizer"] and result["family"] == name
        sample = ["sample", f"--workdir={run}", "--prompt=the cat", "--max-tokens=20", "--temperature=0", "--json"]
        assert main(sample) == 0
        ours = json.loads(capsys.readouterr().out.splitlines()[-1])["samples"][0]["text"]
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        prompt = [tokenizer.bos_token_id, *tokenizer.encode("the cat", add_special_tokens=False)]
        out = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
        assert tokenizer.decode(out[len(prompt) :], skip_special_tokens=True) == ours
        assert "cat" in ours or "the" in ours
        # And back: the tokenizer comes along.
        from_hf(folder, tmp_path / f"{name}_again", log=silent)
        again = gpt_jax.load(tmp_path / f"{name}_again")
        original = gpt_jax.load(run)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(again.params), jax.tree.leaves(original.params), strict=True
        ):
            rows = original.tokenizer.vocab_size if path[0].key in ("embedding", "head") else None  # then padding
            np.testing.assert_array_equal(a[:rows], b[:rows], err_msg=str(path))
        assert again.tokenizer.encode("the cat").tolist() == original.tokenizer.encode("the cat").tolist()
        assert again.tokenizer.eot == original.tokenizer.eot
