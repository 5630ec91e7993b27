"""Benchmarks: prompts and demonstrations by GPT-3's rules, and figures in closed form under planted scores."""

import io
import json
import math
import tarfile

import numpy as np
import pytest

from gpt_jax.benchmarks import Benchmark, Item, base, load_benchmark, run_benchmark
from gpt_jax.benchmarks.base import draw_demonstrations, split_items, take
from gpt_jax.benchmarks.files import read_archive
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.score import Score
from gpt_jax.tasks import Classify
from gpt_jax.tasks import base as tasks


class Planted:
    """Scores texts by a function (context, continuation) -> log-probability of each byte of the continuation."""

    def __init__(self, logprob, max_length=10_000):
        self.logprob, self.max_length, self.cut = logprob, max_length, 0
        self.tokenizer, self.seen = ByteTokenizer(["eot"]), []
        self.begin, self.boundary = self.tokenizer.begin, "joint"

    def score(self, pairs):
        self.seen += pairs
        out = []
        for context, continuation in pairs:
            values = np.full(len(continuation.encode()), self.logprob(context, continuation))
            out.append(Score(values, bool(values[0] > -0.5), len(continuation.strip().encode())))
        return out


def benchmark(items, kind="choice", train=None, **settings):
    return Benchmark("made_up", kind, lambda: items, (lambda: train) if train is not None else None, **settings)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_accuracy_and_its_standard_error_in_closed_form():
    # The model always prefers the option of more a's; that is right for 3 items of 4.
    items = [Item(f"q{i}", (" aaaa", " bbbb"), answer=int(i == 3)) for i in range(4)]
    result = run_benchmark(benchmark(items), Planted(lambda c, o: -1.0 if "a" in o else -2.0))
    assert result["accuracy"] == 0.75
    assert result["accuracy_se"] == pytest.approx(np.std([1, 1, 1, 0], ddof=1) / 2)
    assert result["items"] == 4 and result["shots"] == 0 and result["cut"] == 0


def test_each_normalisation_chooses_in_closed_form():
    # log P of a byte is -1 for either option: the sum prefers the short one, the mean sees no difference (half a point
    # each), and the ratio prefers what the context made likelier.
    def logprob(context, option):
        return -1.0 if "Answer" not in context else (-0.5 if "long" in option else -3.0)

    items = [Item("q", (" long long", " b"), answer=1)]
    found = {
        how: run_benchmark(benchmark(items), Planted(logprob), normalisation=how)["accuracy"]
        for how in ("sum", "token", "unconditional")
    }
    assert found == {"sum": 1.0, "token": 0.5, "unconditional": 1.0}  # -10 + 5 = -5 against -2 + 6 = 4
    with pytest.raises(UserError, match=r"normalise is 'bytes' \(did you mean 'byte'"):
        run_benchmark(benchmark(items), Planted(logprob), normalisation="bytes")


def test_a_right_option_that_is_tied_counts_by_the_number_of_the_best():
    value = {"a": -1.0, "b": -1.0, "c": -1.0, "d": -2.0, "e": -3.0}
    options = ((" a", " b", " c"), (" d", " b", " c"), (" a", " b", " e"), (" d", " a", " e"))
    items = [Item(f"q{i}", texts, answer=0) for i, texts in enumerate(options)]
    result = run_benchmark(benchmark(items, normalise="sum"), Planted(lambda c, o: value[o.strip()]))
    assert result["accuracy"] == result["accuracy_sum"] == pytest.approx((1 / 3 + 0 + 1 / 2 + 0) / 4)
    assert result["accuracy_sum_first"] == 2 / 4
    distinct = run_benchmark(benchmark(items[3:], normalise="sum"), Planted(lambda c, o: value[o.strip()]))
    assert "accuracy_sum_first" not in distinct
    lost = run_benchmark(benchmark(items, normalise="sum"), Planted(lambda c, o: math.nan))
    assert lost["accuracy"] == 0


def test_greedy_items_give_accuracy_and_perplexity():
    items = [Item("a", (" xy",)), Item("b", (" xyz",))]
    result = run_benchmark(benchmark(items, "greedy"), Planted(lambda c, o: -0.25 if c == "a" else -1.0))
    assert result["accuracy"] == 0.5
    assert result["perplexity"] == pytest.approx(math.exp((0.75 + 4.0) / 2))  # per item, as LAMBADA's is
    assert result["perplexity_se"] == pytest.approx(result["perplexity"] * np.std([0.75, 4.0], ddof=1) / math.sqrt(2))


def test_groups_count_alike_and_are_limited_each():
    items = [
        Item(f"{g}{i}", (" a", " b"), answer=int(g == "y"), group=g) for g, n in (("x", 30), ("y", 6)) for i in range(n)
    ]
    result = run_benchmark(benchmark(items), Planted(lambda c, o: -1.0 if "a" in o else -2.0), limit=4)
    assert result["items"] == 8 and result["groups"]["x"]["accuracy"] == 1 and result["groups"]["y"]["accuracy"] == 0
    assert result["accuracy"] == 0.5 and result["accuracy_se"] == 0
    assert [item.context for item in take(items, 2)] == ["x0", "x15", "y0", "y3"]


def test_an_option_is_judged_in_its_own_context():
    item = Item("", (" was big",) * 2, answer=1, contexts=("the trophy", "the suitcase"))
    scorer = Planted(lambda c, o: -1.0 if "suitcase" in c else -2.0)
    assert run_benchmark(benchmark([item]), scorer)["accuracy"] == 1
    assert scorer.seen == [("the trophy", " was big"), ("the suitcase", " was big")]


# -- demonstrations ------------------------------------------------------------------------------------------------


def test_demonstrations_are_drawn_per_item_from_train_and_never_contain_it():
    pool = [Item(f"t{i}", (f" {i}",), document=f"d{i % 7}") for i in range(14)]
    draws = {}
    for index in range(50):
        item = Item(f"q{index}", (" a",), document=f"d{index % 7}")
        drawn = draw_demonstrations(pool, item, 5, 3)
        draws[index] = [d.context for d in drawn]
        assert len(set(draws[index])) == 5 and all(d.document != item.document for d in drawn)
        assert draw_demonstrations(pool, item, 5, 3) == drawn
    assert len({tuple(d) for d in draws.values()}) > 45  # anew for each item
    assert draws[0] != [d.context for d in draw_demonstrations(pool, Item("q0", (" a",), document="d0"), 5, 4)]
    with pytest.raises(UserError, match="13 demonstrations are asked for, but there are 12"):
        draw_demonstrations(pool, Item("q", (" a",), document="d1"), 13, 0)


def test_demonstrations_are_of_the_items_own_group():
    pool = [Item(f"t{i}", (f" {i}",), group="xyz"[i % 3]) for i in range(30)]
    for index in range(10):
        drawn = draw_demonstrations(pool, Item(f"q{index}", (" a",), group="y"), 8, 0)
        assert [one.group for one in drawn] == ["y"] * 8
    with pytest.raises(UserError, match="11 demonstrations are asked for, but there are 10"):
        draw_demonstrations(pool, Item("q", (" a",), group="y"), 11, 0)
    other = draw_demonstrations(pool, Item("q", (" a",), group="w"), 11, 0)  # a group that the pool has nothing of
    assert len(other) == 11 and len({one.group for one in other}) == 3


def test_a_prompt_does_not_change_with_the_limit():
    train = [Item(f"t{i}", (f" {i}",)) for i in range(40)]
    items = [Item(f"q{i}", (" a", " b")) for i in range(12)]
    prompts = []
    for limit in (0, 3):
        scorer = Planted(lambda c, o: -1.0)
        run_benchmark(benchmark(items, train=train), scorer, shots=3, limit=limit)
        prompts.append({context.rpartition("\n\n")[2]: context for context, _ in scorer.seen})
    every, some = prompts
    assert len(every) == 12 and set(some) == {"q0", "q4", "q8"}
    assert all(every[name] == context for name, context in some.items())


def test_a_prompt_is_demonstrations_with_their_answers_and_then_the_item():
    train = [Item("Q: 1+1\nA:", (" 3", " 2"), answer=1)]
    items = [Item("Q: 2+2\nA:", (" 4", " 5"))]
    scorer = Planted(lambda c, o: -1.0)
    assert run_benchmark(benchmark(items, train=train), scorer, shots=1)["shots"] == 1
    assert scorer.seen == [("Q: 1+1\nA: 2\n\nQ: 2+2\nA:", " 4"), ("Q: 1+1\nA: 2\n\nQ: 2+2\nA:", " 5")]


def test_demonstrations_that_do_not_fit_are_left_out_whole():
    train = [Item(f"question {i}", (" answer",)) for i in range(4)]
    items = [Item("question x", (" answer", " other"))]
    scorer = Planted(lambda c, o: -1.0, max_length=3 * len("question 0 answer\n\n"))
    assert run_benchmark(benchmark(items, train=train), scorer, shots=4)["shots"] == 2
    assert scorer.seen[0][0].count("answer") == 2 and scorer.seen[0][0].endswith("\n\nquestion x")


class Wordy(ByteTokenizer):
    """A space after a line's end makes a token of its own: a text has more tokens than its parts."""

    def encode(self, text):
        return super().encode(text.replace("\n\nquestion", "\n\n~question"))


@pytest.mark.parametrize("kind", ["choice", "generate"])
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(["eot"]), Wordy(["eot"])])
def test_a_prompt_that_was_fitted_loses_no_token(kind, tokenizer):
    train = [Item(f"question {i}", (" answer",)) for i in range(6)]
    items = [Item("question x", (" answer", " other"))]
    shown = []
    for length in range(60, 130):
        scorer = Planted(lambda c, o: -1.0, max_length=length)
        scorer.tokenizer = tokenizer
        texts = []

        def generate(prompts, max_tokens, stop, scorer=scorer, texts=texts):
            texts += base.fit_texts(scorer, prompts, max_tokens)
            return ["answer"] * len(prompts)

        bench = benchmark(items, kind, train=train, max_tokens=9, score=lambda p, found: {"accuracy": 1.0})
        result = run_benchmark(bench, scorer, shots=6, generate=generate)
        shown.append(result["shots"])
        assert result["cut"] == 0 and (texts or scorer.seen[0])[0].count("answer") == result["shots"]
        for context, option in scorer.seen:
            assert len(tokenizer.encode(context + option)) <= length
    assert shown == sorted(shown) and shown[0] >= 1 and len(set(shown)) > 3


def test_without_training_examples_a_part_of_the_items_demonstrates_and_is_not_scored():
    items = [Item(f"q{i}", (" a", " b")) for i in range(400)]
    assert split_items(benchmark(items), 0) == (items, [])
    kept, pool = split_items(benchmark(items), 2)
    assert 20 <= len(pool) <= 65 and len(kept) + len(pool) == 400
    assert not {item.context for item in kept} & {item.context for item in pool}
    with pytest.raises(UserError, match="takes no demonstrations: --shots must be 0, not 2"):
        split_items(benchmark(items, demonstrations=False), 2)


# -- files and tasks ---------------------------------------------------------------------------------------------------


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_multiple_choice_and_cloze_read_files_of_your_own(tmp_path):
    file = write(tmp_path / "a.jsonl", {"prompt": "Two and two is ", "choices": ["four", "five"], "answer": 0})
    (item,) = load_benchmark(f"choices:{file}").items()
    assert item.pairs == [("Two and two is", " four"), ("Two and two is", " five")]
    file = write(
        tmp_path / "b.jsonl",
        {"text": "The ____ is too big.", "options": ["cup", "hat"], "answer": 1},
        {"text": "Alice met her friend ____.", "options": ["Bob", "tree"], "answer": 0},
    )
    partial, end = load_benchmark(f"cloze:{file}").items()
    assert partial.pairs == [("The cup", " is too big."), ("The hat", " is too big.")]
    assert end.pairs == [("Alice met her friend", " Bob."), ("Alice met her friend", " tree.")]


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("choices", {"prompt": "a", "choices": ["b"], "answer": 0}, "'choices' is no list of at least two"),
        ("choices", {"prompt": "a", "choices": ["b", "c"], "answer": 2}, "answer 2 is not one of the options 0 to 1"),
        ("choices", {"prompt": 3, "choices": ["b", "c"], "answer": 0}, "no text under 'prompt'"),
        ("cloze", {"text": "none", "options": ["b", "c"], "answer": 0}, "no blank ____"),
    ],
)
def test_a_malformed_file_is_told_with_file_and_line(tmp_path, name, row, said):
    good = {"prompt": "a", "choices": ["b", "c"], "answer": 0, "text": "____", "options": ["b", "c"]}
    file = write(tmp_path / "bad.jsonl", good, row)
    with pytest.raises(UserError, match=f"bad.jsonl:2: .*{said}"):
        load_benchmark(f"{name}:{file}").items()


def packed(file, text, mode):
    data = text.encode("utf-8", "surrogateescape")
    with tarfile.open(file, f"w:{mode}") as archive:
        member = tarfile.TarInfo("sets/a.jsonl")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("mode", ["xz", "gz", ""])
def test_a_damaged_archive_is_told_in_a_line(tmp_path, mode):
    rng = np.random.default_rng(0)
    rows = [{"context": rng.bytes(40).hex(), "completion": " 4"} for _ in range(300)]
    whole = tmp_path / "whole.tar"
    packed(whole, "".join(json.dumps(row) + "\n" for row in rows), mode)
    assert len(list(read_archive(str(whole), context=str))) == 300
    data, cut = whole.read_bytes(), tmp_path / "cut.tar"
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    damaged = [data[: len(data) * part // 8] for part in range(6)] + ([bytes(flipped)] if mode == "xz" else [])
    for content in damaged:
        cut.write_bytes(content)
        with pytest.raises(UserError, match=r"cut\.tar.*(cannot be read|not JSON)") as error:
            list(read_archive(str(cut), context=str))
        assert "\n" not in str(error.value)
    packed(cut, '{"context": "caf\udce9"}\n', mode)
    with pytest.raises(UserError, match=r"cut\.tar:sets/a\.jsonl: not valid UTF-8"):
        list(read_archive(str(cut), context=str))


def test_unknown_names_are_told_with_the_closest():
    with pytest.raises(UserError, match=r"unknown benchmark 'lambda' \(did you mean 'lambada'"):
        load_benchmark("lambda")
    with pytest.raises(UserError, match="needs a file: choices:FILE.jsonl"):
        load_benchmark("choices").items()
    with pytest.raises(UserError, match="kind 'tag' has no few-shot form"):
        load_benchmark("wnut17")
    with pytest.raises(UserError, match="split of task colours is 'test'; allowed: train, valid"):
        load_benchmark("toy_tasks:colours", split="test")
    with pytest.raises(UserError, match="benchmark 3 is neither a name nor a table"):
        load_benchmark(3)


def test_a_classification_task_asks_for_its_labels_in_words():
    bench = load_benchmark("toy_tasks:colours", split="valid")
    item = bench.items()[0]
    assert item.context.endswith("\nAnswer:") and item.options == (" red", " green", " blue")
    scorer = Planted(lambda c, o: -1.0 if o.strip() in c.split("\n\n")[-1] else -2.0)
    result = run_benchmark(bench, scorer, shots=2)
    assert result["accuracy"] == 1 and result["shots"] == 2
    context = scorer.seen[0][0]
    assert context.count("Answer:") == 3
    for block in context.split("\n\n")[:-1]:  # each demonstration ends with the colour that it names
        assert block.rpartition(" ")[2] in block.partition("\n")[0]


def test_examples_of_a_task_keep_their_groups(monkeypatch):
    def read():
        return [Classify(f"text {i}", "good", where=str(i), group="ab"[i % 2]) for i in range(12)]

    task = tasks.Task("grouped", "classify", ("accuracy",), {"train": read, "test": read}, ("good", "bad"))
    monkeypatch.setattr("gpt_jax.benchmarks.supervised.load_task", lambda spec: task)
    bench = load_benchmark("anything:grouped")
    assert [item.group for item in bench.items()] == ["a", "b"] * 6
    scorer = Planted(lambda c, o: -1.0 if o == " good" else -2.0)
    result = run_benchmark(bench, scorer, shots=2, limit=3)
    assert set(result["groups"]) == {"a", "b"} and result["items"] == 6
    for context, _ in scorer.seen:
        numbers = [int(line.split()[1]) % 2 for line in context.split("\n") if line.startswith("text")]
        assert len(numbers) == 3 and len(set(numbers)) == 1


def test_a_text_to_text_task_is_generated_and_scored_by_its_own_metrics():
    bench = load_benchmark("toy_tasks:reverse", split="valid")
    prompts = []

    def generate(texts, max_tokens, stop):
        prompts.extend(texts)
        return [" " + text.rpartition("\n\n")[2][:-1][::-1] for text in texts]

    result = run_benchmark(bench, Planted(lambda c, o: -1.0), shots=2, generate=generate)
    assert result["exact_match"] == 100 and result["exact_match_se"] == 0
    assert all(prompt.count(">") == 3 and prompt.endswith(">") for prompt in prompts)
    wrong = run_benchmark(bench, Planted(lambda c, o: -1.0), generate=lambda t, m, s: ["?"] * len(t))
    assert wrong["exact_match"] == 0


# -- the real ones ---------------------------------------------------------------------------------------------------


def test_the_real_benchmarks_are_read(data_folder):
    lambada = load_benchmark("lambada").items()
    assert (
        len(lambada) == 5153 and lambada[0].options == (" signs",) and lambada[0].context.endswith("don't care about")
    )
    assert load_benchmark("lambada_cloze").items()[0].context.endswith("don't care about ____. ->")
    hellaswag = load_benchmark("hellaswag").items()
    assert (
        len(hellaswag) == 1896 and hellaswag[1].context.startswith("Tango: A group") and len(hellaswag[1].options) == 4
    )
    assert not any("[" in text for item in hellaswag[:200] for text in (item.context, *item.options))
    arithmetic = load_benchmark("arithmetic:two_digit_addition").items()
    assert len(arithmetic) == 2000 and arithmetic[0].context.endswith("\n\nA:")
    for item in arithmetic[:50]:
        a, b = (
            int("".join(c for c in word if c.isdigit())) for word in item.context.split() if any(map(str.isdigit, word))
        )
        assert int(item.options[0]) == a + b
    with pytest.raises(UserError, match="did you mean 'two_digit_addition'"):
        load_benchmark("arithmetic:two_digit_addtion").items()
    squad = load_benchmark("squad").items()
    assert len(squad) == 10570 and squad[0].context.endswith("\nAnswer:")


def test_blimp_has_67_phenomena_of_1000_pairs(data_folder):
    items = load_benchmark("blimp").items()
    names = {item.group for item in items}
    assert len(names) == 67 and len(items) == 67_000
    result = run_benchmark(load_benchmark("blimp"), Planted(lambda c, o: -1.0), limit=3)
    assert len(result["groups"]) == 67 and result["items"] == 201


def test_no_benchmark_hides_a_task_of_its_name():
    assert not set(base.REGISTRY) & set(tasks.REGISTRY)
