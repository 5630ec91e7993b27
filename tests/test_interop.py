"""Weights of other codebases without any of them: files, mapping tables and what is refused, by NumPy alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

import gpt_jax
from gpt_jax.cli import main
from gpt_jax.convert import family_of, from_hf, to_hf
from gpt_jax.data.token_ids import IdsTokenizer
from gpt_jax.data.tokenizer import load_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.interop.tensor_files import Tensors, TensorWriter, read_file
from gpt_jax.interop.tokenizer_files import find_tokenizer
from gpt_jax.model import Transformer
from gpt_jax.sharding import path_name

D, H, G, K, F, L, V = 16, 4, 2, 6, 24, 2, 29
LLAMA = dict(
    model_type="llama",
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=L,
    num_attention_heads=H,
    num_key_value_heads=G,
    head_dim=K,
    max_position_embeddings=32,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    eos_token_id=[3, 4],
)


def random_llama(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for layer in range(L):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (D,),
                "post_attention_layernorm": (D,),
                "self_attn.q_proj": (H * K, D),
                "self_attn.k_proj": (G * K, D),
                "self_attn.v_proj": (G * K, D),
                "self_attn.o_proj": (D, H * K),
                "mlp.gate_proj": (F, D),
                "mlp.up_proj": (F, D),
                "mlp.down_proj": (D, F),
            }.items()
        }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_file(path, tensors):
    """The format, written here a second time."""
    header, data = {}, b""
    for name, value in tensors.items():
        code = {"float32": "F32", "bfloat16": "BF16", "int64": "I64"}[str(value.dtype)]
        place = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": code, "shape": list(value.shape), "data_offsets": place}
        data += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def save_llama(folder, tensors=None, files=1, **changes):
    folder.mkdir(exist_ok=True)
    tensors = random_llama() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (LLAMA | changes).items() if v != "absent"}))
    if files == 1:
        write_file(folder / "model.safetensors", tensors)
        return tensors
    places = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        write_file(folder / file, {n: v for n, v in tensors.items() if places[n] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors


def logits_by_hand(tensors, ids):
    """Llama's forward pass of one row, in float64 loops over heads."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale

    def rotate(x):  # [T, K]
        angle = np.arange(len(x))[:, None] * 100.0 ** (-np.arange(K // 2) * 2 / K)
        a, b = x[:, : K // 2], x[:, K // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = t["model.embed_tokens.weight"][ids]
    hidden = np.tril(np.ones((len(ids), len(ids)), bool))
    for layer in range(L):
        p = {n.split(f"layers.{layer}.")[1][:-7]: v for n, v in t.items() if f"layers.{layer}." in n}
        h, outs = norm(x, p["input_layernorm"]), []
        for head in range(H):
            group = head // (H // G)
            q = rotate(h @ p["self_attn.q_proj"][head * K : (head + 1) * K].T)
            k = rotate(h @ p["self_attn.k_proj"][group * K : (group + 1) * K].T)
            v = h @ p["self_attn.v_proj"][group * K : (group + 1) * K].T
            scores = np.where(hidden, q @ k.T / np.sqrt(K), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            outs.append(weights / weights.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(outs, -1) @ p["self_attn.o_proj"].T
        h = norm(x, p["post_attention_layernorm"])
        gate = h @ p["mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["mlp.up_proj"].T)) @ p["mlp.down_proj"].T
    return norm(x, t["model.norm.weight"]) @ t["lm_head.weight"].T


def silent(line):
    pass


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_written_here_is_read_by_the_library_and_back(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed (extra `peer`)")
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(3, 5)), "b": rng.normal(size=(2,)), "empty": np.zeros((0, 4)), "c": np.ones(())}
    for dtype in (np.float32, np.float16, jnp.bfloat16):
        writer = TensorWriter(tmp_path, {name: value.shape for name, value in tensors.items()}, dtype)
        for name in reversed(tensors):
            writer.write(name, tensors[name])
        writer.close()
        theirs, ours = library.load_file(tmp_path / "model.safetensors"), read_file(tmp_path / "model.safetensors")
        assert theirs.keys() == ours.keys() == tensors.keys()
        for name, value in tensors.items():
            assert ours[name].dtype == theirs[name].dtype == dtype
            np.testing.assert_array_equal(theirs[name], value.astype(dtype))
            np.testing.assert_array_equal(ours[name], value.astype(dtype))


def test_a_writer_cuts_files_at_their_size_and_misses_no_tensor(tmp_path):
    shapes = {f"t{i}": (10, i + 1) for i in range(6)}
    writer = TensorWriter(tmp_path, shapes, np.float32, most=400)
    for i, name in enumerate(shapes):
        writer.write(name, np.full(shapes[name], i))
    writer.close()
    assert all(sum(v.nbytes for v in read_file(tmp_path / file).values()) <= 400 for file in writer.files)
    read = Tensors(tmp_path)
    assert {name: value.shape for name, value in read.items()} == shapes
    assert all((read[f"t{i}"] == i).all() for i in range(6))
    with pytest.raises(ValueError, match="never written: t5"):
        half = TensorWriter(tmp_path, shapes, np.float32)
        for name in list(shapes)[:5]:
            half.write(name, 0)
        half.close()


def test_a_damaged_file_is_told_in_a_line(tmp_path):
    path = tmp_path / "model.safetensors"
    write_file(path, {"a": np.ones((4, 4), np.float32)})
    whole = path.read_bytes()
    beyond = whole.replace(b"[0, 64]", b"[8, 72]")
    for data in (b"", whole[:5], whole[:40], whole[:-1], b"\xff" * 8 + whole[8:], beyond):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            Tensors(tmp_path)
    path.write_bytes(whole.replace(b"F32", b"F99"))
    with pytest.raises(UserError, match="tensor 'a' has dtype F99"):
        Tensors(tmp_path)


# -- from theirs ---------------------------------------------------------------------------------------------------


def test_logits_are_those_of_a_forward_pass_by_hand(tmp_path):
    tensors = save_llama(tmp_path / "hf", files=3)
    from_hf(tmp_path / "hf", tmp_path / "run", {"context_length": "8"}, log=silent)
    loaded = gpt_jax.load(tmp_path / "run")
    ids = np.random.default_rng(1).integers(0, V, (1, 11))
    got = jax.jit(loaded.model.apply)({"params": loaded.params}, ids).logits[0]
    expected = logits_by_hand(tensors, ids[0])
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_every_mesh_gets_the_same_weights(tmp_path, mesh, monkeypatch):
    """And each device its own part only: no callback asks for a whole parameter that is sharded."""
    from gpt_jax.interop.mapping import Layout

    asked = []
    gather = Layout.gather

    def watched(self, leaf, index, tensors, dtype):
        out = gather(self, leaf, index, tensors, dtype)
        asked.append((leaf, out.size / np.prod(self.shapes[leaf])))
        return out

    monkeypatch.setattr(Layout, "gather", watched)
    tensors = save_llama(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "run", {f"mesh.{k}": str(v) for k, v in mesh.items()}, log=silent)
    ways = {8: 8, 2: 4}[mesh["fsdp"]]  # over embed (fsdp) and mlp (tensor)
    assert {part for leaf, part in asked if leaf.endswith("mlp/up/kernel")} == {1 / ways}
    params = gpt_jax.load(tmp_path / "run").params
    up = np.asarray(params["layers"]["block_0"]["mlp"]["up"]["kernel"])
    kv = np.asarray(params["layers"]["block_0"]["attention"]["kv"]["kernel"])
    out = np.asarray(params["layers"]["block_0"]["attention"]["out"]["kernel"])
    for layer in range(L):
        name = f"model.layers.{layer}."
        np.testing.assert_array_equal(up[layer, :, 0], tensors[f"{name}mlp.gate_proj.weight"].T)
        np.testing.assert_array_equal(up[layer, :, 1], tensors[f"{name}mlp.up_proj.weight"].T)
        for g in range(G):
            rows = slice(g * K, (g + 1) * K)
            np.testing.assert_array_equal(kv[layer, :, 0, g], tensors[f"{name}self_attn.k_proj.weight"][rows].T)
            np.testing.assert_array_equal(kv[layer, :, 1, g], tensors[f"{name}self_attn.v_proj.weight"][rows].T)
        for h in range(H):
            columns = slice(h * K, (h + 1) * K)
            np.testing.assert_array_equal(out[layer, h], tensors[f"{name}self_attn.o_proj.weight"][:, columns].T)
    embedding = np.asarray(params["embedding"])
    np.testing.assert_array_equal(embedding[:V], tensors["model.embed_tokens.weight"])
    assert not embedding[V:].any() and embedding.shape[0] == 128


def test_an_import_lies_on_the_mesh_of_its_config(tmp_path):
    save_llama(tmp_path / "hf")
    with pytest.raises(UserError, match="mesh.slices is 3, which does not divide the 8 devices"):
        from_hf(tmp_path / "hf", tmp_path / "run", {"mesh.slices": "3"}, log=silent)


def test_bfloat16_and_the_names_of_a_bare_decoder_are_read(tmp_path):
    tensors = {n.removeprefix("model."): v.astype(jnp.bfloat16) for n, v in random_llama().items()}
    del tensors["lm_head.weight"]
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(K // 2, np.float32)
    save_llama(tmp_path / "hf", tensors, tie_word_embeddings=True)
    from_hf(tmp_path / "hf", tmp_path / "run", {"model.param_dtype": "bfloat16"}, log=silent)
    params = gpt_jax.load(tmp_path / "run").params
    assert params["embedding"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(params["embedding"])[:V], tensors["embed_tokens.weight"])


def test_what_is_not_supported_is_refused_by_name(tmp_path, capsys):
    cases = [
        (dict(attention_multiplier=0.5), "attention_multiplier=0.5, a field that is not supported"),
        (dict(hidden_act="relu"), "hidden_act='relu'"),
        (dict(model_type="mamba"), "model_type in config.json is 'mamba'"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_type='yarn'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "beta_fast": 1}), "beta_fast=1"),
        (dict(mlp_bias=True), "mlp_bias=True"),
        (dict(hidden_size="absent"), "no 'hidden_size'"),
        (dict(hidden_size="16"), "hidden_size='16', which is no int"),
        (dict(quantization_config={"bits": 4}), "quantization_config={'bits': 4}"),
        (dict(model_type="qwen3", use_sliding_window=True), "use_sliding_window=True"),
        (dict(model_type="gpt2"), "hidden_size=16, a field that is not supported"),
        (dict(intermediate_size=32), r"shape (24, 16); config.json asks for (32, 16)"),
        (dict(num_hidden_layers=3), "no tensor 'model.layers.2"),
        (dict(num_hidden_layers=1), "'model.layers.1.input_layernorm.weight' has no place"),
        (dict(tie_word_embeddings=True), "'lm_head.weight' is not the embedding"),
    ]
    for changes, said in cases:
        save_llama(tmp_path / "hf", **changes)
        assert main(["convert", f"--from-hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}"]) == 1, changes
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err
        assert not (tmp_path / "run").exists()


def test_a_pickle_is_never_opened(tmp_path, capsys):
    save_llama(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    assert main(["convert", f"--from-hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}"]) == 1
    assert "pytorch_model.bin, which could run code when it is opened, and is never loaded" in capsys.readouterr().err


def test_mistaken_flags_and_folders_are_told(tmp_path, capsys):
    save_llama(tmp_path / "hf")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    hf, run = f"--from-hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}"
    for flags, said in (
        ([run], "either --from-hf DIR or --to-hf DIR"),
        ([f"--from-hf={tmp_path / 'none'}", run], "no config.json"),
        ([hf, run], "holds a run already"),
        ([hf, run, "--config.model.num_layers=4"], "no --config.model.num_layers"),
        ([hf, f"--workdir={tmp_path / 'new'}", "--config.model.dtype=int8"], "dtype is 'int8'"),
        ([f"--to-hf={tmp_path / 'hf'}", run], "not an empty folder"),
        ([f"--to-hf={tmp_path / 'new'}", run, "--dtype=int8"], "--dtype is 'int8'"),
        ([f"--to-hf={tmp_path / 'new'}", run, "--max-file-gb=nan"], "--max-file-gb is nan"),
        ([f"--to-hf={tmp_path / 'new'}", run, "--max-file-gb=inf"], "--max-file-gb is inf"),
        ([f"--to-hf={tmp_path / 'new'}", run, "--max-file-gb=-1"], "--max-file-gb is -1.0"),
    ):
        assert main(["convert", *flags]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": "\xff"}', "tokenizer.json is not valid UTF-8"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "its vocabulary is empty"),
    ],
)
def test_a_damaged_tokenizer_is_told_in_a_line(tmp_path, capsys, content, said):
    save_llama(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes(content)
    assert main(["convert", f"--from-hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}"]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


# -- to theirs -----------------------------------------------------------------------------------------------------


def save_run(path, config, seed=0):
    """A run with random weights as the training loop leaves it."""
    import optax

    from gpt_jax.checkpoint import Checkpointer
    from gpt_jax.config import Config, to_dict
    from gpt_jax.hooks import strip
    from gpt_jax.objectives.causal_lm import CausalLM
    from gpt_jax.sharding import make_mesh
    from gpt_jax.step import build_train_step
    from gpt_jax.workdir import Workdir

    objective = CausalLM(Transformer(config))
    mesh = make_mesh(devices=jax.devices()[:1])
    step = build_train_step(objective, optax.sgd(0.1), objective.batch_spec(2, 8), mesh=mesh)
    path.mkdir()
    IdsTokenizer(config.vocab_size).save(path / "tokenizer")
    metadata = Workdir(path).checkpoint_metadata(to_dict(Config(model=config, context_length=8)))
    state = step.init(seed)
    noise = np.random.default_rng(seed)
    state = dataclasses.replace(
        state, params=jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype(x.dtype), state.params)
    )
    with Checkpointer(path / "checkpoints") as checkpointer:
        checkpointer.save(1, strip(state), metadata=metadata)
    return jax.device_get(state.params["model"])


ROPE = dict(positions="rope", norm="rmsnorm", ffn="swiglu", bias=False, unroll=0)


@pytest.mark.parametrize(
    ("family", "options"),
    {
        "gpt2": {},
        "llama": ROPE | dict(num_kv_heads=2, rope_scaling="llama3", rope_factor=4.0, tie_embeddings=False),
        "qwen3": ROPE | dict(qk_norm=True, head_dim=6, attention_bias=True, num_layers=4, pattern=("dense", "dense")),
    }.items(),
)
def test_there_and_back_is_the_same_run(tmp_path, family, options):
    config = tiny(**options)
    params = save_run(tmp_path / "run", config)
    result = to_hf(tmp_path / "hf", tmp_path / "run", log=silent)
    assert result["family"] == family and not result["tokenizer"]
    from_hf(tmp_path / "hf", tmp_path / "again", {"model.vocab_multiple": "8"}, log=silent)
    again = gpt_jax.load(tmp_path / "again")
    model = again.config.model
    flat = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(again.params)}
    if model.pattern != config.pattern:  # layers are stacked by one
        ours = [jax.tree.map(lambda x, r=r: x[r], params["layers"][f"block_{i}"]) for r in range(2) for i in range(2)]
        params = params | {"layers": {"block_0": jax.tree.map(lambda *x: np.stack(x), *ours)}}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        rows = config.vocab_size if path[0].key in ("embedding", "head") else None
        np.testing.assert_array_equal(flat[path_name(path)][:rows], leaf[:rows], err_msg=path_name(path))
    same = dataclasses.replace(
        model, pattern=config.pattern, unroll=config.unroll, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
    )
    assert same == dataclasses.replace(config, unroll=config.unroll)


def test_weights_come_in_the_asked_dtype_and_without_biases_as_zeros(tmp_path):
    save_run(tmp_path / "run", tiny(bias=False))
    to_hf(tmp_path / "hf", tmp_path / "run", dtype="bfloat16", log=silent)
    tensors = Tensors(tmp_path / "hf")
    assert all(value.dtype == jnp.bfloat16 for value in tensors.values())
    assert not tensors["transformer.h.1.mlp.c_fc.bias"].any() and tensors["transformer.h.1.mlp.c_fc.weight"].any()


def test_a_link_to_an_empty_folder_is_that_folder(tmp_path):
    save_run(tmp_path / "run", tiny(**ROPE))
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    to_hf(tmp_path / "link", tmp_path / "run", log=silent)
    assert (tmp_path / "there" / "config.json").exists() and (tmp_path / "link").is_symlink()


def test_lora_is_merged(tmp_path):
    config = tiny(lora_rank=2, lora_targets="qkv|down")
    params = save_run(tmp_path / "run", config)
    to_hf(tmp_path / "hf", tmp_path / "run", log=silent)
    down = params["layers"]["block_0"]["mlp"]["down"]
    expected = down["kernel"] + config.lora_scale * down["lora_a"] @ down["lora_b"]
    got = Tensors(tmp_path / "hf")
    for layer in range(2):
        np.testing.assert_allclose(got[f"transformer.h.{layer}.mlp.c_proj.weight"], expected[layer], atol=1e-6)


def test_a_variant_that_no_family_has_is_named(tmp_path, capsys):
    for options, said in (
        (dict(talking_heads=True), "talking_heads=True"),
        (ROPE | dict(rope_scaling="ntk", rope_factor=2.0), "llama has no rope_scaling='ntk'"),
        (dict(pattern=("dense", "band")), r"pattern=\('dense', 'band'\)"),
        (dict(embedding_size=8), "embedding_size=8"),
    ):
        with pytest.raises(UserError, match=said):
            family_of(tiny(**options))
    save_run(tmp_path / "run", tiny(positions="alibi"))
    assert main(["convert", f"--to-hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}"]) == 1
    assert "gpt2 has no positions='alibi'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# -- tokenizers ----------------------------------------------------------------------------------------------------


def test_ids_as_text(tmp_path):
    tokenizer = IdsTokenizer(50, ("eot",), 7)
    assert tokenizer.encode(" 3 49\n0").tolist() == [3, 49, 0] and tokenizer.eot == 7 and tokenizer.begin == []
    assert tokenizer.decode([3, 49, 7, 0]) == "3 49 0 " and tokenizer.vocab_size == 50
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.hash == tokenizer.hash and again.eot == 7
    for text in ("a", "50", "-1", "1.5", "٣"):
        with pytest.raises(UserError, match="not a token id below 50"):
            tokenizer.encode(text)


def test_a_tokenizer_json_begins_texts_as_its_model_expects(tmp_path):
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    library.add_special_tokens(["<|begin_of_text|>", "<|the_end|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    found = find_tokenizer(tmp_path, "llama", {"eos_token_id": [3]}, 4)
    assert found.kind == "hf" and found.begin == [2] and found.eot == 3 and found.vocab_size == 4
    found.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eot == 3
    with pytest.raises(UserError, match="has 4 tokens, but config.json has vocab_size=3"):
        find_tokenizer(tmp_path, "llama", {}, 3)


def test_gpt2s_two_files_come_in_and_go_out_as_one(tmp_path):
    import tokenizers

    from gpt_jax.data.byte_level_bpe import byte_characters
    from gpt_jax.interop.tokenizer_files import write_tokenizer

    vocabulary = dict(byte_characters()) | {"th": 256, "the": 257, "\u0120the": 258, "<|endoftext|>": 259}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n\u0120 the\n")
    found = find_tokenizer(tmp_path, "gpt2", {"eos_token_id": 259}, 260)
    assert found.kind == "gpt2" and found.eot == 259 and found.vocab_size == 260
    assert found.encode("the the").tolist() == [257, 258]
    assert find_tokenizer(tmp_path, "llama", {}, 260).kind == "ids"  # the same names, other rules

    out = tmp_path / "out"
    out.mkdir()
    assert write_tokenizer(found, out, 64) == ""
    library = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    text = "the other thé 12 <|endoftext|>"
    assert library.encode("the the, thé 12\n").ids == found.encode("the the, thé 12\n").tolist()
    assert library.encode(text).ids[-1] == 259  # there the name of a special token is one
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    again = find_tokenizer(out, "gpt2", {"eos_token_id": 259}, 260)
    assert again.kind == "hf" and again.eot == 259 and again.encode(text).tolist() == found.encode(text).tolist()


def test_a_run_that_starts_from_another_keeps_its_own_scaling(tmp_path):
    from gpt_jax.config import resolve
    from gpt_jax.inherit import following_init

    scaling = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
    save_llama(tmp_path / "hf", rope_scaling=scaling | dict(original_max_position_embeddings=16))
    from_hf(tmp_path / "hf", tmp_path / "run", log=silent)
    tree = {"init": {"from": str(tmp_path / "run")}}
    follows = following_init(resolve(tree), silent).model
    assert (follows.rope_scaling, follows.rope_factor, follows.rope_original_context) == ("llama3", 4.0, 16)
    own = {"positions": "rope", "rope_scaling": "ntk", "rope_factor": 2.0}
    kept = following_init(resolve(tree | {"model": own}), silent).model
    assert (kept.rope_scaling, kept.rope_factor, kept.rope_base) == ("ntk", 2.0, 100.0)
