"""Limited context: each token scored once, streams as a dense pass says, rotary positions stretched as papers do."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import VOCAB, apply_of, params_of, tiny, tokens

from gpt_jax.cli import main
from gpt_jax.context import passkey
from gpt_jax.context.figures import buckets
from gpt_jax.context.perplexity import (
    loss_by_budget,
    loss_by_position,
    stream_losses,
    strided_perplexity,
    windows,
)
from gpt_jax.context.streaming import SinkCache, stream, streamed_losses
from gpt_jax.context.truncation import max_pool, split_windows, truncate
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.model import Transformer
from gpt_jax.model.positions import RopeScaling, rope_frequencies, rotate
from gpt_jax.sampling import Sampling

ROPE = tiny(positions="rope", num_kv_heads=2)


def nll(logits, target):
    logits = np.asarray(logits, np.float64)
    return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target]


# -- strided perplexity --------------------------------------------------------------------------------------------


def test_windows_score_every_target_once_with_all_the_context_there_is():
    for targets, size in itertools.product((1, 5, 12, 31), (1, 4, 12)):
        for stride in range(1, size + 1):
            plan = windows(targets, size, stride)
            scored = [t for _, first, end in plan for t in range(first, end)]
            assert scored == list(range(targets)), (targets, size, stride)
            for start, first, end in plan:
                assert end - start <= size and start <= first
                assert start == 0 or (end - start == size and first - start >= size - stride)
    for stride in (0, 5):
        with pytest.raises(UserError, match=f"stride is {stride}"):
            windows(10, 4, stride)


def test_stride_one_equals_brute_force():
    size, text = 5, tokens(rows=1, length=23)[0]
    params = params_of(ROPE)
    got = stream_losses(Transformer(ROPE), params, text, size=size, stride=1, batch_size=4)
    expected = []
    for t in range(len(text) - 1):
        seen = text[max(0, t + 1 - size) : t + 1]
        expected.append(nll(apply_of(ROPE)(params, seen[None]).logits[0, -1], text[t + 1]))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    result = strided_perplexity(Transformer(ROPE), params, text, size=size, stride=1)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_the_number_of_scored_tokens_is_the_same_for_every_stride():
    text = tokens(rows=1, length=30)[0]
    model, params = Transformer(tiny()), params_of(tiny())
    results = {s: strided_perplexity(model, params, text, size=8, stride=s) for s in (1, 3, 5, 8)}
    assert {r["tokens"] for r in results.values()} == {29}
    assert len({round(r["loss"], 6) for r in results.values()}) == 4  # and their contexts differ
    cut = [apply_of(tiny())(params, text[None, a : a + 8]).logits[0] for a in (0, 8, 16)]
    disjoint = [nll(rows[i], text[a + i + 1]) for a, rows in zip((0, 8, 16), cut, strict=True) for i in range(8)]
    got = stream_losses(model, params, text, size=8, stride=8)
    np.testing.assert_allclose(got[:24], disjoint, atol=1e-4)


@pytest.mark.parametrize("stride", [-1, 0, 9])
@pytest.mark.parametrize("length", [5, 30])
def test_a_stride_beyond_the_window_is_refused_however_long_the_text(stride, length):
    text = tokens(rows=1, length=length)[0]
    with pytest.raises(UserError, match=f"stride is {stride}; it must be .* at most the window's size, 8"):
        strided_perplexity(Transformer(tiny()), None, text, size=8, stride=stride)


def test_learned_positions_refuse_what_lies_beyond_them():
    model, params, text = Transformer(tiny()), params_of(tiny()), tokens(rows=1, length=40)[0]
    for call in (
        lambda: strided_perplexity(model, params, text, size=13, stride=13),
        lambda: loss_by_position(model, params, text, length=13),
        lambda: loss_by_budget(model, params, text, budgets=[4, 13]),
        lambda: passkey.retrieval(model, params, ByteTokenizer(), lengths=[13], depths=[0.5]),
    ):
        with pytest.raises(UserError, match="a context of 13 tokens is asked for, but the model has 12 learned"):
            call()
    strided_perplexity(model, params, text, size=12, stride=12)
    with pytest.raises(UserError, match="12 learned positions cannot stream beyond them"):
        SinkCache.empty(tiny(), 1, 8)
    with pytest.raises(UserError, match="a text of 1 tokens has nothing to predict"):
        strided_perplexity(model, params, text[:1], size=12, stride=12)


def test_loss_by_position_and_by_budget_are_what_they_say():
    text = tokens(rows=1, length=38)[0]
    model, params = Transformer(ROPE), params_of(ROPE)
    rows = np.stack([text[i : i + 13] for i in (0, 12, 24)])
    logits = np.asarray(apply_of(ROPE)(params, rows[:, :-1]).logits)
    each = np.array([[nll(logits[b, t], rows[b, t + 1]) for t in range(12)] for b in range(3)])
    got = loss_by_position(model, params, text, length=12, batch_size=2)
    np.testing.assert_allclose(got["loss"], each.mean(0), atol=1e-4)
    np.testing.assert_allclose(got["error"], each.std(0) / math.sqrt(3), atol=1e-4)
    assert got["rows"] == 3

    by_budget = loss_by_budget(model, params, text, budgets=[1, 6], targets=5, batch_size=4)
    each = {}
    ends = [6, 14, 22, 30, 37]  # evenly spaced from 6, the first with six tokens before it, to the last
    for budget, row in by_budget.items():
        seen = np.stack([text[end - budget : end] for end in np.linspace(6, 37, 5).astype(int)])
        last = np.asarray(apply_of(ROPE)(params, seen).logits)[:, -1]
        values = [nll(x, text[end]) for x, end in zip(last, np.linspace(6, 37, 5).astype(int), strict=True)]
        assert row["loss"] == pytest.approx(np.mean(values), abs=1e-4) and row["tokens"] == len(ends)
        each[budget] = np.array(values)
    apart = each[1] - each[6]
    assert by_budget[1]["difference"] == pytest.approx(apart.mean(), abs=1e-4) and by_budget[6]["difference"] == 0
    assert by_budget[1]["difference_error"] == pytest.approx(apart.std() / math.sqrt(5), abs=1e-4)


# -- truncation ----------------------------------------------------------------------------------------------------


def test_truncation_keeps_what_it_says():
    ids = list(range(10))
    assert truncate(ids, 4, "left") == [6, 7, 8, 9]
    assert truncate(ids, 4, "right") == [0, 1, 2, 3]
    assert truncate(ids, 4, "head_tail") == [0, 1, 8, 9]
    assert truncate(ids, 4, "head_tail", head=0.25) == [0, 7, 8, 9]
    for policy, budget in itertools.product(("left", "right", "head_tail"), (0, 9, 10, 99)):
        assert len(truncate(ids, budget, policy)) == min(10, budget)
        assert truncate(ids, max(budget, 10), policy) == ids
    with pytest.raises(UserError, match=r"the truncation policy is 'lef' \(did you mean 'left'\?\)"):
        truncate(ids, 4, "lef")
    with pytest.raises(UserError, match="the budget is -1"):
        truncate(ids, -1, "left")


def test_windows_cover_a_text_and_pool_to_the_largest_score():
    assert split_windows(range(7), 3) == [[0, 1, 2], [3, 4, 5], [4, 5, 6]]
    assert split_windows(range(7), 3, 2) == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert split_windows(range(3), 3) == [[0, 1, 2]] and split_windows([], 3) == [[]]
    calls = []

    def score(rows):
        calls.append(len(rows))
        return [[max(row, default=-1), -min(row, default=1)] for row in rows]

    texts = [[3, 1, 4, 1, 5, 9, 2, 6], [7], []]
    np.testing.assert_array_equal(max_pool(score, texts, 3), [[9, -1], [7, -7], [-1, -1]])
    assert calls == [5]
    with pytest.raises(UserError, match="there are no texts"):
        max_pool(score, [], 3)


# -- streams -------------------------------------------------------------------------------------------------------


def streamed_by_hand(params, config, ids, size, sinks):
    """Logits [T, V]: a dense pass over all tokens, the mask and the positions within the cache written out."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    H, G, K, T = config.num_heads, config.kv_heads, config.key_size, len(ids)
    x = p["embedding"][ids]
    for layer in range(config.num_layers):
        w = jax.tree.map(lambda a, r=layer: a[r], p["layers"]["block_0"])
        a, y = w["attention"], oracle.normalise(x, w["attention_norm"], config.norm)
        if G == H:
            qkv = np.einsum("td,dchk->tchk", y, a["qkv"]["kernel"]) + a["qkv"]["bias"]
            q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        else:
            q = np.einsum("td,dhk->thk", y, a["q"]["kernel"]) + a["q"]["bias"]
            kv = np.einsum("td,dcgk->tcgk", y, a["kv"]["kernel"]) + a["kv"]["bias"]
            k, v = kv[:, 0], kv[:, 1]
        out = np.zeros((T, H, K))
        for t in range(T):
            seen = list(range(t + 1))
            if t >= size:
                seen = [*range(sinks), *range(t - (size - sinks) + 1, t + 1)]
            place = np.arange(len(seen))  # positions are those within the cache
            mine = q[t][None, None]
            keys = k[seen]
            if config.positions == "rope":
                mine = oracle.rotary(mine, [[len(seen) - 1]], config.rope_base)
                keys = oracle.rotary(keys[None], [place], config.rope_base)[0]
            for h in range(H):
                scores = keys[:, h // (H // G)] @ mine[0, 0, h] / math.sqrt(K)
                if config.positions == "alibi":
                    scores = scores - oracle.slopes(H)[h] * (len(seen) - 1 - place)
                out[t, h] = oracle.softmax(scores) @ v[seen, h // (H // G)]
        x = x + np.einsum("thk,hkd->td", out, a["out"]["kernel"]) + a["out"]["bias"]
        m, y = w["mlp"], oracle.normalise(x, w["mlp_norm"], config.norm)
        h = oracle.ACTIVATIONS[config.ffn](y @ m["up"]["kernel"] + m["up"]["bias"])
        x = x + h @ m["down"]["kernel"] + m["down"]["bias"]
    return oracle.normalise(x, p["final_norm"], config.norm) @ p["embedding"][: config.vocab_size].T


@pytest.mark.parametrize(
    ("options", "sinks"),
    [(dict(positions="rope", num_kv_heads=2), 2), (dict(positions="rope"), 0), (dict(positions="alibi"), 3)],
)
def test_a_stream_is_the_dense_pass_under_its_mask(options, sinks):
    config, size = tiny(**options), 7
    params = params_of(config)
    rows = tokens(rows=2, length=26)
    got = streamed_losses(Transformer(config), params, rows, size=size, sinks=sinks)
    for row, losses in zip(rows, got, strict=True):
        logits = streamed_by_hand(params, config, row[:-1], size, sinks)
        expected = [nll(x, target) for x, target in zip(logits, row[1:], strict=True)]
        np.testing.assert_allclose(losses, expected, atol=1e-4)


def test_until_the_cache_is_full_a_stream_is_the_model():
    rows = tokens(rows=2, length=11)
    logits = np.asarray(apply_of(ROPE)(params_of(ROPE), rows[:, :-1]).logits)
    got = streamed_losses(Transformer(ROPE), params_of(ROPE), rows, size=10)
    expected = [[nll(logits[b, t], rows[b, t + 1]) for t in range(10)] for b in range(2)]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_streaming_goes_on_past_the_context_and_is_greedy_on_the_dense_logits():
    config = tiny(positions="rope")
    model, params, prompt = Transformer(config), params_of(config), tokens(rows=1, length=9)[0].tolist()
    settings = dict(max_tokens=20, size=6, sinks=2, sampling=Sampling(0.0), chunk=8)
    pieces = list(stream(model, params, prompt, **settings))
    assert [len(piece) for piece in pieces] == [8, 8, 4]
    new = [i for piece in pieces for i in piece]
    logits = streamed_by_hand(params, config, np.array(prompt + new[:-1]), 6, 2)[len(prompt) - 1 :]
    np.testing.assert_allclose(logits[np.arange(20), new], logits.max(-1), atol=1e-4)
    end = new[5]
    stopped = [i for piece in stream(model, params, prompt, **settings, eot=end) for i in piece]
    assert stopped == new[: new.index(end)]
    drawn = [list(stream(model, params, prompt, **(settings | {"sampling": None}), seed=s)) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_streams_repetition_penalty_is_on_the_tokens_of_prompt_and_stream():
    config = tiny(positions="rope")
    model, params, prompt = Transformer(config), params_of(config), tokens(rows=1, length=9)[0].tolist()
    settings = dict(max_tokens=20, size=6, sinks=2, sampling=Sampling(0.0, repetition_penalty=1.5), chunk=8)
    new = [i for piece in stream(model, params, prompt, **settings) for i in piece]
    logits = streamed_by_hand(params, config, np.array(prompt + new[:-1]), 6, 2)[len(prompt) - 1 :].copy()
    for step, row in enumerate(logits):
        seen = sorted({*prompt, *new[:step]})
        row[seen] = np.where(row[seen] > 0, row[seen] / 1.5, row[seen] * 1.5)
    np.testing.assert_allclose(logits[np.arange(20), new], logits.max(-1), atol=1e-4)
    plain = stream(model, params, prompt, **settings | {"sampling": Sampling(0.0)})
    assert new != [i for piece in plain for i in piece]


def test_a_stream_refuses_what_it_cannot_do():
    model, params = Transformer(ROPE), params_of(ROPE)
    for prompt, options, said in (
        ([], {}, "a stream needs a prompt"),
        ([VOCAB], {}, f"token {VOCAB} is not in the model's vocabulary"),
        ([1], dict(sinks=6), "sinks is 6; it must be 0 or more and less than the cache's size, 6"),
    ):
        with pytest.raises(UserError, match=said):
            next(stream(model, params, prompt, max_tokens=4, size=6, **options))


# -- rotary positions beyond the context ---------------------------------------------------------------------------


def test_interpolated_positions_are_those_of_the_model_at_a_fraction():
    """PI(s m) = RoPE(m), and products still depend on the distance only."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 2, 16)), jnp.float32)
    at = jnp.arange(6)
    stretched = rotate(x, 4 * at, 100.0, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(stretched, rotate(x, at, 100.0), atol=1e-5)
    assert np.abs(rotate(x, at, 100.0, RopeScaling("linear", 4.0)) - stretched).max() > 0.1
    for scaling in (RopeScaling("linear", 3.0), RopeScaling("ntk", 3.0), RopeScaling("llama3", 3.0, original=64)):
        q, k = x[:, :1, :1], x[:, 1:2, :1]

        def product(m, n, q=q, k=k, scaling=scaling):
            a, b = (rotate(y, jnp.array([p]), 100.0, scaling) for y, p in ((q, m), (k, n)))
            return float(jnp.vdot(a, b))

        assert product(9, 4) == pytest.approx(product(59, 54), abs=1e-4)
        assert abs(product(9, 4) - product(9, 0)) > 1e-3


def test_frequencies_are_those_of_the_formulas():
    K, base, s = 16, 10000.0, 8.0
    plain = np.array([base ** (-2 * i / K) for i in range(K // 2)])
    np.testing.assert_allclose(rope_frequencies(K, base), plain, rtol=1e-5)
    np.testing.assert_allclose(rope_frequencies(K, base, RopeScaling("linear", s)), plain / s, rtol=1e-5)
    ntk = rope_frequencies(K, base, RopeScaling("ntk", s))
    larger = base * s ** (K / (K - 2))
    np.testing.assert_allclose(ntk, [larger ** (-2 * i / K) for i in range(K // 2)], rtol=1e-5)
    assert ntk[0] == 1 and ntk[-1] == pytest.approx(plain[-1] / s, rel=1e-5)  # the lowest is interpolated, no other

    llama = []
    for frequency in plain:  # the rule of Llama 3.1, case by case
        wave = 2 * math.pi / frequency
        if wave < 512 / 4.0:
            llama.append(frequency)
        elif wave > 512 / 1.0:
            llama.append(frequency / s)
        else:
            smooth = (512 / wave - 1.0) / (4.0 - 1.0)
            llama.append((1 - smooth) * frequency / s + smooth * frequency)
    got = rope_frequencies(K, base, RopeScaling("llama3", s, 1.0, 4.0, 512))
    np.testing.assert_allclose(got, llama, rtol=1e-5)
    assert got[0] == plain[0] and got[-1] == pytest.approx(plain[-1] / s, rel=1e-5)
    assert any(a != b and a != b / s for a, b in zip(llama, plain, strict=True))


def test_a_model_takes_the_scaling_of_its_config():
    scaled = dataclasses.replace(ROPE, rope_scaling="linear", rope_factor=2.0)
    ids = tokens(rows=2, length=8)
    got = apply_of(scaled)(params_of(ROPE), ids, positions=2 * jnp.arange(8)).logits
    np.testing.assert_allclose(got, apply_of(ROPE)(params_of(ROPE), ids).logits, atol=1e-4)
    assert np.abs(got - apply_of(scaled)(params_of(ROPE), ids).logits).max() > 1e-2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(rope_scaling="yarn"), "rope_scaling is 'yarn'"),
        (dict(rope_scaling="ntk", positions="alibi"), "rope_scaling is 'ntk', but positions is 'alibi'"),
        (dict(rope_factor=0.5), "rope_factor is 0.5"),
        (dict(rope_low_frequency=4.0), "rope_low_frequency=4.0"),
    ],
)
def test_a_scaling_that_makes_no_sense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        tiny(**{"positions": "rope"} | options)


def test_biases_of_attention_alone():
    from gpt_jax.model import count_parameters

    config = tiny(bias=False, attention_bias=True, num_kv_heads=2)
    names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params_of(config))}
    assert {n.split("'")[-4] for n in names if "'bias'" in n} == {"q", "kv", "out"}
    padded = (config.padded_vocab - config.vocab_size) * config.d_model
    assert count_parameters(config) == sum(x.size for x in jax.tree.leaves(params_of(config))) - padded
    ids = tokens()
    np.testing.assert_allclose(
        apply_of(config)(params_of(config), ids).logits, oracle.forward(params_of(config), config, ids), atol=1e-4
    )


# -- passkeys ------------------------------------------------------------------------------------------------------


def test_a_passkey_lies_where_it_is_said_to():
    tokenizer = ByteTokenizer(["eot"])
    room = 300 - 1 - len(passkey.NEEDLE.format(key="01234")) - len(passkey.QUESTION)
    for depth in (0.0, 0.5, 1.0):
        ids, answer = passkey.prompt(tokenizer, "01234", 300, depth)
        text = tokenizer.decode(ids)
        assert len(ids) == 300 and ids[0] == tokenizer.eot and tokenizer.decode(answer) == " 01234"
        assert text.index("The pass key is 01234. Remember it.") == round(depth * room)
        assert text.endswith("What is the pass key? The pass key is") and text.count("01234") == 2
    with pytest.raises(UserError, match="a passkey text of 50 tokens has no room for 97"):
        passkey.prompt(tokenizer, "01234", 50, 0.5)


def test_retrieval_counts_keys_and_tokens(monkeypatch):
    """A reader that finds the first needle only if the text is short, and always errs in the last digit at depth 1."""

    def reader(model, params, rows, answer):
        right = np.ones((len(rows), answer), bool)
        for row, ids in enumerate(rows):
            text = bytes(ids[1:-answer].astype(np.uint8)).decode()
            at, key = text.index("key is ") + 7, bytes(ids[-5:].astype(np.uint8)).decode()
            assert text[at : at + 5] == key
            right[row] = len(text) < 200
            right[row, -1] &= text.index("What") - at > 80
        return right

    monkeypatch.setattr(passkey, "_right", reader)
    result = passkey.retrieval(
        Transformer(ROPE), {}, ByteTokenizer(["eot"]), lengths=[180, 240], depths=[0.0, 1.0], trials=3
    )
    assert result["exact"] == [[1.0, 0.0], [0.0, 0.0]]
    np.testing.assert_allclose(result["tokens"], [[1.0, 0.0], [5 / 6, 0.0]])


def test_an_answer_is_right_where_its_token_is_the_most_likely():
    rows = tokens(rows=4, length=12)
    logits = np.asarray(apply_of(ROPE)(params_of(ROPE), rows[:, :-1]).logits)
    rows[0, -3:] = logits[0, -3:].argmax(-1)  # the first is right once its own context is
    logits = np.asarray(apply_of(ROPE)(params_of(ROPE), rows[:, :-1]).logits)
    got = np.asarray(passkey._right(Transformer(ROPE), params_of(ROPE), rows, 3))
    np.testing.assert_array_equal(got, logits[:, -3:].argmax(-1) == rows[:, -3:])
    assert got[0, 0] and not got.all()


def test_documents_teach_the_question():
    texts = list(passkey.documents(20, (150, 260), seed=1))
    assert len({text[-8:] for text in texts}) == 20
    for text in texts:
        key = text[-7:-2]
        assert text.endswith(f"The pass key is {key}.\n") and text.count(key) == 3 and 150 <= len(text) <= 260


# -- the command ---------------------------------------------------------------------------------------------------


def test_pieces_of_a_curve_cover_it():
    for length in (1, 7, 8, 100, 1000):
        pieces = buckets(length)
        assert pieces[0][0] == 0 and pieces[-1][1] == length
        assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))


@pytest.mark.slow
def test_the_command_writes_figures_and_their_numbers(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(passkey.documents(60, (150, 200))))
    run = tmp_path / "run"
    train = [
        *("train", "--config=causal_lm", f"--workdir={run}", f"--config.data.path={tmp_path / 'text.txt'}"),
        *("--config.data.valid_fraction=0.3", "--config.steps=2", "--config.batch_size=8"),
        *("--config.context_length=160", "--config.model.d_model=16", "--config.model.num_layers=1"),
        *("--config.model.num_heads=2", "--config.log.tensorboard=False", "--config.data.tokenizer.kind=byte"),
        *("--config.eval.max_batches=1", "--config.sample.prompts=()", "--config.model.positions=rope"),
    ]
    assert main(train) == 0
    capsys.readouterr()
    assert main(["context", f"--workdir={run}", "--tokens=2800", "--longest=2", "--trials=1", "--sinks=2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = run / "context"
    for name in ("strided", "position", "budget", "streaming", "passkey"):
        assert (folder / f"{name}.png").read_bytes()[1:4] == b"PNG"
    rows = json.loads((folder / "strided.json").read_text())
    assert {row["tokens"] for row in rows} == {2799} and [row["stride"] for row in rows] == [10, 20, 40, 80, 160]
    curves = json.loads((folder / "position.json").read_text())["curves"]
    assert len(curves) == 3 and all(len(curve["loss"]) == 320 for curve in curves.values())
    assert result["passkey/exact_320"] == 0 and result["strided/perplexity_stride_160"] > 1
    for flags, said in (
        (["--figures=strode"], r"--figures is 'strode'"),
        (["--tokens=1"], "--tokens is 1"),
        (["--longest=nan"], "--longest is nan"),
        (["--longest=inf"], "--longest is inf"),
        (["--sinks=160"], "--sinks is 160"),
        (["--step=9"], "no checkpoint of step 9"),
    ):
        assert main(["context", f"--workdir={run}", *flags]) == 1
        assert said in capsys.readouterr().err
