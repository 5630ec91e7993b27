"""What ablations measure beside training: samples beside held-out text, masked models in the same terms."""

import math
import types

import jax
import numpy as np
import pytest
from helpers import params_of, tiny, tokens

from gpt_jax.ablation import measures
from gpt_jax.ablation.grid import Cell
from gpt_jax.model import Transformer
from gpt_jax.objectives.base import option_fields
from gpt_jax.objectives.masked_lm import MaskedLM


def test_perplexity_of_texts_under_another_model():
    config = tiny()
    model, params = Transformer(config), params_of(config)
    judge = types.SimpleNamespace(model=model, params=params)
    rows = [tokens(1, 5)[0].tolist(), tokens(1, 9, seed=1)[0].tolist(), []]
    nll, count = 0.0, 0
    for row in rows:
        if row:
            logits = model.apply({"params": params}, np.array([[36, *row[:-1]]])).logits[0]
            nll -= float(np.sum(np.asarray(jax.nn.log_softmax(logits))[np.arange(len(row)), row]))
            count += len(row)
    assert measures.perplexity(judge, rows, eot=36) == pytest.approx(math.exp(nll / count), rel=1e-4)


def test_human_text_is_cut_to_the_lengths_and_no_token_comes_twice(monkeypatch):
    stream = np.concatenate([[0], np.arange(1, 21), [0], np.arange(21, 24), [0], np.arange(24, 60)])
    data = types.SimpleNamespace(splits={"valid": types.SimpleNamespace(tokens=stream)})
    monkeypatch.setattr(measures, "restore_run", lambda path: (types.SimpleNamespace(data=data), None, 0))
    cell = Cell(0, "a", 1, None, "nowhere")
    got = measures._human(cell, [5, 8, 3], eot=0)
    assert [len(row) for row in got] == [5, 8, 3]
    used = [token for row in got for token in row]
    assert len(set(used)) == len(used) and not set(used) & {0, 21, 22, 23}
    assert all(np.diff(row).tolist() == [1] * (len(row) - 1) for row in got)


def test_bert_masking_leaves_nothing_of_the_selection_that_a_cell_was_trained_with(monkeypatch):
    taken = {}

    def restore(path, overrides):
        taken.update(overrides)
        return None, None, 0

    monkeypatch.setattr(measures, "restore_run", restore)
    monkeypatch.setattr(measures, "evaluate_all", lambda run, params: {"valid/mlm_nll": 1.0, "valid/accuracy": 0.5})
    assert measures.bert_masking(Cell(0, "a", 1, None, "nowhere"))["bert_masking/accuracy"] == 0.5
    defaults = {name: field.default for name, field in option_fields(MaskedLM).items()}
    for name in ("corruption", "select", "rate", "shares", "span", "max_predictions"):
        assert taken[f"objective.{name}"] == str(defaults[name])


def test_a_metric_that_no_run_has_is_named_with_those_there_are():
    from gpt_jax.ablation.report import study_page
    from gpt_jax.ablation.results import Result, Study

    runs = {seed: Result({"valid/real/nll": 1.0 + seed}, [], 1, None) for seed in (1, 2)}
    page, numbers = study_page(Study("t", "?", {"a": runs, "b": runs}, "a", ("valid/nll",)))
    assert not numbers and "No run has valid/nll; they have valid/real/nll." in page.markdown()
    page, _ = study_page(Study("t", "?", {"a": runs, "b": runs}, "a", ("valid/real/nll",)))
    assert "No run has" not in page.markdown()
