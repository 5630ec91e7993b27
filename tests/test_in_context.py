"""The in-context learning script: its optimum is what perfect memory gets, and a tiny model comes near it (slow)."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers import load_script

from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.score import Score

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "scripts" / "in_context_learning.py"


@pytest.fixture(scope="module")
def script():
    return load_script("in_context_learning")


class Memory:
    """Remembers every pair that the context shows and never gives a value to two keys."""

    cut, max_length, tokenizer = 0, 1000, ByteTokenizer(["eot"])

    def score(self, pairs):
        out = []
        for context, value in pairs:
            shown = dict(zip(context[::2], context[1::2], strict=False))
            asked = context[-1]
            good = shown[asked] == value if asked in shown else value not in shown.values()
            out.append(Score(np.array([0.0 if good else -9.0]), good, 1))
        return out


def test_an_episode_is_consistent_and_a_question_is_answered_by_it(script):
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = script.episode(rng)
        pairs = {text[i : i + 2] for i in range(0, len(text), 2)}
        assert len(text) == 62 and len({p[0] for p in pairs}) == len({p[1] for p in pairs}) == len(pairs) <= 8
        context, answer = script.question(rng, 8)
        assert context[-1] + script.VALUES[answer] in [context[i : i + 2] for i in range(0, 16, 2)]


def test_the_optimum_is_what_perfect_memory_gets(script):
    for shots, (accuracy, error) in script.accuracies(Memory(), 800).items():
        assert abs(accuracy - script.optimum(shots)) < 4 * error + 1e-9, shots
    assert script.optimum(8) == 1 and script.optimum(0) == pytest.approx(1 / 26)


@pytest.mark.slow
def test_a_tiny_model_recalls_and_does_better_with_more_shots(tmp_path):
    command = [sys.executable, str(SCRIPT), "--workdir", str(tmp_path), "--items", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=SCRIPT.parent.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    accuracy = json.loads(done.stdout.splitlines()[-1])["accuracy"]
    assert accuracy["8"] > 0.95 and accuracy["0"] < 0.15
    assert accuracy["1"] < accuracy["4"] < accuracy["8"]
    assert (tmp_path / "in_context.png").stat().st_size > 1000
