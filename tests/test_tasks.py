"""Tasks give their examples whatever the file's format, name what is malformed, and need no fork."""

import gzip
import io
import json
import lzma
import re
import subprocess
import sys
import tarfile

import pytest
import zstandard

from gpt_jax.errors import UserError
from gpt_jax.tasks import Classify, Dialogue, MultipleChoice, SpanQA, Tagged, Task, TextToText, load_task
from gpt_jax.tasks.base import REGISTRY
from gpt_jax.tasks.e2e import detokenize
from gpt_jax.tasks.examples import KINDS

COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def write(folder, name, text, compression=""):
    path = folder / f"{name}{compression}"
    path.write_bytes(COMPRESS[compression](text.encode()))
    return str(path)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def squad(*paragraphs):
    """SQuAD JSON of (context, [(id, question, [(text, start)])])."""

    def paragraph(context, questions):
        qas = []
        for name, question, answers in questions:
            answers = [{"text": text, "answer_start": start} for text, start in answers]
            qas.append({"id": name, "question": question, "answers": answers})
        return {"context": context, "qas": qas}

    return json.dumps({"data": [{"paragraphs": [paragraph(*p)]} for p in paragraphs]}, indent=1)


def examples(spec, split="train", **options):
    return load_task(spec, **options).examples(split)


def one_line(error):
    return "\n" not in str(error.value)


# Formats.


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("format", ["tsv", "csv", "jsonl"])
def test_tables_give_the_same_examples_in_every_format(tmp_path, format, compression):
    text = {
        "tsv": 'label\ttitle\tbody\n1\t"A\tgood, one\n0\tB\tbad\n',
        "csv": 'label,title,body\n1,"""A","good, one"\n0,B,bad\n',
        "jsonl": '{"label": 1, "title": "\\"A", "body": "good, one"}\n\n{"label": 0, "title": "B", "body": "bad"}\n',
    }[format]
    path = write(tmp_path, f"x.{format}", text, compression)
    found = load_task({"name": "classification", "train": path, "text": "{title}: {body}", "hold_out": 0})
    assert found.labels == ("0", "1")
    assert found.examples("train") == [
        Classify('"A: good, one', "1", where=f"{path}:{1 if format == 'jsonl' else 2}"),
        Classify("B: bad", "0", where=f"{path}:3"),
    ]


def test_a_field_over_several_lines_is_named_by_its_first(tmp_path):
    path = write(tmp_path, "x.csv", 'text,label\n"a\nb",x\nc,y\n')
    assert [e.where for e in examples("classification", train=path, hold_out=0)] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_conll_columns_give_sentences(tmp_path, compression):
    text = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\n"
    path = write(tmp_path, "x.conll", text, compression)
    found = load_task("tagging", train=path, hold_out=0)
    assert found.labels == ("B-ORG", "B-PER", "O")
    assert found.examples("train") == [
        Tagged(("EU", "rejects"), ("B-ORG", "O"), where=f"{path}:3"),
        Tagged(("Peter",), ("B-PER",), where=f"{path}:7"),
    ]
    assert examples("tagging", train=path, tag=1, hold_out=0)[0].tags == ("NNP", "VBZ")


def test_conll_of_tabs_keeps_spaces_inside_a_word(tmp_path):
    path = write(tmp_path, "x.conll", "New York\tB-LOC\n.\tO\n")
    assert examples("tagging", train=path, hold_out=0)[0].words == ("New York", ".")


@pytest.mark.parametrize("compression", COMPRESS)
def test_squad_keeps_each_answer_once_and_names_the_line_of_the_question(tmp_path, compression):
    text = squad(("naïve cats sat", [("q1", "Who sat?", [("cats", 6), ("naïve cats", 0), ("cats", 6)])]))
    path = write(tmp_path, "x.json", text, compression)
    (found,) = examples("squad", train=path, hold_out=0)
    line = next(n for n, line in enumerate(text.split("\n"), 1) if '"q1"' in line)
    where = f"{path}:{line} (question q1)"
    assert found == SpanQA("q1", "Who sat?", "naïve cats sat", (("cats", 6), ("naïve cats", 0)), where=where)


def test_parallel_files_are_read_line_by_line(tmp_path):
    a, b = write(tmp_path, "x.de", "Hallo\r\nWelt\n", ".gz"), write(tmp_path, "x.en", "hello\nworld\n", ".xz")
    found = examples("parallel", train=f"{a},{b}", hold_out=0)
    assert found == [TextToText("Hallo\n", "hello", where=f"{a}:1"), TextToText("Welt\n", "world", where=f"{a}:2")]
    b = write(tmp_path, "y.en", "hello\nworld\nmore\n")
    with pytest.raises(UserError, match=r"y.en:3: .*x.de.gz ends before this line"):
        examples("parallel", train=f"{a},{b}", hold_out=0)


def test_text_choices_and_dialogues_are_read_from_jsonl(tmp_path):
    path = write(tmp_path, "t.jsonl", lines({"en": "dog", "de": "Hund", "all": ["Hund", "Köter"]}))
    task = {"name": "text_to_text", "train": path, "source": "{{en}} {en}:", "target": "{de}", "hold_out": 0}
    assert examples(task) == [TextToText("{en} dog:", "Hund", where=f"{path}:1")]
    assert examples(task, references="all")[0].references == ("Hund", "Köter")
    path = write(tmp_path, "c.jsonl", lines({"ctx": "He", "endings": ["runs", "ran away"], "label": "1"}))
    task = {"name": "multiple_choice", "valid": path, "prompt": "{ctx}", "choices": "endings", "answer": "label"}
    assert examples(task, "valid") == [MultipleChoice("He", ("runs", "ran away"), 1, where=f"{path}:1")]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    path = write(tmp_path, "d.jsonl", lines({"messages": turns}))
    assert examples("dialogue", train=path, hold_out=0) == [
        Dialogue((("user", "Hi"), ("assistant", "Hello!")), where=f"{path}:1")
    ]


# What is malformed.

BAD = {
    "bad label": ("classification", "x.tsv", "text\tlabel\na\tx\nb\tz\nc\ty\n", 3, "label 'z' is unknown; allowed: x"),
    "empty text": ("classification", "x.tsv", "text\tlabel\na\tx\n \ty\nc\ty\n", 3, "empty text"),
    "empty label": ("classification", "x.tsv", "text\tlabel\na\tx\nb\t\nc\ty\n", 3, "empty label"),
    "empty tag": ("tagging", "x.conll", "a\tO\n\nb\t\n\ne\tB-y\n", 3, "empty tag"),
    "unequal columns": ("classification", "x.tsv", "text\tlabel\na\tx\nb\nc\ty\n", 3, r"1 columns in place of 2"),
    "bad quotes": ("classification", "x.csv", 'text,label\na,x\n"b"c,x\nc,y\n', 3, "expected"),
    "too deep": ("classification", "x.jsonl", '{"text": "a", "label": "x"}\n' + "[" * 200_000, 2, "not JSON"),
    "not JSON": ("classification", "x.jsonl", '{"text": "a", "label": "x"}\n{"text"\n', 2, "not JSON"),
    "no object": ("classification", "x.jsonl", '{"text": "a", "label": "x"}\n[1]\n', 2, "not a JSON object"),
    "no column": ("classification", "x.jsonl", lines({"text": "a", "label": "x"}, {"texts": "b", "label": "x"}), 2,
                  "no column 'text' .did you mean 'texts'.*it has: texts, label"),
    "no text": ("classification", "x.jsonl", lines({"text": "a", "label": "x"}, {"text": None, "label": "x"}), 2,
                "holds no text but null"),
    "surrogate": ("classification", "x.jsonl", '{"text": "a", "label": "x"}\n{"text": "\\ud800", "label": "x"}\n', 2,
                  "half a surrogate pair"),
    "no target": ("text_to_text", "x.jsonl", lines({"source": "a", "target": "x"}, {"source": "b", "target": " "}), 2,
                  "empty target"),
    "unequal conll": ("tagging", "x.conll", "a O\n\nb O\nc\nd O\n\ne O\n", 4, "1 columns in place of 2: 'c'"),
    "unknown tag": ("tagging", "x.conll", "a O\n\nb B-z\n\ne B-y\n", 3, r"tag 'B-z' is unknown"),
    "answer not there": ("span_qa", "x.json",
                         squad(("a cat", [("1", "Who?", [("cat", 2)])]), ("a dog", [("2", "Who?", [("dog", 1)])])),
                         None, r"answer 'dog' is not at character 1 of the context .it stands at 2"),
    "answer nowhere": ("span_qa", "x.json",
                       squad(("a cat", [("1", "Who?", [("cat", 2)])]), ("a dog", [("2", "Who?", [("cow", 2)])])),
                       None, "nor anywhere in it"),
    "no answer": ("span_qa", "x.json",
                  squad(("a cat", [("1", "Who?", [("cat", 2)])]), ("a dog", [("2", "Who?", [])])), None, "no answer"),
    "no question": ("span_qa", "x.json",
                    squad(("a cat", [("1", "Who?", [("cat", 2)])]), ("a dog", [("2", "", [("dog", 2)])])), None,
                    "empty question"),
    "one choice": ("multiple_choice", "x.jsonl", lines({"prompt": "a", "choices": ["x", "y"], "answer": 0},
                                                      {"prompt": "a", "choices": ["x"], "answer": 0}), 2, "1 choices"),
    "no such choice": ("multiple_choice", "x.jsonl", lines({"prompt": "a", "choices": ["x", "y"], "answer": 0},
                                                          {"prompt": "a", "choices": ["x", "y"], "answer": 2}), 2,
                       "answer 2 is not one of the choices 0 to 1"),
    "no number": ("multiple_choice", "x.jsonl", lines({"prompt": "a", "choices": ["x", "y"], "answer": "1"},
                                                     {"prompt": "a", "choices": ["x", "y"], "answer": "\u00b2"}), 2,
                  "column 'answer' is '\u00b2'; the number of a choice"),
    "no turns": ("dialogue", "x.jsonl", lines({"messages": [{"role": "user", "content": "a"}]}, {"messages": []}), 2,
                 "no turns"),
    "empty turn": ("dialogue", "x.jsonl", lines({"messages": [{"role": "user", "content": "a"}]},
                                               {"messages": [{"role": "user", "content": ""}]}), 2,
                   "empty text of turn 0"),
}  # fmt: skip
LABELS = {"bad label": ("x", "y"), "unknown tag": ("O", "B-y")}


@pytest.mark.parametrize("what", BAD)
def test_a_malformed_example_is_named_with_file_and_line_and_can_be_skipped_and_counted(tmp_path, what):
    kind, name, text, line, says = BAD[what]
    path = write(tmp_path, name, text)
    spec = {"name": kind, "train": path, "hold_out": 0}
    if what in LABELS:
        spec["labels"] = LABELS[what]
    where = f"{name}:{line}" if line else rf"{name}:\d+ \(question 2\)"
    with pytest.raises(UserError, match=f"{where}: .*{says}") as error:
        examples(spec)
    assert one_line(error)
    task = load_task(spec, malformed="skip")
    whole = {"bad quotes": 2, "tagging": 2, "classification": 2}
    assert len(task.examples("train")) == (whole[kind] if kind in whole and name != "x.jsonl" else 1)
    assert task.skipped["train"].count == 1
    (message,) = task.skipped["train"].messages
    assert message.startswith(path)


GOOD = {"id": "1", "question": "Who?", "answers": [{"text": "cat", "answer_start": 2}]}
SQUAD = {
    "article without paragraphs": ({"title": "x"}, r"\(article 2.*no list under 'paragraphs'"),
    "no article": (3, r"\(article 2.*no list under 'paragraphs'"),
    "paragraphs are no list": ({"paragraphs": {"qas": []}}, r"\(article 2.*no list under 'paragraphs'"),
    "paragraph without questions": ({"paragraphs": [{"context": "a"}]}, r"\(article 2, paragraph 1.*no list under"),
    "question is a text": ({"paragraphs": [{"context": "a", "qas": ["Who?"]}]}, r"\(article 2, paragraph 1, quest"),
    "no answers": ({"paragraphs": [{"context": "a", "qas": [{"id": "2", "question": "Who?"}]}]},
                   r":\d+ \(question 2\): no list under 'answers'"),
    "start is a text": ({"paragraphs": [{"context": "a", "qas": [
        {"id": "2", "question": "Who?", "answers": [{"text": "a", "answer_start": "0"}]}]}]},
        r":\d+ \(question 2\): no whole number under 'answer_start'"),
    "question is null": ({"paragraphs": [{"context": "a", "qas": [GOOD | {"id": "2", "question": None}]}]},
                         r":\d+ \(question 2\): no text under 'question'"),
    "context is null": ({"paragraphs": [{"context": None, "qas": [GOOD | {"id": "2"}]}]},
                        r":\d+ \(question 2\): no text under 'context'"),
}  # fmt: skip


@pytest.mark.parametrize("what", SQUAD)
def test_what_is_wrong_in_a_squad_file_is_malformed_with_its_place(tmp_path, what):
    article, says = SQUAD[what]
    good = {"paragraphs": [{"context": "a cat", "qas": [GOOD]}]}
    path = write(tmp_path, "x.json", json.dumps({"data": [good, article, good]}, indent=1))
    with pytest.raises(UserError, match=rf"x.json.*{says}") as error:
        examples("span_qa", train=path, hold_out=0)
    assert one_line(error)
    task = load_task("span_qa", train=path, hold_out=0, malformed="skip")
    assert len(task.examples("train")) == 2 and task.skipped["train"].count == 1


@pytest.mark.parametrize("data", [{"paragraphs": []}, "text", None])
def test_a_json_file_without_articles_is_no_squad_file(tmp_path, data):
    path = write(tmp_path, "x.json", json.dumps({"data": data}))
    with pytest.raises(UserError, match="x.json: no SQuAD file: a JSON object with a list under 'data' is needed"):
        examples("span_qa", train=path, hold_out=0)


def test_a_column_that_a_conll_file_lacks_is_named(tmp_path):
    path = write(tmp_path, "x.conll", "a O\nb O\n\nc B\n")
    for options in ({"tag": 5}, {"tag": -3}, {"word": 2}):
        with pytest.raises(UserError, match=r"x.conll:1: no column (5|-3|2) in 2 columns"):
            examples("tagging", train=path, labels=("O", "B"), hold_out=0, **options)


def test_an_empty_label_is_no_class(tmp_path):
    path = write(tmp_path, "x.tsv", "text\tlabel\na\tx\nfoo\t\nc\ty\n")
    assert load_task("classification", train=path, hold_out=0).labels == ("x", "y")
    assert Classify("a", " ", where="here").problem(()) == "empty label"


def test_half_a_surrogate_pair_is_malformed_where_examples_are_held_out_by_their_hash_too(tmp_path):
    rows = [{"text": f"text {i}", "label": "x"} for i in range(50)] + [{"text": "\ud800", "label": "x"}]
    task = load_task("classification", train=write(tmp_path, "x.jsonl", lines(*rows)), malformed="skip", hold_out=0.1)
    assert sum(len(task.examples(split)) for split in ("train", "valid")) == 50
    assert sum(skipped.count for skipped in task.skipped.values()) == 1
    with pytest.raises(UserError, match="x.jsonl:51: .*half a surrogate pair"):
        for split in ("train", "valid"):
            examples("classification", split, train=write(tmp_path, "x.jsonl", lines(*rows)), hold_out=0.1)


def test_skipping_counts_all_and_shows_the_first_few(tmp_path):
    path = write(tmp_path, "x.tsv", "text\tlabel\n" + "a\tx\n" + "\tx\n" * 50)
    task = load_task("classification", train=path, malformed="skip", hold_out=0)
    task.examples("train")
    assert task.skipped["train"].count == 50
    assert [m.split(":")[1] for m in task.skipped["train"].messages] == ["3", "4", "5", "6", "7"]


def test_a_split_without_a_valid_example_is_an_error_that_says_why(tmp_path):
    path = write(tmp_path, "x.tsv", "text\tlabel\na\tx\n")
    with pytest.raises(UserError, match=r"1 are malformed, the first: .*x.tsv:2: no column 'body'"):
        examples("classification", train=path, text="{body}", labels=("x",), malformed="skip", hold_out=0)
    with pytest.raises(UserError, match="its data is empty"):
        examples("classification", train=write(tmp_path, "y.tsv", "text\tlabel\n"), labels=("x",), hold_out=0)


@pytest.mark.parametrize(
    "kind, item, says",
    [
        ("tag", Tagged(("a", "b"), ("O",)), "2 words but 1 tags"),
        ("text_to_text", TextToText("a", "b", ("c",)), "the target is not among the references"),
        ("tag", Classify("a", "x"), "a Classify in a task of kind 'tag'"),
        ("span_qa", SpanQA("1", "q", "c", ()), "no answer"),
    ],
)
def test_examples_built_by_hand_are_checked_too(kind, item, says):
    with pytest.raises(UserError, match=says):
        Task("x", kind, ("accuracy",), {"train": lambda: [item]}).examples("train")


# Naming, options, limits.


def test_a_task_of_ones_own_is_named_by_file_or_import_path(tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from gpt_jax.tasks import Classify, Task\n"
        "@dataclasses.dataclass\nclass Needs:\n    a: int\n"  # needs the module to be registered
        "def shout(mark='!', times=1):\n"
        "    data = lambda: [Classify('hey' + mark * times, 'loud'), Classify('hey', 'calm')]\n"
        "    return Task('shout', 'classify', ('accuracy',), {'train': data}, ('calm', 'loud'))\n"
        "READY = shout('?')\n"
        "def nothing(): return 5\n"
        "NUMBER = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = f"{tmp_path}/own_tasks.py"
    assert examples("own_tasks:shout")[0].text == "hey!"
    assert examples(f"{file}:shout", mark="#")[0].text == "hey#"
    assert examples({"name": "own_tasks:shout", "times": 3})[0].text == "hey!!!"
    assert examples({"name": f"{file}:READY", "limit": 1}) == [Classify("hey?", "loud")]
    for spec, options, says in [
        ("own_tasks:shouts", {}, "cannot import 'own_tasks:shouts'"),
        (f"{file}:shuot", {}, "declares no 'shuot' .did you mean 'shout'"),
        (f"{file}:nothing", {}, "returned a int"),
        (f"{file}:NUMBER", {}, "is a int, neither a Task nor a function"),
        (f"{file}:READY", {"mark": "!"}, "no option 'mark'.*it takes: malformed, limit, limit_per_class"),
        (f"{tmp_path}/none.py:x", {}, "no such file"),
        ("own_tasks:shout", {"tmies": 2}, "no option 'tmies' .did you mean 'times'"),
        ("sst", {}, "unknown task 'sst' .did you mean 'sst2'"),
        ("classification", {}, "needs the option 'train'"),
        ("babi:21", {}, "number is 21; allowed: 1 to 20"),
        ("babi:x", {}, "'x' is no number"),
        ("babi:\u00b2", {}, "'\u00b2' is no number"),
        ("sst2", {"malformed": "ignore"}, "malformed is 'ignore'"),
        ("sst2", {"limit": -1}, "limit is -1"),
        ("sst2", {"limit": {"trian": 1}}, "split of limit is 'trian' .did you mean 'train'"),
        ("babi", {"limit_per_class": 5}, "needs classes"),
        ("squad_generate", {"generate": "title"}, "generate is 'title'"),
    ]:
        with pytest.raises(UserError, match=says) as error:
            load_task(spec, **options)
        assert one_line(error)
    with pytest.raises(UserError, match="metric is 'blue' .did you mean 'bleu'"):
        Task("x", "text_to_text", ("blue",), {})
    with pytest.raises(UserError, match="metric is 'bleu'"):
        Task("x", "classify", ("bleu",), {})
    with pytest.raises(UserError, match="split of task shout is 'test'"):
        examples("own_tasks:shout", "test")


def test_a_variable_that_is_not_set_is_one_line(monkeypatch):
    monkeypatch.delenv("GPT_JAX_DATA", raising=False)
    for name in ("sst2", "squad", "babi:3", "e2e"):
        with pytest.raises(UserError, match="needs the environment variable GPT_JAX_DATA, which is not set") as error:
            examples(name)
        assert one_line(error)


def test_limits_take_the_first_of_a_split_or_of_each_class(tmp_path):
    rows = [f"t{i}\t{'ab'[i % 3 == 0]}" for i in range(30)]
    path = write(tmp_path, "x.tsv", "text\tlabel\n" + "\n".join(rows) + "\n")
    spec = {"name": "classification", "train": path, "valid": path}
    assert [e.text for e in examples(spec, limit=3)] == ["t0", "t1", "t2"]
    assert [e.text for e in examples(spec, limit_per_class=2)] == ["t0", "t1", "t2", "t3"]
    assert [e.text for e in examples(spec, limit_per_class=3)] == ["t0", "t1", "t2", "t3", "t4", "t6"]
    limited = load_task(spec, limit={"train": 5})
    assert len(limited.examples("train")) == 5 and len(limited.examples("valid")) == 30


def test_held_out_examples_are_a_part_that_equal_texts_share(tmp_path):
    rows = [f"t{i % 200}\tx" for i in range(400)]
    path = write(tmp_path, "x.tsv", "text\tlabel\n" + "\n".join(rows) + "\n")
    task = load_task("classification", train=path, hold_out=0.3)
    train, valid = ([e.text for e in task.examples(split)] for split in ("train", "valid"))
    assert sorted(train + valid) == sorted(row.split("\t")[0] for row in rows)
    assert not set(train) & set(valid)
    assert 80 < len(valid) < 160
    assert "valid" not in load_task("classification", train=path, hold_out=0).splits


def test_scores_are_given_for_all_and_by_group():
    items = [TextToText("q", "a", group="g1"), TextToText("q", "b", group="g1"), TextToText("q", "c", group="g2")]
    task = Task("x", "text_to_text", ("accuracy", "exact_match"), {"test": lambda: items})
    assert task.score(["a", "x", "c"], items) == pytest.approx(
        {
            "accuracy": 2 / 3,
            "accuracy/g1": 0.5,
            "accuracy/g2": 1,
            "exact_match": 200 / 3,
            "exact_match/g1": 50,
            "exact_match/g2": 100,
        }
    )
    with pytest.raises(UserError, match="2 predictions for 3 examples"):
        task.score(["a", "b"], items)


def test_a_metric_of_ones_own_is_named_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text("def length(p, g, labels): return sum(map(len, p)) / len(p)\n")
    monkeypatch.syspath_prepend(tmp_path)
    items = [TextToText("q", "a"), TextToText("q", "b")]
    assert Task("x", "text_to_text", ("own_metric:length",), {}).score(["abc", "a"], items) == {"length": 2.0}


def test_every_registered_task_loads_without_its_data(tmp_path, monkeypatch):
    monkeypatch.delenv("GPT_JAX_DATA", raising=False)
    needs_files = {"classification", "text_to_text", "parallel", "tagging", "span_qa", "multiple_choice", "dialogue"}
    needs_files |= {"preferences"}
    for name in set(REGISTRY) - {"shortened"}:  # of another task
        labels = {"labels": ("x",)} if name in ("classification", "tagging") else {}
        task = load_task(name, **({"train": "x", **labels} if name in needs_files else {}))
        assert task.kind in KINDS and task.metrics and {"train", "valid"} <= set(task.splits)


def test_tasks_and_their_registry_import_no_jax():
    code = "import sys, gpt_jax.tasks.base as b, gpt_jax.options as o\n"
    code += "[o.import_path(p) for p in b.REGISTRY.values()]\n"
    code += "assert not {'jax', 'sklearn', 'sacrebleu', 'nltk'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The tasks with data of their own, on small files.


def test_sst2_names_its_classes(tmp_path):
    path = write(tmp_path, "x.tsv", 'a " film\t1\nbad\t0\n', ".xz")
    found = examples("sst2", train=path, template="Review: {text}")
    assert [(e.text, e.label) for e in found] == [('Review: a " film', "positive"), ("Review: bad", "negative")]
    with pytest.raises(UserError, match=r"y.tsv:1: label '2' is unknown; allowed: 0, 1"):
        examples("sst2", train=write(tmp_path, "y.tsv", "x\t2\n"))


@pytest.mark.parametrize(
    "tokens, text",
    [
        ("The Eagle is family - friendly , near Café Rouge .", "The Eagle is family-friendly, near Café Rouge."),
        ("It costs £ 20 - 25 ; it 's rated 5 !", "It costs £20-25; it's rated 5!"),
        ("name[The Mill], priceRange[more than £ 30]", "name[The Mill], priceRange[more than £30]"),
        ("they do n't and we 'll", "they don't and we'll"),
        ("It is written as it should be, for £20-25.", "It is written as it should be, for £20-25."),
    ],
)
def test_e2e_tokens_are_joined(tokens, text):
    assert detokenize(tokens) == text


def test_e2e_groups_the_texts_of_one_meaning_where_it_is_scored(tmp_path):
    text = lines(*({"mr": mr, "ref": ref} for mr, ref in ("ax", "by", ("a", "z ."), "ax")))
    path = write(tmp_path, "x.jsonl", text)
    task = load_task("e2e", train=path, test=path, template="{mr}:")
    assert [(e.source, e.references) for e in task.examples("train")] == [
        *[("a:", ("x",)), ("b:", ("y",)), ("a:", ("z.",)), ("a:", ("x",))]
    ]
    assert [(e.source, e.target, e.references) for e in task.examples("test")] == [
        ("a:", "x", ("x", "z .")),
        ("b:", "y", ("y",)),
    ]


def test_multi30k_has_two_directions(tmp_path):
    path = write(tmp_path, "x.jsonl", lines({"de": "Hallo ", "en": "hello"}))
    assert examples("multi30k", train=path)[0] == TextToText("Hallo\n", "hello", where=f"{path}:1")
    assert examples("multi30k", train=path, source="en", target="de")[0].target == "Hallo"


def test_scitldr_joins_sentences_and_keeps_all_summaries(tmp_path):
    path = write(tmp_path, "x.jsonl", lines({"source": ["One.\n", " Two."], "target": ["a ", "b"], "title": "T"}))
    (found,) = examples("scitldr", train=path, template="{title}: {source} =>")
    assert (found.source, found.target, found.references) == ("T: One. Two. =>", "a", ("a", "b"))
    assert examples("scitldr", train=path, sentences=1)[0].source == "One.\nTL;DR:\n"
    with pytest.raises(UserError, match=r"y.jsonl:1: column 'target' is no list"):
        examples("scitldr", train=write(tmp_path, "y.jsonl", lines({"source": ["a"], "target": "b"})))


def test_squad_generation_asks_or_answers_on_the_splits_of_squad(tmp_path):
    paragraphs = [(f"cat {i} sat", [(f"{i}{j}", f"Who {j}?", [("cat", 0), (f"cat {i}", 0)]) for j in "ab"])
                  for i in range(40)]  # fmt: skip
    path = write(tmp_path, "x.json", squad(*paragraphs))
    asked = load_task("squad_generate", train=path, test=path, hold_out=0.3)
    answered = load_task("squad_generate", generate="answer", train=path, test=path, hold_out=0.3)
    spans = load_task("squad", train=path, test=path, hold_out=0.3)
    for split in ("train", "valid", "test"):
        where = [e.where for e in spans.examples(split)]
        assert [e.where for e in asked.examples(split)] == where == [e.where for e in answered.examples(split)]
    assert 2 < len(spans.examples("valid")) < 60
    assert asked.examples("test")[1] == TextToText(
        "cat 0 sat\nAnswer: cat\nQuestion:\n", "Who b?", where=asked.examples("test")[1].where
    )
    found = answered.examples("test")[0]
    assert (found.source, found.references) == ("cat 0 sat\nQuestion: Who a?\nAnswer:\n", ("cat", "cat 0"))


def babi_archive(folder, files):
    path = folder / "babi.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"en/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return str(path)


STORY = "1 Mary went home.\n2 John ran.\n3 Where is Mary? \thome\t1\n4 Mary ran.\n5 Where is John? \tpark\t2\n"


def test_babi_stories_end_where_the_question_is_asked(tmp_path):
    files = {f"qa{n}_x_{split}.txt": STORY for n in range(1, 21) for split in ("train", "test")}
    files["qa2_x_test.txt"] = "1 Bill ate.\n2 Who ate?\tBill\t1\n" * 2
    path = babi_archive(tmp_path, files)
    first, second = examples("babi:1", "test", path=path)
    assert first.source == "Mary went home.\nJohn ran.\nWhere is Mary?\n" and first.target == "home"
    assert second.source == "Mary went home.\nJohn ran.\nMary ran.\nWhere is John?\n"
    assert second.where.endswith("babi.tar.xz/qa1_x_test.txt:5") and second.group == ""
    assert [e.source for e in examples("babi:2", "test", path=path)] == ["Bill ate.\nWho ate?\n"] * 2
    everything = examples("babi", "test", path=path)
    assert [e.group for e in everything] == [f"qa{n}" for n in range(1, 21)] * 2
    with pytest.raises(UserError, match="has no file qa3_...test.txt"):
        examples("babi:3", "test", path=babi_archive(tmp_path, {"qa33_x_test.txt": STORY}))


def test_babi_holds_out_whole_stories_from_question_900_on(tmp_path):
    path = babi_archive(tmp_path, {"qa1_x_train.txt": "1 A.\n2 q?\ta\t1\n" * 899 + STORY + STORY + STORY})
    task = load_task("babi:1", path=path)
    # The story with questions 899 and 900 begins before 900.
    assert len(task.examples("train")) == 901 and len(task.examples("valid")) == 4


def test_babi_names_lines_that_are_no_story(tmp_path):
    text = STORY + "hello\n1 A.\n2 q?\ta\t7\n3 q?\ta\n4 q?\ta\t1\n\u00b2 B.\n"
    path = babi_archive(tmp_path, {"qa1_x_train.txt": text})
    task = load_task("babi:1", path=path, malformed="skip")
    assert len(task.examples("train")) == 3
    assert [m.split(":")[1:3] for m in task.skipped["train"].messages] == [
        ["6", " no number before the text 'hello'"],
        ["8", " not question, answer and numbers of earlier statements"],
        ["9", " not question, answer and numbers of earlier statements"],
        ["11", " no number before the text '\u00b2 B.'"],
    ]


# The real data.

COUNTS = {
    "sst2": (6920, 872, 1821),
    "wnut17": (3394, 1009, 1287),
    "multi30k": (29000, 1014, 1000),
    "scitldr": (1992, 619, 618),
    "e2e": (42061, 547, 630),
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_splits_have_their_published_sizes(name, data_folder):
    task = load_task(name)
    assert tuple(len(task.examples(split)) for split in ("train", "valid", "test")) == COUNTS[name]


def test_real_e2e_has_all_references_and_its_training_text_looks_like_the_others(data_folder):
    task = load_task("e2e")
    test = task.examples("test")
    with lzma.open(data_folder / "generate/e2e_test.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [tuple(json.loads(line).values()) for line in file]
    assert len(rows) == 4693
    assert sum(len(e.references) for e in test) == len(set(rows))
    assert {r for e in test for r in e.references} == {reference for _, reference in rows}  # as written
    found = {split: {price for e in task.examples(split) for price in re.findall(r"priceRange\[.*?\]", e.source)}
             for split in ("train", "test")}  # fmt: skip
    assert found["train"] == found["test"]


def test_real_squad_and_ag_news_hold_out_a_part_of_the_training_set(data_folder):
    task = load_task("squad")
    train, valid = task.examples("train"), task.examples("valid")
    assert len(train) + len(valid) == 11877 and 300 < len(valid) < 900
    assert not {e.context for e in train} & {e.context for e in valid}
    assert len(task.examples("test")) == 10570
    task = load_task("ag_news")
    assert len(task.examples("train")) + len(task.examples("valid")) == 13734
    assert len(task.examples("test")) == 7600


@pytest.mark.parametrize("number", [1, 17, 19])
def test_real_babi_has_a_thousand_questions_each(number, data_folder):
    task = load_task(f"babi:{number}")
    assert len(task.examples("train")) + len(task.examples("valid")) == len(task.examples("test")) == 1000
    assert len(task.examples("valid")) >= 95
