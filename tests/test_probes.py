"""Probes on a planted model: a layer that knows only the word, one that knows only what the tag depends on."""

import types

import numpy as np
import pytest

from gpt_jax.cli import main
from gpt_jax.data.tokenizer import ByteTokenizer
from gpt_jax.errors import UserError
from gpt_jax.inspect.probes import probe_task
from gpt_jax.tasks import Tagged, Task

TOKENIZER = ByteTokenizer(["eot"])


def tagged(seed, count=60, words=12):
    """Words 'a' to 'h'; the tag says whether the word before was an early letter: the word itself tells nothing."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        said = ["abcdefgh"[i] for i in rng.integers(0, 8, words)]
        tags = ["early" if before < "e" else "late" for before in ["a", *said[:-1]]]
        out.append(Tagged(tuple(said), tuple(tags)))
    return out


def task(kind="tag"):
    splits = {"train": lambda: tagged(0), "valid": lambda: tagged(1)}
    return Task("toy", kind, ("accuracy",), splits, labels=("early", "late"))


class Planted:
    """Three states of a byte: which letter it is; whether the letter two bytes (a word) before is early; nothing."""

    causal = True

    def __call__(self, tokens, taps):
        assert taps.collect == ("residual",)
        one_hot = np.eye(300, dtype=np.float32)[tokens]
        before = np.roll(tokens, 2, axis=1)
        early = np.where((before < ord("e")), 1.0, -1.0).astype(np.float32)[..., None] * np.ones(300, np.float32)
        return types.SimpleNamespace(
            intermediates={"residual": np.stack([one_hot, early]), "residual_out": np.zeros_like(one_hot)}
        )


def test_a_probe_finds_what_is_there_and_its_control_what_is_learnt_by_heart():
    found = probe_task(Planted(), TOKENIZER, task())
    word, context, nothing = range(3)
    assert found["words"] == 720 and 0.4 < found["majority"] < 0.6
    assert found["accuracy"][context] == 1.0 and found["selectivity"][context] > 0.3
    assert found["accuracy"][word] < 0.65 and found["control"][word] == 1.0 and found["selectivity"][word] < -0.3
    assert found["accuracy"][nothing] == pytest.approx(found["majority"], abs=0.2)


def test_a_task_of_another_kind_is_refused():
    with pytest.raises(UserError, match="task toy is of kind 'classify'; a probe needs one of kind 'tag'"):
        probe_task(Planted(), TOKENIZER, task("classify"))


@pytest.mark.slow
def test_the_command_probes_a_run(tmp_path, capsys):
    options = ["--config.steps=2", "--config.model.num_layers=1", "--config.batch_size=8", "--config.sample.prompts=()"]
    assert main(["train", "--config=quickstart", f"--workdir={tmp_path}/run", *options]) == 0
    assert main(["inspect", f"--workdir={tmp_path}/run", "--probe=python_identifiers", "--texts=1"]) == 0
    out = capsys.readouterr().out
    assert "layer   accuracy  control  selectivity" in out and (tmp_path / "run" / "inspect" / "inspect.json").exists()
