"""The harness's figures are ours on the same items, for every type of request; and the command that runs both."""

import json
import math

import jax
import numpy as np
import pytest
from helpers import params_of, tiny

from gpt_jax.benchmarks import Benchmark, Item, run_benchmark
from gpt_jax.benchmarks.base import greedy_texts
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.model import Transformer
from gpt_jax.score import Scorer
from gpt_jax.sharding import make_mesh

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (the extra 'eval') is not installed")

from gpt_jax import lm_eval as adapter


@pytest.fixture(scope="module")
def scorer():
    config = tiny(vocab_size=257, positions="rope", max_positions=64, init_std=0.3)
    return Scorer(Transformer(config), params_of(config), ByteTokenizer(["eot"]))


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Nothing may ask the network."""
    import socket

    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args, **kwargs):
            raise AssertionError("a network connection was attempted")

        patch.setattr(socket.socket, "connect", refuse)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


def words(rng, least, most):
    letters = list("abcdefgh é")
    return "".join(rng.choice(letters, rng.integers(least, most))).strip() or "x"


def choices(count=24, groups=2):
    rng = np.random.default_rng(0)
    return [
        Item(
            words(rng, 0, 20),
            tuple(f" {words(rng, 2, 12)}{i}" for i in range(3)),
            int(rng.integers(3)),
            group=f"g{number % groups}",
        )
        for number in range(count)
    ]


def test_multiple_choice_is_ours_by_sum_and_by_bytes(scorer, tmp_path):
    items = choices()
    native = run_benchmark(Benchmark("made_up", "choice", lambda: items), scorer)
    theirs = adapter.compare(Benchmark("made_up", "choice", lambda: items), scorer, native, tmp_path)
    assert theirs["largest_difference"] < 1e-9
    assert theirs["acc"] == pytest.approx(native["accuracy_sum"])
    assert theirs["acc_bytes"] == pytest.approx(native["accuracy_byte"])
    assert 0 < native["accuracy_sum"] < 1 and native["accuracy_sum"] != native["accuracy_byte"]


def test_the_harness_takes_the_first_of_tied_options(scorer, tmp_path):
    items = [Item("abc", (" de", " de"), answer) for answer in (0, 0, 1)]
    bench = Benchmark("tied", "choice", lambda: items)
    native = run_benchmark(bench, scorer)
    theirs = adapter.compare(bench, scorer, native, tmp_path)
    assert native["accuracy_sum"] == 0.5 and theirs["acc"] == pytest.approx(2 / 3)
    assert theirs["largest_difference"] < 1e-9


def test_sentences_without_a_context_and_greedy_items_are_ours(scorer, tmp_path):
    rng = np.random.default_rng(1)
    pairs = [Item("", (words(rng, 5, 20), words(rng, 5, 20)), 0) for _ in range(12)]
    bench = Benchmark("pairs", "choice", lambda: pairs, normalise="sum")
    native = run_benchmark(bench, scorer)
    assert adapter.compare(bench, scorer, native, tmp_path / "pairs")["largest_difference"] < 1e-9

    contexts = [words(rng, 3, 20) for _ in range(8)]
    likely = greedy_texts(scorer)(contexts, 1, ())
    greedy = [Item(c, (o or "z",)) for c, o in zip(contexts, likely, strict=True)]
    bench = Benchmark("greedy", "greedy", lambda: [*greedy, *(Item(c, (" zq",)) for c in contexts)])
    native = run_benchmark(bench, scorer)
    theirs = adapter.compare(bench, scorer, native, tmp_path / "greedy")
    assert 0 < native["accuracy"] < 1 and theirs["acc"] == native["accuracy"]
    assert theirs["perplexity"] == pytest.approx(native["perplexity"], rel=1e-5)

    spaced = Benchmark("spaced", "greedy", lambda: [Item(c, (" zq",)) for c in contexts])  # as LAMBADA's all begin
    theirs = adapter.compare(spaced, scorer, run_benchmark(spaced, scorer), tmp_path / "spaced")
    assert theirs["largest_difference"] < 1e-5


def task_file(folder, name, rows, **spec):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    common = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", "num_fewshot": 0}
    (folder / f"{name}.yaml").write_text(json.dumps({**common, **spec}))


def test_rolling_texts_and_generated_answers_are_ours(scorer, tmp_path):
    rng = np.random.default_rng(2)
    texts = [words(rng, 100, 200) for _ in range(4)]  # longer than the context of 64
    metrics = [{"metric": m} for m in ("byte_perplexity", "bits_per_byte", "word_perplexity")]
    task_file(
        tmp_path,
        "whole",
        [{"text": t} for t in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=metrics,
    )
    prompts = [words(rng, 4, 20) for _ in range(5)]
    answers = greedy_texts(scorer)(prompts, 8, ("\n",))
    task_file(
        tmp_path,
        "answers",
        [{"prompt": p, "answer": a if i else a + "?"} for i, (p, a) in enumerate(zip(prompts, answers, strict=True))],
        output_type="generate_until",
        doc_to_text="prompt",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    name = "filtered"
    task_file(
        tmp_path,
        name,
        [{"prompt": p, "answer": a.strip()} for p, a in zip(prompts, answers, strict=True)],
        output_type="generate_until",
        doc_to_text="prompt",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[
            {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
        ],
    )
    found = adapter.run_harness(scorer, ["whole", "answers", name], include_path=str(tmp_path))
    assert {"exact_match,stripped", "exact_match_stderr,stripped"} <= found[name].keys()
    assert found["answers"]["exact_match_stderr"] == pytest.approx(math.sqrt(0.8 * 0.2 / 4))
    scores = scorer.rolling(texts)
    bits = -sum(s.total for s in scores) / math.log(2) / sum(s.bytes for s in scores)
    assert found["whole"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert found["answers"]["exact_match"] == pytest.approx(0.8)  # all but the one that was changed
    with pytest.raises(UserError, match="no task 'wholes'"):
        adapter.run_harness(scorer, ["wholes"], include_path=str(tmp_path))


def test_settings_of_generation_are_understood(scorer):
    from lm_eval.api.instance import Instance

    def ask(**settings):
        request = Instance("generate_until", {}, ("abc", {"until": ["\n"], "max_gen_toks": 6, **settings}), 0)
        return adapter.HarnessModel(scorer).generate_until([request])[0]

    assert (
        ask()
        == ask(do_sample=False, temperature=1.0)
        == ask(temperature=0.0)
        == greedy_texts(scorer)(["abc"], 6, ("\n",))[0]
    )
    assert ask(do_sample=True, temperature=3.0, top_k=50) != ask()
    assert len(ask(num_beams=3)) > 0
    with pytest.raises(UserError, match="'typical_p' of a harness task is not supported"):
        ask(typical_p=0.5)


def test_several_devices_give_the_same_figures(scorer, tmp_path):
    items = choices(12, groups=1)
    bench = Benchmark("sharded", "choice", lambda: items)
    native = run_benchmark(bench, scorer)
    sharded = Scorer(scorer.model, scorer.params, scorer.tokenizer, mesh=make_mesh(data=2, fsdp=-1))
    assert jax.device_count() == 8
    assert adapter.compare(bench, sharded, native, tmp_path)["largest_difference"] < 1e-9
