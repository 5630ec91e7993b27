"""Other forms of `gpt-jax sample`: beams, choices, log-probabilities, the page; many prompts in continuous batches."""

import dataclasses
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from test_sample_command import save_run

import gpt_jax
from gpt_jax.choice import choose_texts
from gpt_jax.cli import main
from gpt_jax.contrastive import contrastive_search
from gpt_jax.generation import check_prompts
from gpt_jax.model import Transformer
from gpt_jax.sample import continue_prompts, continue_texts
from gpt_jax.sample_page import look_at
from gpt_jax.sampling import Sampling

DEFAULT = Sampling(0.8, top_p=0.95)  # the command's


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "plain"
    save_run(path, optax.adam(0.1), (3,))
    return path


def samples(capsys, run, *flags):
    assert main(["sample", f"--workdir={run}", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["samples"]


def log_probability(run, ids):
    """log P of each token after EOT, from the plain forward pass."""
    ids = [256, *ids]
    logp = jax.nn.log_softmax(run.model.apply({"params": run.params}, jnp.asarray([ids])).logits[0])
    return np.asarray(logp)[np.arange(len(ids) - 1), ids[1:]]


def test_log_probabilities_are_those_of_the_plain_forward_pass(run, capsys):
    loaded = gpt_jax.load(run)
    row = samples(capsys, run, "--prompt=ab", "--max-tokens=6", "--temperature=2", "--logprobs")[0]
    (text, ids), *_ = continue_prompts(loaded, ["ab"], max_tokens=6, sampling=Sampling(2.0, top_p=0.95))
    assert row["text"] == text and len(row["tokens"]) == len(ids)
    np.testing.assert_allclose(row["logprobs"], log_probability(loaded, [*b"ab", *ids])[2:], atol=1e-4)


def test_beams_find_what_is_at_least_as_likely_as_the_greedy_text(run, capsys):
    loaded = gpt_jax.load(run)
    ((_, greedy),) = continue_prompts(loaded, ["ab"], max_tokens=5, sampling=Sampling(0.0))
    flags = ("--prompt=ab", "--max-tokens=5", "--beams=16", "--length-penalty=0", "--num-samples=2", "--logprobs")
    first, second = (sum(row["logprobs"]) for row in samples(capsys, run, *flags))
    ours = log_probability(loaded, [*b"ab", *greedy])[2:].sum()
    assert first >= second - 1e-4 and first >= ours - 1e-4


def test_a_choice_is_made_by_its_probability(run, capsys):
    loaded = gpt_jax.load(run)
    p = {c: float(np.exp(log_probability(loaded, f"is it {c}".encode())[6:].sum())) for c in ("yes", "no")}
    expected = {c: value / sum(p.values()) for c, value in p.items()}
    row = samples(capsys, run, "--prompt=is it:", "--choice= yes", "--choice= no", "--temperature=0")[0]
    assert row["text"] in (" yes", " no") and sum(row["probabilities"].values()) == pytest.approx(1)
    (best, found), *_ = choose_texts(loaded, ["is it "], ["yes", "no"])
    for choice, value in found.items():
        # The space belongs to the continuation, as to every other choice: its probability cancels.
        assert value == pytest.approx(expected[choice], rel=1e-3)
    assert best == max(expected, key=expected.get)
    drawn = choose_texts(loaded, ["is it "] * 400, ["yes", "no"], temperature=1.0)
    counts = [sum(c == choice for c, _ in drawn) for choice in ("yes", "no")]
    assert stats.chisquare(counts, [400 * expected[c] for c in ("yes", "no")]).pvalue > 0.001


def test_a_negative_seed_draws_a_choice(run, capsys):
    flags = ("--prompt=a", "--prompt=b", "--choice=x", "--choice=y", "--temperature=1")
    assert len(samples(capsys, run, *flags, "--seed=-1")) == 2


def test_many_prompts_in_continuous_batches_are_what_each_is_alone(run):
    loaded = gpt_jax.load(run)
    prompts = ["abc"[: 1 + i % 3] * (1 + i % 4) for i in range(40)]
    settings = dict(max_tokens=10, sampling=Sampling(1.0), stop=["e", "\u00e9"])
    together = continue_texts(loaded, prompts, seed=0, **settings)
    for row in (0, 13, 39):
        assert continue_texts(loaded, [prompts[row]], seed=row, **settings) == [together[row]]


# -- the page ---------------------------------------------------------------------------------------------------------


def test_what_is_looked_at_is_the_softmax(run):
    loaded = gpt_jax.load(run)
    ids = [256, *b"hello"]
    shown = look_at(loaded.model, loaded.params, ids, top=3)
    logits = loaded.model.apply({"params": loaded.params}, jnp.asarray([ids])).logits[0]
    p = np.asarray(jax.nn.softmax(logits))
    assert [token.id for token in shown] == ids and shown[0].probability is None
    for i, token in enumerate(shown[1:]):
        assert token.probability == pytest.approx(p[i, token.id], rel=1e-3)
        assert token.rank == (p[i] > p[i, token.id]).sum()
        assert [t for t, _ in token.alternatives] == np.argsort(-p[i])[:3].tolist()


def test_a_run_trained_with_attention_of_another_device_is_looked_at(run):
    loaded = gpt_jax.load(run)
    other = Transformer(dataclasses.replace(loaded.model.config, attention="splash"))
    assert look_at(other, loaded.params, [256, *b"hello"]) == look_at(loaded.model, loaded.params, [256, *b"hello"])


def test_the_page_holds_every_token_and_nothing_from_elsewhere(run, capsys, tmp_path):
    page = tmp_path / "new" / "page.html"
    rows = samples(capsys, run, "--prompt=<b>&", "--prompt=x", "--max-tokens=9", "--seed=2", f"--html={page}")
    text = page.read_text(encoding="utf-8")
    assert len(re.findall('<span class="t prompt"', text)) == 5 + 2  # with their EOTs
    new = len(re.findall(r'<span class="t" tabindex', text))
    ids = [new for _, new in continue_prompts(gpt_jax.load(run), ["<b>&", "x"], max_tokens=9, sampling=DEFAULT, seed=2)]
    assert new == sum(map(len, ids)) and [row["prompt"] for row in rows] == ["<b>&", "x"]
    assert "&lt;</span>" in text or "&lt;<span" in text  # escaped
    assert not re.search(r"(src|href)=|@import|url\(", text)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("left", "y" * 4 + "z" * 20), ("right", "x" * 20 + "y" * 4), ("head_tail", "x" * 12 + "z" * 12)],
)
def test_a_prompt_too_long_is_cut_by_the_policy_named(run, capsys, monkeypatch, policy, kept):
    given = []
    long, positions = "x" * 20 + "y" * 30 + "z" * 20, 48

    def kept_in_mind(model, ids, *rest):
        given.append(ids)
        return check_prompts(model, ids, *rest)

    monkeypatch.setattr("gpt_jax.sample.check_prompts", kept_in_mind)
    samples(capsys, run, f"--prompt={long}", f"--overflow={policy}", f"--max-tokens={positions - 25}")
    assert given == [[[256, *kept.encode()]]]


def test_a_prompt_too_long_names_the_policies(run, capsys):
    long = "x" * 100
    assert main(["sample", f"--workdir={run}", f"--prompt={long}", "--max-tokens=4"]) == 1
    assert "--overflow=left | right | head_tail cuts it" in capsys.readouterr().err
    assert main(["sample", f"--workdir={run}", f"--prompt={long}", "--choice=a", "--choice=b"]) == 1
    assert "overflow 'left' cuts" in capsys.readouterr().err
    [row] = samples(capsys, run, f"--prompt={long}", "--choice=a", "--choice=b", "--overflow=left")
    assert row["text"] in ("a", "b")
    for given, message in (("up", "--overflow is 'up'"), ("left", "--max-tokens is 100, which leaves nothing")):
        flags = [f"--overflow={given}", "--max-tokens=100"]
        assert main(["sample", f"--workdir={run}", f"--prompt={long}", *flags]) == 1
        assert message in capsys.readouterr().err


def test_contrastive_search_from_the_command(run, capsys):
    loaded = gpt_jax.load(run)
    prompts = ["x", "hello"]
    flags = [*(f"--prompt={p}" for p in prompts), "--max-tokens=8"]
    rows = samples(capsys, run, *flags, "--contrastive=0.7", "--top-k=6")
    ids = [[256, *p.encode()] for p in prompts]
    found = contrastive_search(loaded.model, loaded.params, ids, max_tokens=8, k=6, alpha=0.7, eot=256)
    assert [row["text"] for row in rows] == [loaded.tokenizer.decode(new) for new in found]
    greedy = samples(capsys, run, *flags, "--temperature=0")
    alike = samples(capsys, run, *flags, "--contrastive=0")
    assert [row["text"] for row in alike] == [row["text"] for row in greedy]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
USE = """
const say = (name, value) => document.body.setAttribute("data-" + name, value);
const token = [...document.querySelectorAll(".t")].find(t => !t.classList.contains("prompt"));
const tip = token.querySelector(".tip"), display = () => getComputedStyle(tip).display;
say("before", display());
token.focus();
say("focused", document.activeElement === token);
const rules = [...document.styleSheets].flatMap(sheet => [...sheet.cssRules]);
for (const rule of rules) rule.selectorText = rule.selectorText?.replaceAll(":focus", ".held");
token.classList.add("held");  // a headless window may not have the keyboard yet, and :focus asks for that
say("after", display());
say("tip", [...tip.querySelectorAll(".p")].map(p => p.textContent).join(";"));
say("colour", getComputedStyle(token).backgroundColor);
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome to open the page in")
def test_a_token_shows_its_alternatives_and_its_colour_in_a_browser(run, capsys, tmp_path):
    page, used = tmp_path / "page.html", tmp_path / "used.html"
    samples(capsys, run, "--prompt=x", "--max-tokens=9", "--seed=2", f"--html={page}")
    used.write_text(page.read_text().replace("</body>", f"<script>{USE}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([BROWSER, *flags, used.as_uri()], capture_output=True, text=True, timeout=100)
    body = done.stdout.partition("<body")[2].partition(">")[0]
    told = dict(re.findall(r'data-(before|focused|after|tip|colour)="([^"]*)"', body))
    assert (told["before"], told["focused"], told["after"]) == ("none", "true", "block"), (told, done.stderr[-500:])
    loaded = gpt_jax.load(run)
    first = continue_prompts(loaded, ["x"], max_tokens=9, sampling=DEFAULT, seed=2)
    ids = [256, *b"x", next(iter(first))[1][0]]
    shown = look_at(loaded.model, loaded.params, ids, top=5)[-1]
    assert told["tip"].split(";")[0] == f"{100 * shown.alternatives[0][1]:.1f} %"
    assert told["colour"].startswith("rgb(") and told["colour"] != "rgb(255, 255, 255)"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--beams=-1"], "--beams is -1"),
        (["--beams=2", "--num-samples=3"], "--beams is 2"),
        (["--choice=a"], "at least two different texts"),
        (["--choice=a", "--choice=b", "--beams=2"], "--choice goes without --beams"),
        (["--logprobs"], "--logprobs is for --json"),
        (["--choice=a", "--choice=b", "--normalise=mean"], "normalise is 'mean'"),
        (["--choice=a", "--choice=b", "--num-samples=2"], "--choice goes without --num-samples, which is 2"),
        (["--choice=a", "--choice=b", "--top-k=0"], "--choice goes without --top-k, which is 0"),
        (["--choice=a", "--choice=b", "--top-p=0.95"], "--choice goes without --top-p, which is 0.95"),
        (["--choice=a", "--choice=b", "--json", "--logprobs"], "--choice goes without --logprobs"),
        (["--contrastive=0.6", "--beams=2"], "--contrastive goes without --beams"),
        (["--contrastive=0.0", "--temperature=1"], "--contrastive goes without --temperature, which is 1.0"),
        (["--contrastive=1.5"], "alpha is 1.5"),
        (["--contrastive=0.5", "--top-k=0"], "k is 0"),
        (["--choice=a", "--choice=b", "--choice=a"], "choice 'a' is given twice"),
        (["--interactive", "--html=page.html"], "no --json, no --html"),
        (["--html=/dev/null/page.html"], "--html is '/dev/null/page.html', which cannot be written"),
        (["--html=/tmp"], "--html is '/tmp', which is a folder"),
        (["--beams=2", "--length-penalty=nan"], "the length penalty is nan"),
        (["--beams=2", "--temperature=0.5"], "--beams goes without --temperature, which is 0.5"),
        (["--beams=2", "--repetition-penalty=1.2"], "--beams goes without --repetition-penalty, which is 1.2"),
    ],
)
def test_mistakes_are_told_in_a_line(run, capsys, flags, said):
    assert main(["sample", f"--workdir={run}", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
