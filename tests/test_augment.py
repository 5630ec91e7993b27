"""Augmentation: no duplicates, nothing of dev or test, exact counts per class; filters that raise fidelity."""

import collections
import dataclasses
import json
import random
import types

import jax
import numpy as np
import pytest
import toy_tasks

from gpt_jax.augment import EDA, Copy, Synthetic, augment_task, normalise, select
from gpt_jax.augment.base import PATIENCE, as_rows, per_label
from gpt_jax.augment.controls import STOP_WORDS, distributional_neighbours
from gpt_jax.augment.filters import Confidence, PerplexityBand, Replaced
from gpt_jax.augment.report import fidelity, figures
from gpt_jax.cli import main
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.tasks import Classify

LABELS = ("glad", "sad")


def mood(text):
    """The oracle: which mood has more of the words; glad if none."""
    counts = [sum(word in text for word in words) for words in toy_tasks.MOODS.values()]
    return LABELS[int(np.argmax(counts))]


def oracle(texts):
    table = np.full((len(texts), 2), 0.1)
    for row, text in zip(table, texts, strict=True):
        row[LABELS.index(mood(text))] = 0.9
    return table


class Noisy:
    """Texts of both moods, a third of them under the wrong label; some repeat, some are those of the valid split."""

    name, copies = "noisy", False

    def __init__(self, closed=()):
        self.closed = list(closed)

    def augment(self, train, rng):
        out = []
        for i in range(60):
            label = LABELS[i % 2]
            words = rng.choices(toy_tasks.MOODS[label], k=5)
            wrong = rng.random() < 1 / 3
            out.append(Synthetic(LABELS[1 - i % 2] if wrong else label, " ".join(words), rng.random()))
        return [*out, *out[:5], *(Synthetic("glad", text.upper() + "!", 1.0) for text in self.closed)]


@pytest.fixture(scope="module")
def task():
    return toy_tasks.moods()


@pytest.fixture(scope="module")
def train(task):
    return task.examples("train")


def test_synthetic_examples_are_new_not_held_out_and_exactly_so_many(task, train):
    closed = [e.text for e in task.examples("valid")]
    found, counts = augment_task(
        train, Noisy(closed), per_class={"glad": 30, "sad": 40}, rng=random.Random(0), refused=closed
    )
    assert collections.Counter(e.label for e in found) == {"glad": 30, "sad": 40}
    keys = [normalise(e.text) for e in found]
    assert len(set(keys)) == 70 and not set(keys) & {normalise(text) for text in closed}
    assert not set(keys) & {normalise(e.text) for e in train}
    assert counts.overlaps == 8 * counts.rounds and counts.duplicates >= 5 * counts.rounds
    assert counts.generated == sum((counts.duplicates, counts.overlaps, counts.filtered, counts.left, counts.selected))


def test_an_oracle_filter_raises_fidelity_on_planted_label_noise(train):
    per_class = per_label(LABELS, 25)
    plain, _ = augment_task(train, Noisy(), per_class=per_class, rng=random.Random(1), oversample=2)
    filtered, _ = augment_task(
        train, Noisy(), per_class=per_class, rng=random.Random(1), filters=[Confidence(oracle, LABELS)], oversample=2
    )
    assert 0.5 < fidelity(plain, oracle, LABELS) < 0.8
    assert fidelity(filtered, oracle, LABELS) == 1.0
    strict = Confidence(oracle, LABELS, least=0.5)
    assert fidelity(strict.keep(Noisy().augment(train, random.Random(2))), oracle, LABELS) == 1.0


def test_too_few_are_an_error_that_says_so(train):
    one = Synthetic("glad", "only this", 1.0)

    class Single:
        name, copies = "single", False

        def augment(self, train, rng):
            return [one]

    with pytest.raises(
        UserError, match="1 synthetic examples of class 'glad' are left of the candidates, 2 are wanted"
    ):
        augment_task(train, Single(), per_class={"glad": 2}, rng=random.Random(0))
    with pytest.raises(UserError, match="--count is 0"):
        per_label(LABELS, 0)


def test_a_class_that_nothing_is_made_of_ends_the_search():
    rounds = []

    class Counted(Copy):
        def augment(self, train, rng):
            rounds.append(len(train))
            assert len(rounds) < 50, "the search goes on without end"
            return super().augment(train, rng)

    train = [Classify("a good film", "glad")]  # none of 'sad', of which the task may still have some to score
    with pytest.raises(UserError, match="0 synthetic examples of class 'sad' are left of the candidates, 3 are wanted"):
        augment_task(train, Counted(), per_class=per_label(LABELS, 3), rng=random.Random(0))
    assert len(rounds) == 3 + PATIENCE


def test_selection_is_by_score_or_in_order():
    candidates = [Synthetic("a", str(i), score) for i, score in enumerate((0.2, 0.9, 0.5))]
    assert [c.text for c in select(candidates, {"a": 2})] == ["1", "2"]
    assert [c.text for c in select(candidates, {"a": 2}, by_score=False)] == ["0", "1"]


def test_filters_multiply_scores_and_bands_cut_both_ends():
    candidates = [Synthetic("glad", "x" * n, 1.0) for n in range(1, 11)]
    length = lambda texts: np.array([len(t) for t in texts], float)  # noqa: E731
    kept = PerplexityBand(length, 0.1, 0.8).keep(candidates)
    assert [len(c.text) for c in kept] == list(range(2, 9))
    found = Replaced(lambda texts: length(texts) / 20, most=0.4).keep(candidates)
    assert [c.score for c in found] == pytest.approx([1 - n / 20 for n in range(1, 9)])
    both = Confidence(oracle, LABELS).keep(found)
    assert [c.score for c in both] == pytest.approx([0.9 * (1 - n / 20) for n in range(1, 9)])
    assert Confidence(oracle, LABELS).keep([]) == [] and PerplexityBand(length).keep([]) == []
    with pytest.raises(UserError, match="two rising quantiles"):
        PerplexityBand(length, 0.9, 0.1)


# The controls.


def test_copies_are_originals_each_as_often(train):
    found, _ = augment_task(train, Copy(), per_class=per_label(LABELS, 20), rng=random.Random(0))
    counts = collections.Counter(e.text for e in found)
    assert set(counts) == {e.text for e in train}
    assert all(train[e.parent].text == e.text and train[e.parent].label == e.label for e in found)
    assert figures([e.text for e in found], [e.text for e in train])["copied"] == 1.0


def test_neighbours_are_words_of_the_same_surroundings():
    rng = random.Random(0)
    animals, metals = ("cat", "dog", "fox"), ("iron", "gold", "lead")
    texts = [f"the {rng.choice(animals)} runs home fast today" for _ in range(200)]
    texts += [f"heavy {rng.choice(metals)} melts in hot ovens" for _ in range(200)]
    found = distributional_neighbours(texts, nearest=2)
    assert {word: set(found[word]) for word in animals} == {w: set(animals) - {w} for w in animals}
    assert set(found["gold"]) == {"iron", "lead"} and not set(found) & STOP_WORDS
    assert distributional_neighbours(["one"]) == {}


def test_eda_changes_as_many_words_as_it_says():
    neighbours = {"cat": ["lion"], "dog": ["wolf"]}
    train = [Classify("the cat saw a dog and a cat ran off", "a", where="x")]
    texts = [c.text.split() for c in EDA(neighbours, alpha=0.2, per_example=40).augment(train, random.Random(0))]
    before = train[0].text.split()
    kinds = collections.Counter()
    for words in texts:
        if len(words) == len(before) + 2:
            kinds["insert"] += 1
            assert collections.Counter(words) - collections.Counter(before) <= collections.Counter(lion=2, wolf=2)
        elif len(words) < len(before):
            kinds["delete"] += 1
            rest = iter(before)
            assert all(word in rest for word in words)  # the order is kept
        elif sorted(words) == sorted(before):
            kinds["swap"] += 1
        else:
            kinds["replace"] += 1
            changed = [(a, b) for a, b in zip(before, words, strict=True) if a != b]
            assert len(changed) == 2 and all(b in neighbours[a] for a, b in changed)
    assert set(kinds) == {"insert", "delete", "swap", "replace"} and min(kinds.values()) == 10


def test_eda_takes_every_original_before_any_again(train):
    eda = EDA({"sun": ["moon", "song"], "rain": ["snow", "tears"], "light": ["dark"]}, alpha=0.3)
    count = 4 * len(train) // len(LABELS)
    chosen, _ = augment_task(train, eda, per_class=per_label(LABELS, count), rng=random.Random(0))
    parents = collections.Counter(example.parent for example in chosen)
    assert set(parents) == set(range(len(train))) and max(parents.values()) <= 8  # not 16 of each


def test_not_exact_takes_what_there_is(train):
    class Few:
        name, copies = "few", False

        def augment(self, train, rng):
            return [Synthetic("glad", f"text {rng.randrange(3)}") for _ in range(9)]

    wanted = dict(per_class=per_label(LABELS, 5), rng=random.Random(0))
    chosen, counts = augment_task(train, Few(), exact=False, **wanted)
    assert len(chosen) == counts.selected == 3
    with pytest.raises(UserError, match="3 synthetic examples of class 'glad' are left"):
        augment_task(train, Few(), **wanted)
    with pytest.raises(UserError, match="no synthetic example is left"):
        select([], per_label(LABELS, 5), exact=False)


def test_what_is_generated_from_nothing_is_not_an_original():
    """Texts of one word, unknown words: nothing to do is not a copy."""
    assert EDA({}, per_example=8).augment([Classify("word", "a", where="x")], random.Random(0)) == []


def test_provenance_names_the_original(train):
    rows = as_rows([Synthetic("glad", "t", 0.5, 3), Synthetic("sad", "u", 0.5)], {"generator": "eda", "seed": 1}, train)
    assert rows[0]["provenance"] == {"generator": "eda", "seed": 1, "parent": train[3].where}
    assert "parent" not in rows[1]["provenance"]


# Models.


SMALL = {
    "steps": 60,
    "batch_size": 8,
    "context_length": 64,
    "model": {"num_layers": 2, "d_model": 32, "num_heads": 2, "positions": "rope"},
    "data": {"tokenizer": {"kind": "byte"}, "doc_mask": True},
    "optimizer": {"learning_rate": 3e-3},
    "eval": {"every_steps": 0, "max_batches": 1},
    "log": {"tensorboard": False},
    "sample": {"prompts": ()},
}


def pretrained(folder, objective, **changes):
    from gpt_jax.config import resolve
    from gpt_jax.train import train as run

    run(resolve({**SMALL, "objective": {"name": objective}, **changes}), str(folder), log=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("lm"), "causal_lm")


@pytest.fixture(scope="module")
def mlm(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("mlm"), "masked_lm", steps=2)


def recipe(**changes):
    from gpt_jax.augment.finetune import Recipe

    return Recipe(**{"steps": 120, "batch_size": 8, "length": 64, "learning_rate": 5e-3} | changes)


def test_rows_put_the_label_first_and_the_loss_on_the_text():
    from gpt_jax.augment.generators import HiddenRows, LabelledRows

    tokenizer = ByteTokenizer(["eot", "mask", "sep"])
    eot, sep = tokenizer.specials["eot"], tokenizer.specials["sep"]
    example = Classify("abc", "sad", where="x")
    [row] = LabelledRows(eot, 20, "target", 8, False, sep=sep).encode(example, None, tokenizer)
    assert row["tokens"].tolist() == [eot, *b"sad", sep, *b"abc"]
    assert row["targets"].tolist() == [*b"sad", sep, *b"abc", eot]
    assert row["target_weights"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    [row] = HiddenRows(eot, sep, 7).encode(example, None, tokenizer)
    assert row["tokens"].tolist() == [eot, *b"sad", sep, *b"ab"]  # cut at its end
    assert row["target_weights"].tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_the_same_originals_are_trained_on_once_and_others_under_another_seed(train, monkeypatch):
    from gpt_jax.augment import finetune

    seeds = []
    monkeypatch.setattr(finetune, "build_train_step", lambda *arguments, **options: None)
    monkeypatch.setattr(finetune.FineTuner, "fit", lambda self, examples, seed: seeds.append(seed) or {"n": len(seeds)})
    objective = types.SimpleNamespace(batch_spec=lambda rows, length: {})
    tuner = finetune.FineTuner(objective, None, None, {}, recipe(), LABELS)
    assert [tuner.fitted(some)["n"] for some in (train, list(train), train[1:], train)] == [1, 1, 2, 3]
    assert seeds[0] == seeds[2] != seeds[1]


@pytest.mark.slow
def test_a_label_conditioned_model_writes_texts_of_the_label(lm, train):
    from gpt_jax.augment.generators import LabelLM
    from gpt_jax.loading import load

    generator = LabelLM(load(lm), LABELS, recipe(steps=300), per_class=30, max_tokens=40, temperature=0.7)
    texts = generator.augment(train, random.Random(0))
    assert collections.Counter(t.label for t in texts) == {"glad": 30, "sad": 30}
    assert fidelity(texts, oracle, LABELS) > 0.8
    assert generator.augment(train, random.Random(0)) == texts  # one seed, one result
    prefixed = LabelLM(load(lm), LABELS, recipe(), prefix_words=2, per_class=10, max_tokens=20)
    for found in prefixed.augment(train, random.Random(1)):
        assert train[found.parent].label == found.label
        assert found.text.startswith(" ".join(train[found.parent].text.split()[:2]))


@pytest.mark.slow
def test_substitution_keeps_all_but_the_hidden_tokens_and_draws_no_special(mlm, train):
    from gpt_jax.augment.generators import MaskedSubstitution
    from gpt_jax.loading import load

    generator = MaskedSubstitution(load(mlm), LABELS, recipe(steps=20), rate=0.2, per_example=2)
    encoded = generator.tuner.encode(train)
    rows = encoded.build(np.zeros(len(train), np.int64), np.arange(len(train)))
    may = rows["target_weights"] > 0
    hidden = generator.choose(may, np.random.default_rng(0))
    assert (hidden.sum(1) == np.round(0.2 * may.sum(1))).all() and not (hidden & ~may).any()
    params = generator.tuner.fit(train, 0)
    ids, logp = generator.fill(params, rows, hidden, jax.random.key(0))
    assert (ids[~hidden] == rows["tokens"][~hidden]).all() and (ids[hidden] < 256).all() and (logp <= 0).all()
    found = generator.augment(train, random.Random(0))
    assert len(found) == 2 * len(train) and all(train[f.parent].label == f.label for f in found)
    assert len({f.text for f in found} - {e.text for e in train}) > len(train)


@pytest.mark.slow
def test_an_embedded_label_is_no_token_and_decides_what_is_drawn(mlm):
    from gpt_jax.augment.generators import MaskedSubstitution
    from gpt_jax.loading import load

    examples = [Classify("The sky is " + end * 12, label) for label, end in (("glad", "a"), ("sad", "z"))] * 4
    small = recipe(steps=60, learning_rate=1e-2)
    generator = MaskedSubstitution(load(mlm), LABELS, small, rate=0.5, per_example=1, temperature=0.0, embedded=True)
    rows = generator.tuner.encode(examples).build(np.zeros(8, np.int64), np.arange(8))
    assert (rows["target_weights"][:, 1:24] == 1).all()  # all but the EOT is text
    assert rows["label"].tolist() == [LABELS.index(e.label) for e in examples]
    params = generator.tuner.fit(examples, 0)
    assert params["label"]["embedding"].shape == (2, 32)
    hidden = np.zeros(rows["tokens"].shape, bool)
    hidden[:, 12:24] = True  # all that tells the two apart
    ids, _ = generator.fill(params, rows, hidden, jax.random.key(0))
    assert bytes(ids[0, 12:24].tolist()) == b"a" * 12 and bytes(ids[1, 12:24].tolist()) == b"z" * 12
    other, _ = generator.fill(params, {**rows, "label": 1 - rows["label"]}, hidden, jax.random.key(0))
    assert (other[0] == ids[1]).all() and (other[1] == ids[0]).all()
    before = {**params, "label": {"embedding": np.zeros((2, 32), np.float32)}}
    plain = MaskedSubstitution(load(mlm), LABELS, small, temperature=0.0)  # vectors of 0 change nothing
    np.testing.assert_array_equal(
        generator.fill(before, rows, hidden, jax.random.key(0))[0],
        plain.fill(before, rows, hidden, jax.random.key(0))[0],
    )
    assert generator.name == "mlm_embedded" and len(generator.augment(examples, random.Random(0))) == 8


@pytest.mark.slow
def test_substitution_in_chunks_draws_the_same_and_at_temperature_0_the_likeliest(mlm, train):
    from gpt_jax.augment.generators import MaskedSubstitution
    from gpt_jax.loading import load

    generator = MaskedSubstitution(load(mlm), LABELS, recipe(steps=1), rate=0.3)
    encoded = generator.tuner.encode(train)
    rows = encoded.build(np.zeros(len(train), np.int64), np.arange(len(train)))
    hidden = generator.choose(rows["target_weights"] > 0, np.random.default_rng(0))
    params, key = generator.run.all_params, jax.random.key(3)
    whole, logp = generator.fill(params, rows, hidden, key)
    shapes, compiled = [], generator._fill
    generator._fill = lambda *args: shapes.append(args[2].shape) or compiled(*args)
    ids, parts = generator.fill(params, rows, hidden, key, chunk=8)  # of 20 rows
    assert shapes == [(8, 64)] * 3
    np.testing.assert_array_equal(ids, whole)
    np.testing.assert_allclose(parts, logp, rtol=1e-4)
    assert len({tuple(row) for row in ids[:, :40].tolist()}) > 10
    greedy = MaskedSubstitution(load(mlm), LABELS, recipe(steps=1), temperature=0.0)
    ids, logp = greedy.fill(params, rows, hidden, key)
    np.testing.assert_array_equal(ids, greedy.fill(params, rows, hidden, jax.random.key(4))[0])
    drawn = [generator.fill(params, rows, hidden, jax.random.key(seed))[1] for seed in range(3)]
    assert np.isfinite(logp).all() and all((logp[hidden] >= one[hidden] - 1e-5).all() for one in drawn)
    with pytest.raises(UserError, match="temperature is -1"):
        MaskedSubstitution(load(mlm), LABELS, recipe(steps=1), temperature=-1)


@pytest.mark.slow
def test_reference_and_discriminator_score_a_text_by_itself(lm, mlm, tmp_path):
    from gpt_jax.augment.filters import reference_nll, replaced_rate
    from gpt_jax.loading import load

    run = load(lm)
    nll, texts = reference_nll(run), ["Return the name of it.", "zq#xv@@kw", "The value"]
    whole = nll(texts)
    np.testing.assert_allclose(whole, [nll([text])[0] for text in texts], rtol=1e-4)
    assert whole[0] < whole[1]  # a text like the corpus, and noise
    ids = np.array([[run.tokenizer.eot, *texts[2].encode(), run.tokenizer.eot]], np.int32)
    logits = np.asarray(run.model.apply({"params": run.params}, ids[:, :-1]).logits[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert whole[2] == pytest.approx(-log_p[np.arange(ids.shape[1] - 1), ids[0, 1:]].mean(), rel=1e-4)
    rtd = pretrained(tmp_path / "rtd", "replaced_token", steps=2)
    rate = replaced_rate(load(rtd))
    found = rate(texts)
    assert ((found > 0) & (found < 1)).all()
    np.testing.assert_allclose(found, [rate([text])[0] for text in texts], rtol=1e-4)
    for function, path in ((reference_nll, mlm), (replaced_rate, lm)):
        with pytest.raises(UserError, match="is a run with the objective"):
            function(load(path))


# The command.


def run(capsys, *flags):
    assert main(["augment", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_the_command_writes_examples_provenance_and_a_report(tmp_path, capsys):
    flags = ["--task=toy_tasks:moods", "--method=eda", "--per-class=5", "--count=12", "--alpha=0.2", "--seed=3"]
    summary = run(capsys, *flags, f"--out={tmp_path / 'a'}")
    assert summary["selected"] == 24 and summary["originals"] == 10
    assert {"distinct_2", "self_bleu_4", "copied", "copied_4grams"} <= summary.keys()
    rows = [json.loads(line) for line in (tmp_path / "a" / "augmented.jsonl").read_text().splitlines()]
    assert collections.Counter(row["label"] for row in rows) == {"glad": 12, "sad": 12}
    assert rows[0].keys() == {"label", "text", "score", "provenance"} and "parent" in rows[0]["provenance"]
    assert "| original | synthetic |" in (tmp_path / "a" / "report.md").read_text()
    run(capsys, *flags, f"--out={tmp_path / 'b'}")
    assert (tmp_path / "b" / "augmented.jsonl").read_bytes() == (tmp_path / "a" / "augmented.jsonl").read_bytes()
    from gpt_jax.tasks import load_task

    both = load_task({"name": "classification", "train": str(tmp_path / "a" / "train.jsonl"), "hold_out": 0})
    assert len(both.examples("train")) == 34 and both.labels == LABELS


def test_mistakes_are_named(tmp_path, capsys):
    for flags, message in (
        (["--method=edda", "--task=toy_tasks:moods"], "did you mean 'eda'"),
        (["--method=eda"], "--task is missing"),
        (["--method=eda", "--task=toy_tasks:reverse"], "augment takes 'classify'"),
        (["--method=lm", "--task=toy_tasks:moods"], "--from is missing"),
        (["--method=eda", "--task=toy_tasks:moods", "--per-class=500"], "class 'glad' of task moods has 10"),
        (["--method=eda", "--task=toy_tasks:moods", "--per-class=-1"], "--per-class is -1; it must be at least 0"),
        (["--method=copy", "--task=toy_tasks:moods", "--count=-2"], "--count is -2; it must be at least 1"),
        (["--method=text", "--documents=0"], "--documents is 0; it must be at least 1"),
        (["--method=text", "--max-tokens=-5"], "--max-tokens is -5; it must be at least 1"),
        (["--method=eda", "--task={'name'"], "is no table"),
        (["--method=copy", "--task=toy_tasks:moods", "--config.steps=3"], "its settings are flags"),
    ):
        assert main(["augment", f"--out={tmp_path}", *flags]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_file_of_the_users_own_is_never_replaced(tmp_path, capsys):
    text = "".join(json.dumps({"text": f"{mood} {i} times", "label": mood}) + "\n" for i in range(9) for mood in LABELS)
    own = tmp_path / "own" / "train.jsonl"
    own.parent.mkdir()
    own.write_text(text)
    flags = ["augment", "--method=copy", "--count=3", "--task"]
    task = "{'name': 'classification', 'train': '%s'}"
    assert main([*flags, task % own, f"--out={own.parent}"]) == 1
    assert "would replace train.jsonl, which the task is read from" in capsys.readouterr().err
    assert main([*flags, "toy_tasks:moods", f"--out={own.parent}"]) == 1
    error = capsys.readouterr().err
    assert "holds a train.jsonl that augment did not write" in error and error.count("\n") == 1
    assert own.read_text() == text and [path.name for path in own.parent.iterdir()] == ["train.jsonl"]
    for _ in range(2):  # what it wrote itself is replaced
        assert main([*flags, task % own, f"--out={tmp_path / 'out'}"]) == 0


@pytest.mark.slow
def test_a_generated_corpus_is_a_store_that_pre_training_mixes_in(lm, tmp_path, capsys):
    from gpt_jax.config import resolve
    from gpt_jax.data.store import open_store
    from gpt_jax.run import build_run

    flags = ["--method=text", f"--from={lm}", "--documents=12", "--max-tokens=60"]
    summary = run(capsys, *flags, f"--out={tmp_path / 'all'}")
    manifest = open_store(summary["store"]).manifest
    assert manifest["corpus"]["from"] == str(lm) and manifest["corpus"]["documents"] == summary["documents"]
    fewer = run(capsys, f"--out={tmp_path / 'all'}", *flags[:2], "--documents=3", "--max-tokens=60", "--seed=1")
    assert open_store(fewer["store"]).manifest["corpus"]["documents"] == fewer["documents"] <= 3  # not the old ones
    summary = run(capsys, *flags, f"--out={tmp_path / 'all'}")
    own = tmp_path / "own" / "store"
    own.mkdir(parents=True)
    (own / "notes.txt").write_text("a user's")
    assert main(["augment", *flags, f"--out={own.parent}"]) == 1
    assert "that is no generated text" in capsys.readouterr().err and [f.name for f in own.iterdir()] == ["notes.txt"]
    banded = run(capsys, *flags, f"--reference={lm}", "--band=0.2,0.8", f"--out={tmp_path / 'band'}")
    assert 0 < banded["documents"] < summary["documents"]
    sources = (
        {"name": "real", "weight": 1, "corpus": "python_docs"},
        {"name": "generated", "weight": 1, "path": summary["store"]},
    )
    data = {**SMALL["data"], "sources": sources}
    built = build_run(resolve({**SMALL, "batch_size": 8, "data": data}), lambda line: None)
    assert built.data.tokens["generated/train"] > 100 and set(built.data.valid) == {"real"}
    assert (np.bincount(built.data.train.sources(0)) == 4).all()


# The experiment.


def test_arms_are_compared_on_the_same_splits():
    from gpt_jax.augment.experiment import compare, table

    rng = np.random.default_rng(0)
    base = rng.normal(0.6, 0.1, 12)
    rows = [{"split": i, "arm": "none", "accuracy": x} for i, x in enumerate(base)]
    rows += [{"split": i, "arm": "eda", "accuracy": x + 0.02 + 0.001 * (i % 2)} for i, x in enumerate(base[:10])]
    found = {row["arm"]: row for row in compare(rows)}
    assert found["none"]["mean"] == pytest.approx(base.mean()) and found["none"]["sd"] == pytest.approx(
        base.std(ddof=1)
    )
    assert found["eda"]["difference"] == pytest.approx(0.0205) and found["eda"]["splits"] == 10
    assert 0.02 <= found["eda"]["low"] < 0.0205 < found["eda"]["high"] <= 0.021  # paired: far narrower than the sd
    assert "| eda | 10 |" in table(list(found.values()))
    assert "fidelity" not in table(list(found.values()))
    rows[-1] |= {"fidelity": 0.5, "copied": 0.0}
    rows[-2] |= {"fidelity": 0.75, "copied": 0.25}
    *_, eda = compare(rows)
    assert eda["fidelity"] == 0.625 and eda["copied"] == 0.125
    header, _, none, last = table(compare(rows)).splitlines()
    assert header.endswith("| fidelity | copied |") and none.endswith("|  |  |") and last.endswith("| 0.625 | 0.125 |")


@pytest.mark.slow
def test_the_experiment_goes_on_where_it_stopped(lm, tmp_path):
    from gpt_jax.augment.experiment import Experiment, Models, Protocol, read_results
    from gpt_jax.augment.finetune import Recipe
    from gpt_jax.loading import load

    small = Recipe(steps=12, batch_size=8, length=48, learning_rate=3e-3)
    protocol = Protocol(per_class=4, count=6, oversample=2, splits=2, generator=small)

    def experiment(recipe=small, base=None):
        neighbours = {"sun": ["song"], "rain": ["tears"]}
        out = tmp_path / "out"
        quiet = lambda line: None  # noqa: E731
        task = toy_tasks.moods(train=40)
        return Experiment(
            task, {"name": "classify"}, recipe, Models(base or load(lm)), protocol, neighbours, out, quiet
        )

    first = experiment()
    arms = ("none", "copy", "eda", "lm+filter")
    rows = first.run(arms)
    assert len(rows) == 8
    path = tmp_path / "out" / "results.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:5]) + kept[5][:10])  # as if killed while writing
    assert experiment().run(arms) == rows and read_results(path) == rows
    with pytest.raises(UserError, match="results of another recipe or protocol"):
        experiment(dataclasses.replace(small, steps=13)).run(arms)
    with pytest.raises(UserError, match="results of another recipe or protocol"):
        experiment(base=dataclasses.replace(load(lm), step=7)).run(arms)
    assert all(row["synthetic"] == 12 for row in rows if row["arm"] != "none")
    assert rows[1]["copied"] == 1.0 and rows[2]["copied"] == 0.0
