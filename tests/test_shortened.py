"""tasks/shortened.py: inputs within a budget, and answers that stand where they should or nowhere."""

import json

import pytest
from helpers import load_script

from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.tasks import load_task


@pytest.fixture
def tokenizer(tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def questions(tmp_path):
    context = "the cat sat on a mat, the cat slept"
    found = [
        {"text": "cat", "answer_start": 4},
        {"text": "cat", "answer_start": 26},
        {"text": "mat", "answer_start": 17},
    ]
    qas = [{"id": "1", "question": "Who?", "answers": found}]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}))
    return {"name": "squad", "train": str(path), "test": str(path), "hold_out": 0}


@pytest.mark.parametrize(
    ("policy", "context", "answers"),
    [
        ("right", "the cat sat ", {("cat", 4)}),
        ("left", "he cat slept", {("cat", 3)}),
        ("head_tail", "the ca slept", set()),
    ],
)
def test_answers_move_with_what_is_left_and_are_scored_whole(tmp_path, tokenizer, policy, context, answers):
    task = load_task("shortened", task=questions(tmp_path), tokenizer=tokenizer, budget=12, policy=policy)
    (found,) = task.examples("test")
    assert found.context == context and set(found.answers) == answers
    assert found.gold == ("cat", "cat", "mat")
    assert task.score(["mat"], [found])["exact_match"] == 100


def test_a_source_keeps_its_last_words(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"source": "abcdefgh", "target": "x"}) + "\n")
    inner = {
        "name": "text_to_text",
        "train": str(path),
        "test": str(path),
        "source": "{source}\nTL;DR:\n",
        "target": "{target}",
    }
    task = load_task("shortened", task=inner, tokenizer=tokenizer, budget=3, policy="left", end="\nTL;DR:\n")
    (found,) = task.examples("test")
    assert found.source == "fgh\nTL;DR:\n" and found.gold == ("x",)


@pytest.mark.parametrize(
    ("policy", "budget", "left"),
    [
        ("right", 4, "a\u20ac"),
        ("right", 6, "a\u20ac"),
        ("left", 4, "xyz"),
        ("head_tail", 7, "axyz"),
        ("left", 20, None),
    ],
)
def test_a_character_that_a_cut_goes_through_is_dropped(tmp_path, tokenizer, policy, budget, left):
    text = "a\u20ac\u20ac\u20acxyz"  # three bytes each; the tail's first byte would end the head's last character
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"source": text, "target": "x"}) + "\n")
    inner = {"name": "text_to_text", "train": str(path), "test": str(path), "source": "{source}", "target": "{target}"}
    options = dict(tokenizer=tokenizer, budget=budget, policy=policy, head=0.45)
    (found,) = load_task("shortened", task=inner, **options).examples("test")
    assert found.source == (text if left is None else left)
    assert len(ByteTokenizer().encode(found.source)) <= budget


def test_what_cannot_be_shortened_is_refused(tmp_path, tokenizer):
    given = dict(task=questions(tmp_path), tokenizer=tokenizer)
    with pytest.raises(UserError, match="budget is 0"):
        load_task("shortened", **given, budget=0)
    with pytest.raises(UserError, match="policy is 'middle'"):
        load_task("shortened", **given, budget=5, policy="middle")
    with pytest.raises(UserError, match="no tokenizer in"):
        load_task("shortened", task=given["task"], tokenizer=str(tmp_path / "none"), budget=5)
    with pytest.raises(UserError, match="the kind of python_identifiers is 'tag'"):
        load_task("shortened", task="python_identifiers", tokenizer=tokenizer, budget=5)


def test_the_script_names_its_mistakes_and_the_metric_it_has_not(tmp_path, monkeypatch):
    script = load_script("input_budget")

    def run_of(*tasks):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.json").write_text(json.dumps({"data": {"tasks": tasks}}))
        return ["--workdir", str(tmp_path / "run")]

    with pytest.raises(UserError, match="no run directory"):
        script.main(["--workdir", str(tmp_path / "none")])
    with pytest.raises(UserError, match="a run of 2 tasks; one of a single task"):
        script.main(run_of("squad", "sst2"))
    with pytest.raises(SystemExit):
        script.main([*run_of("squad"), "--budgets", "two"])
    monkeypatch.setattr(script, "evaluate", lambda *given: {"exact_match": 1.0, "f1": 2.0})
    with pytest.raises(UserError, match="--metric is 'bleu'; allowed: exact_match, f1"):
        script.main([*run_of("squad"), "--metric", "bleu"])
    assert script.main(run_of({"name": "squad"})) == 0
