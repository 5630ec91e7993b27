"""gpt-jax inspect: every measure against a case whose answer is known."""

import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import params_of, tiny, tokens

from gpt_jax import cli
from gpt_jax.errors import UserError
from gpt_jax.inspect import compare, forward, heads
from gpt_jax.inspect.command import sees_left_only
from gpt_jax.inspect.forward import subject_of
from gpt_jax.model import Transformer
from gpt_jax.objectives.base import Setting, build_objective

GPT2 = tiny()
CONFIGS = {
    "gpt2": GPT2,
    "modern": tiny(positions="rope", norm="rmsnorm", qk_norm=True, ffn="swiglu", num_kv_heads=2, bias=False, unroll=0),
    "alternating, unequal": tiny(pattern=("dense", "band"), window=4, head_dims=(2, 2, 4, 8), embedding_size=8),
    "capped": tiny(logit_softcap=3.0, tie_embeddings=False),
}


def subject(name="gpt2", **options):
    return subject_of(Transformer(CONFIGS[name]), params_of(CONFIGS[name]), **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_lens_at_the_last_layer_is_the_models_answer(name):
    model, text = subject(name), tokens(1)[0]
    lens = forward.logit_lens(model, text, top=37)
    logits = np.asarray(model(text[None]).logits[0], np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.take_along_axis(p, lens["ids"][-1], -1), lens["probabilities"][-1], atol=1e-5)
    np.testing.assert_allclose(lens["target_probabilities"][-1], p[np.arange(11), text[1:]], atol=1e-5)
    np.testing.assert_allclose(lens["entropies"][-1], -(p * np.log(p)).sum(-1), atol=1e-4)
    assert lens["ids"].shape == (3, 12, 37)
    assert np.abs(lens["probabilities"][0] - lens["probabilities"][-1]).max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "modern", "alternating, unequal"])
def test_the_parts_of_a_logit_sum_to_it_and_each_is_what_its_absence_costs_before_the_norm(name):
    model, text = subject(name), tokens(1)[0]
    parts = forward.attribute_logit(model, text, 7, 5)
    logit = float(model(text[None]).logits[0, 7, 5])
    assert parts["logit"] == pytest.approx(logit, abs=1e-5)
    found = sum(map(sum, parts["heads"])) + sum(parts["attention_bias"]) + sum(parts["mlp"]) + parts["embedding"]
    assert found + parts["rest"] == pytest.approx(logit, abs=1e-4)
    config = CONFIGS[name]
    if not config.bias:
        assert parts["rest"] == pytest.approx(0.0, abs=1e-4)  # so the parts alone are the logit
        assert np.abs(parts["attention_bias"]).max() < 1e-5
    elif config.embed_size == config.d_model:
        rest = np.asarray(model.params["final_norm"]["bias"]) @ np.asarray(model.params["embedding"][5])
        assert parts["rest"] == pytest.approx(float(rest), abs=1e-4)
    assert len(parts["heads"]) == 2 and len(parts["heads"][0]) == 4


def induction_weights(T, period, start, B=1):
    """Weights of a head that looks where induction says, and of one that looks everywhere alike: [1, B, 2, T, T]."""
    out = np.zeros((1, B, 2, T, T))
    for row in range(B):
        n, a = period[row], start[row]
        for i in range(T):
            out[0, row, 1, i, : i + 1] = 1 / (i + 1)
            at = i - n + 1 if a + n <= i < a + 2 * n else 0
            out[0, row, 0, i, at] = 1.0
    return out


def test_a_hand_built_induction_head_scores_one_and_a_uniform_one_next_to_nothing():
    text, period, start = heads.repeated_tokens(np.random.default_rng(0), 40, 1000, 64)
    scores = heads.pattern_scores(induction_weights(64, period, start, 40), period, start)
    assert scores["induction"][0, 0] == 1.0 and scores["induction"][0, 1] < 0.05
    assert scores["duplicate"][0, 0] == 0.0 and scores["previous"][0, 0] < 0.1
    for row in range(40):
        n, a = period[row], start[row]
        np.testing.assert_array_equal(text[row, a : a + n], text[row, a + n : a + 2 * n])
    assert len(set(period)) > 10 and len(set(start)) > 10


def test_heads_that_look_a_fixed_distance_back_do_not_pass_for_induction():
    text, period, start = heads.repeated_tokens(np.random.default_rng(1), 200, 1000, 64)
    del text
    worst = 0.0
    for distance in range(40):
        weights = np.zeros((1, 200, 1, 64, 64), np.float32)
        i = np.arange(64)
        weights[0, :, 0, i, np.maximum(i - distance, 0)] = 1.0
        scores = heads.pattern_scores(weights, period, start)
        worst = max(worst, scores["induction"][0, 0])
        if distance == 1:
            assert scores["previous"][0, 0] == 1.0
    assert worst < 0.1


def test_reach_is_the_mean_distance_of_what_is_looked_at():
    model, batch = subject(), tokens(3)
    weights = np.stack([forward.attention_maps(model, row) for row in batch], axis=1)
    expected = np.zeros((2, 4))
    beyond = np.zeros((2, 4))
    for i in range(12):
        for j in range(i + 1):
            expected += weights[:, :, :, i, j].mean(1) * (i - j) / 12
            beyond += weights[:, :, :, i, j].mean(1) * (i - j >= 5) / 12
    np.testing.assert_allclose(heads.reach(model, batch), expected, atol=1e-4)
    np.testing.assert_allclose(heads.reach(model, batch, window=5), beyond, atol=1e-5)


def test_importance_is_the_mean_slope_of_the_loss_by_finite_differences():
    model, batch = subject(), tokens(3)
    got = heads.head_importance(model, batch)
    expected = np.zeros((2, 4))
    for row in range(3):
        for layer in range(2):
            for head in range(4):
                ends = []
                for sign in (1, -1):
                    gates = jnp.ones((2, 4)).at[layer, head].add(sign * 1e-2)
                    ends.append(heads.gated_loss(model, batch[row : row + 1], gates))
                expected[layer, head] += abs(ends[0] - ends[1]) / 2e-2 / 3
    np.testing.assert_allclose(got, expected, rtol=0.02, atol=2e-4)


def test_ablations_are_the_losses_of_a_model_without_the_head():
    model, batch = subject(), tokens(3)
    whole = float(np.mean(forward.token_losses(model(batch).logits, batch)))
    without = jax.tree.map(np.array, model.params)
    without["layers"]["block_0"]["attention"]["out"]["kernel"][1, 2] = 0.0
    loss = float(np.mean(forward.token_losses(subject_of(model.model, without)(batch).logits, batch)))
    zero = heads.ablate_heads(model, batch, "zero")
    assert zero[1, 2] == pytest.approx(loss - whole, abs=1e-5) and abs(loss - whole) > 1e-4
    mean = heads.ablate_heads(model, batch, "mean")
    assert mean.shape == (2, 4) and np.abs(mean - zero).max() > 1e-4


def test_patching_nothing_recovers_nothing_and_everything_all():
    model = subject()
    clean, corrupt = tokens(1, seed=3)[0], tokens(1, seed=4)[0]
    answers = (1, 2)
    nothing = np.zeros((2, 12), bool)
    assert compare.recovery(model, clean, corrupt, nothing, answers) == 0.0
    for layer in range(2):
        all_of_a_layer = nothing.copy()
        all_of_a_layer[layer] = True
        assert compare.recovery(model, clean, corrupt, all_of_a_layer, answers) == pytest.approx(1.0, abs=1e-4)


def test_patching_finds_the_place_where_prompts_differ():
    model, clean = subject(), tokens(1, seed=3)[0]
    corrupt = clean.copy()
    corrupt[4] = (corrupt[4] + 1) % 37
    found = compare.patch(model, clean, corrupt, answers=(1, 2))
    into_first = found["residual"][0]
    assert into_first[4] == pytest.approx(1.0, abs=1e-4)  # the only token that differs
    np.testing.assert_allclose(np.delete(into_first, 4), 0.0, atol=1e-4)
    np.testing.assert_allclose(found["residual"][1][:4], 0.0, atol=1e-4)  # causality
    assert found["heads"].shape == (2, 4)
    with pytest.raises(UserError, match="equally many"):
        compare.patch(model, clean, corrupt[:-1])
    with pytest.raises(UserError, match="same answer"):
        compare.patch(model, clean, clean)


def test_losses_of_tokens_under_two_models():
    model, text = subject(), tokens(1)[0]
    other = subject_of(model.model, jax.tree.map(lambda x: 0 * x, model.params))
    found = compare.loss_difference(model, other, text)
    np.testing.assert_allclose(found["other"], np.log(37), rtol=1e-5)
    logp = jax.nn.log_softmax(model(text[None]).logits[0])
    np.testing.assert_allclose(found["losses"], [-logp[t, text[t + 1]] for t in range(11)], atol=1e-5)
    np.testing.assert_allclose(found["difference"], found["losses"] - found["other"], atol=1e-6)


def test_attention_of_a_model_that_sees_both_sides():
    weights = forward.attention_maps(subject(causal=False), tokens(1)[0])
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    assert (weights > 0).all()


MASKED = {"name": "masked_lm"}


@pytest.mark.parametrize(
    ("spec", "generates", "causal"),
    [
        ({"name": "causal_lm"}, True, True),
        (MASKED, False, False),
        ({"name": "tag"}, False, False),
        ({"name": "tag", "mask": "causal"}, False, True),
        ({"name": "span_qa"}, False, False),
        ({"name": "multiple_choice"}, False, True),
        ({"name": "classify"}, False, True),
        ({"name": "classify", "mask": "bidirectional"}, False, False),
        ({"name": "classify", "coefs": {"classify": 1.0, "lm": 0.5}}, True, True),
        ({"name": "classify", "coefs": {"classify": 1.0, "lm": 0.0}}, False, True),
        ({"name": "mixture", "tasks": {"a": MASKED, "b": MASKED | {"rate": 0.3}}}, False, False),
        ({"name": "mixture", "tasks": {"a": MASKED, "b": {"name": "causal_lm"}}}, True, True),
        ({"name": "mixture", "tasks": {"a": MASKED, "b": {"name": "classify"}}}, False, True),
        ({"name": "sum", "terms": {"a": MASKED}}, False, False),
        ({"name": "sum", "terms": {"a": MASKED, "b": {"name": "causal_lm"}}}, True, True),
    ],
)
def test_an_objective_says_whether_it_continues_a_text_and_what_its_tokens_see(spec, generates, causal):
    objective = build_objective(spec, Setting(tiny(), {"mask": 1}, 10, 8, 12))
    assert (objective.generates, sees_left_only(objective)) == (generates, causal)


TEXT = "the cat sat on the mat. the dog sat on the log. "


def trained_run(folder, objective="causal_lm", **data):
    """A run of a few steps: its workdir."""
    from gpt_jax.config import resolve
    from gpt_jax.train import train

    config = {
        "objective": {"name": objective},
        "steps": 3,
        "batch_size": 8,
        "context_length": 32,
        "model": {"num_layers": 2, "d_model": 16, "num_heads": 2, "dropout": 0.1},
        "data": {"tokenizer": {"kind": "byte"}, **data},
        "sample": {"prompts": ()},
        "log": {"tensorboard": False},
    }
    train(resolve(config), str(folder / "run"), log=lambda line: None)
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "text.txt").write_text(TEXT * 100)
    return trained_run(folder, path=str(folder / "text.txt"), split="tail")


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagger")
    (folder / "words.conll").write_text("the O\ncat B\n\na O\ndog B\n\n" * 10)
    return trained_run(folder, "tag", tasks=({"name": "tagging", "train": str(folder / "words.conll"), "hold_out": 0},))


@pytest.mark.slow
def test_the_command_writes_numbers_and_a_page_that_needs_no_network(trained, capsys):
    arguments = ["--clean", "the cat", "--corrupt", "the dog", "--answers", "s", "l", "--other", str(trained)]
    assert cli.main(["inspect", f"--workdir={trained}", "--tokens=20", "--texts=2", *arguments]) == 0
    out = capsys.readouterr().out.strip().splitlines()
    summary = json.loads(out[-1])
    assert summary["difference"] == 0.0 and 0 <= summary["induction"] <= 1
    numbers = json.loads((trained / "inspect" / "inspect.json").read_text())
    assert np.shape(numbers["attention"]) == (2, 2, 20, 20) and len(numbers["tokens"]) == 20
    assert np.shape(numbers["importance"]) == np.shape(numbers["patterns"]["induction"]) == (2, 2)
    assert numbers["patching"]["tokens"][5:] == ["c/d", "a/o", "t/g"]
    page = (trained / "inspect" / "inspect.html").read_text()
    assert "const DATA = {" in page and not re.search(r"""(src|href)\s*=|fetch\(|https?://|import """, page)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
USE = """
const say = (name, value) => document.body.setAttribute("data-" + name, value);
const select = document.querySelector('select[aria-label="layer"]');
select.value = "1";
select.dispatchEvent(new Event("change"));
const map = document.getElementById("map"), size = map.width / DATA.tokens.length;
const move = new MouseEvent("mousemove", { clientX: map.getBoundingClientRect().x + 2.5 * size,
  clientY: map.getBoundingClientRect().y + 5.5 * size });
map.dispatchEvent(move);
say("tip", document.querySelector(".tip").textContent);
say("on", document.querySelector("canvas.on").dataset.head);
const measure = document.querySelector('select[aria-label="measure"]');
measure.value = "1";
measure.dispatchEvent(new Event("change"));
const cell = document.querySelectorAll("td.click")[3];
cell.dispatchEvent(new MouseEvent("mousemove", {}));
say("cell", document.querySelector(".tip").textContent);
cell.dispatchEvent(new MouseEvent("click", {}));
say("clicked", document.querySelector("canvas.on").dataset.head);
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome to open the page in")
def test_a_person_can_hover_and_choose(trained, tmp_path, capsys):
    arguments = ["--clean=the cat", "--corrupt=the dog", "--answers", "s", "l", f"--other={trained}"]
    assert cli.main(["inspect", f"--workdir={trained}", "--tokens=12", "--texts=1", *arguments]) == 0
    page = (trained / "inspect" / "inspect.html").read_text()
    used = tmp_path / "used.html"
    used.write_text(page.replace("</body>", f"<script>{USE}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([BROWSER, *flags, used.as_uri()], capture_output=True, text=True, timeout=100)
    dom = done.stdout
    told = dict(re.findall(r'data-(tip|on|cell|clicked)="([^"]*)"', dom.partition("<body")[2].partition(">")[0]))
    numbers = json.loads((trained / "inspect" / "inspect.json").read_text())
    assert told["tip"].startswith("query 5 ") and "key 2 " in told["tip"], (told, done.stderr[-500:])
    shown = float(told["tip"].rpartition(": ")[2])
    assert told["on"].startswith("1.")
    assert shown == pytest.approx(numbers["attention"][1][int(told["on"][2:])][5][2], abs=1e-3)
    assert told["cell"].startswith("layer 1, head 1: ") and told["clicked"] == "1.1"
    value = float(re.search(r": (-?[\d.]+)", told["cell"])[1])
    assert value == pytest.approx(numbers["patterns"]["previous"][1][1], abs=1e-3)
    for title in ("The text, token by token", "Logit lens", "Heads", "Direct logit attribution", "Activation patching"):
        assert f"<h2>{title}</h2>" in dom


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clean=a"], "both --clean and --corrupt"),
        (["--clean=ab", "--corrupt=abc"], "equally many"),
        (["--clean=ab", "--corrupt=ac", "--answers", "xy", "xz"], "different first tokens"),
        (["--tokens=1"], "--tokens is 1"),
        (["--position=-7"], "--position is -7; it is a token's number, from 0, or -1"),
        (["--position=99"], "the text shown has tokens 0 to 11"),
        (["--config.seed=1"], "the run's own config"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_sentence(trained, capsys, arguments, message):
    assert cli.main(["inspect", f"--workdir={trained}", "--text=the cat sat", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_tagger_shows_the_attention_that_it_computes_and_predicts_no_next_token(tagger, trained, capsys):
    inspect = ["inspect", f"--workdir={tagger}", "--text=the cat sat"]
    assert cli.main(inspect) == 0
    assert "predicts no next token: attention and lens only" in capsys.readouterr().out
    numbers = json.loads((tagger / "inspect" / "inspect.json").read_text())
    assert (np.array(numbers["attention"]) > 0).all() and "loss" not in numbers and "patterns" not in numbers
    for arguments, message in (
        ([*inspect, "--clean=ab", "--corrupt=ac"], "--clean is 'ab', but the objective 'tag' of the run predicts no"),
        ([*inspect, f"--other={trained}"], f"--other is {str(trained)!r}, but the objective 'tag'"),
        ([*inspect, "--position=3"], "--position is 3, but the objective 'tag'"),
        (["inspect", f"--workdir={trained}", "--text=the cat", f"--other={tagger}"], "has the objective 'tag', which"),
        (["sample", f"--workdir={tagger}", "--prompt=the"], "does not teach it to continue a text"),
    ):
        assert cli.main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
