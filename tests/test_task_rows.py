"""From tasks to batches: rates, packing, what is delivered when, and sub-batches of a mixture."""

import dataclasses
import sys

import numpy as np
import pytest
import toy_tasks
from scipy import stats

from gpt_jax.config import DataConfig, TokenizerConfig
from gpt_jax.data import prepare_data
from gpt_jax.data.formats import Part, TaskInfo
from gpt_jax.data.task_rows import EncodedTask, load_tasks, mixing_rates
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.objectives.classify import ClassifyRows
from gpt_jax.objectives.supervised import PromptRows
from gpt_jax.tasks import Task, TextToText

TOKENIZER = ByteTokenizer(["eot", "mask", "sep", "cls"])
EOT = TOKENIZER.eot


def prompt_rows(length=24):
    return PromptRows(EOT, length, "target", 8, False)


def classify_rows(length=24):
    return ClassifyRows(EOT, TOKENIZER.specials["sep"], TOKENIZER.specials["cls"], length)


def encoded(task, rows, split="train"):
    info = TaskInfo(0, task.name, task.labels)
    return EncodedTask(task, info, task.examples(split), rows, TOKENIZER, rows.length)


def data_config(*tasks, **settings):
    tokenizer = TokenizerConfig(kind="byte", specials=("eot", "mask", "sep", "cls"))
    return DataConfig(tasks=tasks, tokenizer=tokenizer, **settings)


def prepared(config, rows, tmp_path, batch_size=8, **kwargs):
    return prepare_data(
        config,
        context_length=24,
        batch_size=batch_size,
        seed=0,
        rows=lambda tokenizer: rows,
        cache_dir=tmp_path,
        log=None,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, (0.8067, 0.0076, 0.1806, 0.0051)), (2.0, (0.6061, 0.0588, 0.2868, 0.0483))]
)
def test_rates_are_those_of_t5(temperature, expected):
    sizes = (393_000, 3_700, 88_000, 2_500)
    np.testing.assert_allclose(mixing_rates(sizes, "proportional", 10**9, temperature), expected, atol=5e-5)


def test_a_cap_bounds_and_a_high_temperature_evens_out_the_rates():
    assert mixing_rates((1000, 10), "proportional", 30, 1.0) == [0.75, 0.25]
    np.testing.assert_allclose(mixing_rates((1000, 10), "proportional", 10**9, 1e6), [0.5, 0.5], atol=1e-5)
    assert mixing_rates((1000, 10), "equal", 10**9, 1.0) == [0.5, 0.5]
    with pytest.raises(UserError, match="data.task_temperature is 0.0"):
        mixing_rates((1, 2), "proportional", 10, 0.0)


def test_packed_rows_hold_every_example_once_an_epoch():
    task = toy_tasks.reverse()
    rows = encoded(task, prompt_rows())
    n = rows.rows_per_epoch
    batch = rows.build(np.zeros(n, np.int64), np.arange(n))
    found = []
    for row in range(n):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            assert batch["positions"][row][here].tolist() == list(range(here.sum()))
            last = batch["targets"][row][here][-1]
            found.append((*batch["tokens"][row][here].tolist(), int(last)))
    expected = [
        (EOT, *TOKENIZER.encode(e.source).tolist(), *TOKENIZER.encode(e.target).tolist(), EOT)
        for e in task.examples("train")
    ]
    assert sorted(found) == sorted(expected)
    assert n < len(expected)  # several share a row
    assert (batch["target_weights"][batch["segment_ids"] == 0] == 0).all()


def test_what_does_not_fit_is_cut_but_the_end_of_the_prompt_and_half_a_row_of_target_stay():
    rows = prompt_rows(length=11)  # 12 ids, EOT included
    row = rows.row([EOT, *range(20)], [100, 101, EOT])
    assert row["tokens"].tolist() == [EOT, *range(12, 20), 100, 101]
    assert row["targets"][row["target_weights"] > 0].tolist() == [100, 101, EOT]
    row = rows.row([EOT, *range(20)], list(range(100, 130)))
    assert row["targets"][row["target_weights"] > 0].tolist() == list(range(100, 106))


def test_classes_of_several_tasks_are_counted_through_and_pairs_keep_a_separator():
    tasks, infos = load_tasks(("toy_tasks:colours", "toy_tasks:pairs"), "classify", "")
    assert [info.first_label for info in infos] == [0, 3]
    example = tasks[1].examples("train")[0]
    (row,) = classify_rows().encode(example, infos[1], TOKENIZER)
    specials = TOKENIZER.specials
    text = TOKENIZER.encode(example.text).tolist(), TOKENIZER.encode(example.text_b).tolist()
    assert row["tokens"].tolist() == [EOT, *text[0], specials["sep"], *text[1], specials["cls"]]
    assert row["label"] == 3 + tasks[1].labels.index(example.label)


def test_too_long_a_pair_keeps_half_the_row_for_its_second_text():
    tasks, infos = load_tasks(("toy_tasks:pairs",), "classify", "")
    example = dataclasses.replace(tasks[0].examples("train")[0], text="a" * 50, text_b="b" * 50)
    (row,) = classify_rows(length=12).encode(example, infos[0], TOKENIZER)
    decoded = TOKENIZER.decode(row["tokens"], specials="show")
    assert decoded == "<|eot|>aaaaa<|sep|>bbbb<|cls|>"


def test_batches_of_a_task_depend_on_the_step_alone_and_repeat_few_examples(tmp_path):
    config = data_config({"name": "toy_tasks:colours", "train": 5})
    first, again = (prepared(config, classify_rows(), tmp_path) for _ in range(2))
    for step in (0, 3):
        a, b = first.train.rows(step, slice(0, 8)), again.train.rows(step, slice(2, 6))
        for name, values in a.items():
            np.testing.assert_array_equal(values[2:6], b[name])
    labels = [first.train.rows(step, slice(None))["tokens"] for step in range(5)]
    rows, counts = np.unique(np.concatenate(labels), axis=0, return_counts=True)
    assert len(rows) == 5 and counts.tolist() == [8] * 5  # 40 rows: every example eight times


def test_tasks_of_a_kind_share_the_batch_at_their_rates(tmp_path):
    config = data_config({"name": "toy_tasks:colours", "train": 30}, {"name": "toy_tasks:pairs", "train": 10})
    data = prepared(config, classify_rows(), tmp_path)
    tasks = np.concatenate([data.train.rows(step, slice(None))["task"] for step in range(500)])
    assert stats.chisquare(np.bincount(tasks), np.array([0.75, 0.25]) * len(tasks)).pvalue > 1e-3
    assert list(data.valid) == ["colours", "pairs"]
    assert [info.name for info in data.tasks] == ["colours", "pairs"]


@pytest.mark.parametrize(
    ("settings", "sizes", "expected"),
    [({}, (40, 40), 0.5), ({}, (60, 20), 0.75), ({"task_rates": "equal"}, (60, 20), 0.5)],
)
def test_examples_not_rows_are_drawn_at_the_rates(settings, sizes, expected, tmp_path, monkeypatch):
    def make(name, letters):
        return lambda train: dataclasses.replace(toy_tasks.reverse(train, letters=letters), name=name)

    monkeypatch.setattr(toy_tasks, "short", make("short", 1), raising=False)  # six of these fill a row,
    monkeypatch.setattr(toy_tasks, "long", make("long", 8), raising=False)  # two of these
    names = ({"name": f"toy_tasks:{name}", "train": n} for name, n in zip(("short", "long"), sizes, strict=True))
    data = prepared(data_config(*names, **settings), prompt_rows(), tmp_path)
    drawn = np.zeros(2)
    for step in range(200):
        rows = data.train.rows(step, slice(None))
        np.add.at(drawn, rows["task"], rows["segment_ids"].max(axis=1))
    assert drawn[0] / drawn.sum() == pytest.approx(expected, abs=0.02)


def test_validation_covers_each_example_once_and_pads_with_weight_zero(tmp_path):
    data = prepared(data_config("toy_tasks:colours"), classify_rows(), tmp_path, eval_batch_size=4)
    source = data.valid["valid"]
    assert source.num_batches == 2
    batches = [source.rows(step, slice(None)) for step in range(2)]
    assert np.concatenate([b["row_weights"] for b in batches]).tolist() == [1] * 7 + [0]
    assert (batches[1]["segment_ids"][3] == 0).all()


def test_a_mixture_of_objectives_has_sub_batches_and_validation_of_its_own(tmp_path):
    parts = {
        "lm": Part(None, {"corpus": "python_docs", "tasks": ()}, 2),
        "classify": Part(classify_rows(), {"tasks": ("toy_tasks:colours", "toy_tasks:pairs")}, 4),
        "reverse": Part(prompt_rows(), {"tasks": ("toy_tasks:reverse",)}, 2),
    }
    data = prepared(data_config(), parts, tmp_path)
    assert {name: spec["tokens"].shape for name, spec in data.train.spec().items()} == {
        "lm": (2, 24),
        "classify": (4, 24),
        "reverse": (2, 24),
    }
    assert list(data.valid) == ["lm", "classify/colours", "classify/pairs", "reverse"]
    assert [source.part for source in data.valid.values()] == ["lm", "classify", "classify", "reverse"]
    assert data.bytes["lm/valid"] > 0


def test_a_part_has_the_order_of_its_own_seed(tmp_path):
    def batches(config, own):
        parts = {
            "text": Part(None, {"corpus": "python_docs", "tasks": ()}, 2),
            "tasks": Part(classify_rows(), {"tasks": ("toy_tasks:colours",)}, 4),
        }
        parts = {name: dataclasses.replace(part, data={**part.data, **own}) for name, part in parts.items()}
        train = prepared(config, parts, tmp_path).train
        return {name: part.rows(0, slice(None))["tokens"].tolist() for name, part in train.parts.items()}

    run = batches(data_config(seed=3), {})
    assert run == batches(data_config(seed=0), {"seed": 3}) == batches(data_config(seed=3), {"seed": -1})
    other = batches(data_config(seed=3), {"seed": 0})
    assert all(other[name] != run[name] for name in run)


@pytest.mark.parametrize(
    ("config", "rows", "message"),
    [
        (data_config(), classify_rows(), "trains on tasks of kind 'classify': name one or more in data.tasks"),
        (data_config("toy_tasks:reverse"), classify_rows(), "is of kind .text_to_text.; .* takes .classify."),
        (data_config("toy_tasks:unlabelled"), classify_rows(), "task unlabelled declares no labels"),
        (data_config("toy_tasks:colours", "toy_tasks:colours"), classify_rows(), "names a task twice"),
        (data_config("toy_tasks:colours"), None, "but the objective reads text"),
        (data_config(), {"a": Part(None, {"corpsu": "x"}, 2)}, r"has key 'corpsu' \(did you mean 'corpus'\?\)"),
        (data_config(), {"a": Part(None, {"prefetch": 4}, 2)}, "'prefetch', which all parts share: set data.prefetch"),
        (data_config(), {"a": Part(None, {"tokenizer": {}}, 2)}, "part 'a' has key 'tokenizer', which all parts share"),
        (data_config("toy_tasks:colours", task_rates="fair"), classify_rows(), None),
    ],
)
def test_what_does_not_go_together_is_said_in_a_line(config, rows, message, tmp_path):
    if message is None:  # rates matter only for several tasks
        prepared(config, rows, tmp_path)
        return
    with pytest.raises(UserError, match=message):
        prepared(config, rows, tmp_path)


def test_a_missing_library_of_a_metric_is_said_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    toy_tasks.scored = lambda: dataclasses.replace(toy_tasks.reverse(), metrics=("exact_match", "bleu"))
    with pytest.raises(UserError, match="needs the extra 'tasks'"):
        load_tasks(("toy_tasks:scored",), "text_to_text", "")


def test_malformed_examples_are_counted_where_they_are_skipped(tmp_path):
    lines = []
    task = Task(
        "half",
        "text_to_text",
        ("exact_match",),
        {"train": lambda: [TextToText("a", "b", where="f:1"), TextToText("a", "", where="f:2")]},
        malformed="skip",
    )
    toy_tasks.half = lambda: task
    data = prepare_data(
        data_config({"name": "toy_tasks:half", "malformed": "skip"}),
        context_length=24,
        batch_size=1,
        seed=0,
        rows=lambda tokenizer: prompt_rows(),
        cache_dir=tmp_path,
        log=lines.append,
    )
    counts = data.info["tasks"]["half"]["train"]
    assert len(counts.pop("sha256")) == 64
    assert counts == {"examples": 1, "rows": 1, "skipped": 1}
    assert any("half/train: 1 malformed examples left out, such as f:2: empty target" in line for line in lines)
