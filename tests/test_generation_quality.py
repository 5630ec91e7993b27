"""Quality of generated text: prompts cut from human text, figures by hand, and methods that differ as they must."""

import json

import numpy as np
import pytest
from helpers import params_of, tiny

from gpt_jax.cli import main
from gpt_jax.data.store import Split
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.generation_quality import Prompts, evaluate_generation, human_prompts, measure
from gpt_jax.model import Transformer
from gpt_jax.score import Scorer
from gpt_jax.text_quality import distinct_n


def split_of(*documents, eot=256):
    parts, starts, at = [], [], 0
    for text in documents:
        starts.append(at)
        parts += [eot, *text.encode()]
        at = len(parts)
    return Split(np.array(parts, np.int32), np.array(starts), sum(map(len, documents)), eot)


def test_prompts_and_continuations_are_pieces_of_one_document():
    documents = ["abcdefghijklmnopqrstuvwxyz" * 3, "short", "0123456789" * 8]
    given = human_prompts([split_of(*documents)], 6, 4, 6)
    assert len(given.prompts) == 6
    for prompt, new in zip(given.prompts, given.continuations, strict=True):
        assert len(prompt) == 4 and len(new) == 6
        text = bytes(prompt + new).decode()
        assert any(text in document for document in documents)
    with pytest.raises(UserError, match="0 pieces of 200 tokens within one document"):
        human_prompts([split_of(*documents)], 4, 100, 100)
    with pytest.raises(UserError, match="new tokens: 0"):
        human_prompts([split_of(*documents)], 4, 4, 0)
    with pytest.raises(UserError, match="texts: 1; at least 2"):
        human_prompts([split_of(*documents)], 1, 4, 6)


def test_fewer_pieces_than_prompts_are_taken_once_each():
    given = human_prompts([split_of("abcdefghijklmnopqrstuvwxyz0123456789")], 9, 4, 6)
    pieces = [bytes(p + n).decode() for p, n in zip(given.prompts, given.continuations, strict=True)]
    assert pieces == ["jklmnopqrs", "tuvwxyz012"]  # one begins every 10 tokens; the first holds the EOT


def test_the_last_piece_is_taken_too():
    given = human_prompts([Split(np.arange(20, dtype=np.int32), np.array([0]), 20, None)], 2, 4, 6)
    assert given.prompts == [[0, 1, 2, 3], [10, 11, 12, 13]] and given.continuations[1] == [14, 15, 16, 17, 18, 19]


def test_figures_and_their_intervals_by_hand():
    texts = ["a b c d e", "a b c d e", "v w x y z"]
    ids = [[1, 2, 3, 4, 5], [1, 1, 1, 1, 1], [1, 2, 1, 2, 1]]
    losses = np.array([[2.0, 2], [3.0, 3], [10.0, 5]])
    values = measure(ids, texts, losses, np.array([[1.0, 0, 0], [2, 2, 4]]))
    assert values["distinct_1"] == pytest.approx(10 / 15) and values["distinct_1"] == distinct_n(texts, 1)
    assert values["perplexity"] == pytest.approx(np.exp(15 / 10))
    assert values["copy_rate"] == pytest.approx(1 / 8)
    assert values["seq_rep_4"] == pytest.approx((0 + 1 / 2 + 0) / 3)
    assert values["self_bleu_4"] == pytest.approx(2 / 3)
    for name in ("distinct_1", "distinct_3", "self_bleu_4", "seq_rep_4", "perplexity", "copy_rate", "tokens"):
        assert values[f"{name}_low"] <= values[name] <= values[f"{name}_high"], name
    # The jackknife of distinct-1: without a text, 10/10, 10/10 and 5/10 of the words are different.
    without = np.array([1.0, 1.0, 0.5])
    half = 1.96 * np.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    assert values["distinct_1_low"] == pytest.approx(max(0, 10 / 15 - half))


def test_greedy_repeats_more_than_sampling_and_a_copy_is_one():
    config = tiny(vocab_size=257, positions="rope", max_positions=96, init_std=0.3)
    scorer = Scorer(Transformer(config), params_of(config), ByteTokenizer(["eot"]))
    rng = np.random.default_rng(0)
    words = [" ".join("".join(rng.choice(list("abcde"), 3)) for _ in range(12)) for _ in range(8)]
    given = Prompts([list(text.encode())[:6] for text in words], [list(text.encode())[6:] for text in words])
    training = [" ".join(word[6:].split()) for word in words[:4]]  # the human continuations of half the prompts
    methods = ["greedy", "sample", "beam_4", "contrastive_4", "repetition_1.2"]
    found = evaluate_generation(scorer, given, training, methods=methods)
    assert list(found) == ["human", *methods]
    assert found["repetition_1.2"]["perplexity"] != found["sample"]["perplexity"]  # other texts from the same seeds
    assert found["greedy"]["seq_rep_4"] > found["sample"]["seq_rep_4"] + 0.2
    assert found["greedy"]["perplexity"] < found["sample"]["perplexity"]
    assert 0.3 < found["human"]["copy_rate"] < 0.7 and found["sample"]["copy_rate"] == 0
    other = evaluate_generation(scorer, given, training, methods=["greedy"], reference=scorer)
    assert other["human"]["perplexity"] == pytest.approx(found["human"]["perplexity"], rel=1e-4)
    again = evaluate_generation(scorer, given, training, methods=["sample"])
    assert again["sample"] == found["sample"]
    with pytest.raises(UserError, match=r"method is 'top_k' \(did you mean 'top_k_40'"):
        evaluate_generation(scorer, given, training, methods=["top_k"])


@pytest.mark.slow
def test_the_command_measures_a_run_beside_its_validation_text(tmp_path, capsys):
    text = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 160
    (tmp_path / "text.txt").write_text(text)
    flags = ["--config.data.path=" + str(tmp_path / "text.txt"), "--config.data.tokenizer.kind=byte"]
    flags += ["--config.model.num_layers=1", "--config.model.d_model=32", "--config.steps=3", "--config.batch_size=8"]
    flags += ["--config.context_length=64", "--config.eval.task_limit=3"]
    flags += ["--config.eval.tasks=({'name': 'toy_tasks:colours', 'valid': 5}, 'toy_tasks:pairs')"]
    assert main(["train", "--config=causal_lm", f"--workdir={tmp_path / 'run'}", *flags]) == 0
    assert "tasks/colours/accuracy" in json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= rows[-1]["tasks/colours/accuracy"] <= 1 and "tasks/pairs/accuracy" in rows[-1]
    flags = ["--generation", "--texts=4", "--prompt-tokens=8", "--new-tokens=55", "--methods=greedy,sample"]
    assert main(["eval", f"--workdir={tmp_path / 'run'}", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert set(result["generation"]) == {"human", "greedy", "sample"} and result["texts"] == 4
    assert result["generation"]["human"]["copy_rate"] > 0.3  # but for words that are cut
    assert lines[1].startswith("human")
