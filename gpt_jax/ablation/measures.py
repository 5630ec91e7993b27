"""What is measured of a finished cell beside what training reports: functions of a Cell, named by import path."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.ablation.grid import Cell
from gpt_jax.errors import UserError
from gpt_jax.evaluate import evaluate_all
from gpt_jax.generation import generate
from gpt_jax.loading import Loaded, load
from gpt_jax.run import restore_run
from gpt_jax.text_quality import distinct_n, mean_seq_rep_n, self_bleu

_TEXTS, _TOKENS = 96, 96


def bert_masking(cell: Cell) -> dict[str, float]:
    """The masked-LM loss and accuracy of a cell under BERT's own corruption, however it was trained.

    So that objectives whose own losses ask different questions are asked the same one.
    """
    same = {
        "objective.corruption": "bert",
        "objective.loss_on": "selected",
        "objective.select": "tokens",
        "objective.span": "0",
        "objective.max_predictions": "0",
    }
    same |= {"objective.rate": "0.15", "objective.shares": "(0.8, 0.1, 0.1)"}
    run, params, _ = restore_run(str(cell.path), overrides=same)
    values = evaluate_all(run, params)
    return {f"bert_masking/{name}": values[f"valid/{name}"] for name in ("mlm_nll", "accuracy")}


def sample_quality(cell: Cell) -> dict[str, float]:
    """How varied and how likely the texts are that a cell writes: 96 of up to 96 tokens, at temperature 1, from EOT.

    Returns:
      samples/distinct_2, self_bleu_4, seq_rep_4 (of tokens) and, where the cell has a run "reference" before it,
      reference_perplexity of a token under that run. The same of held-out text, cut to as many tokens: human/... .
    """
    trained = load(cell.path)
    eot = trained.tokenizer.eot
    room = trained.config.context_length - 1
    seeds = [cell.seed * 1_000_003 + i for i in range(_TEXTS)]
    written = generate(
        trained.model, trained.params, [[eot]] * _TEXTS, max_tokens=min(_TOKENS, room), eot=eot, seeds=seeds
    )
    texts = {"samples": written, "human": _human(cell, [len(text) for text in written], eot)}
    judge = load(cell.run_before("reference").path) if any(b.name == "reference" for b in cell.before) else None
    out: dict[str, float] = {}
    for name, rows in texts.items():
        decoded = [trained.tokenizer.decode(row) for row in rows]
        out[f"{name}/distinct_2"] = distinct_n(decoded, 2)
        out[f"{name}/self_bleu_4"] = self_bleu(decoded, 4)
        out[f"{name}/seq_rep_4"] = mean_seq_rep_n(rows, 4)
        if judge is not None:
            if judge.tokenizer.hash != trained.tokenizer.hash:
                raise UserError(f"the reference of {cell.name} has another tokenizer, so its perplexity says nothing.")
            out[f"{name}/reference_perplexity"] = perplexity(judge, rows, eot)
    return out


def _human(cell: Cell, lengths: list[int], eot: int) -> list[list[int]]:
    """Held-out text in pieces of given numbers of tokens, no token twice while there are enough, in a random order."""
    run, _, _ = restore_run(str(cell.path))
    stream = np.asarray(run.data.splits["valid"].tokens)
    size = max(1, *lengths)
    documents = [part[part != eot] for part in np.split(stream, np.flatnonzero(stream == eot))]
    pieces = [d[i : i + size] for d in documents for i in range(0, len(d) - size + 1, size)] or documents
    order = np.random.default_rng(0).permutation(len(pieces))
    return [pieces[order[i % len(pieces)]][:length].tolist() for i, length in enumerate(lengths)]


def perplexity(judge: Loaded, rows: list[list[int]], eot: int) -> float:
    """exp of the mean -log p of the tokens of texts that begin after EOT, under another run."""
    T = max(1, max(map(len, rows)))
    inputs, targets, weights = (np.zeros((len(rows), T), kind) for kind in (np.int32, np.int32, np.float32))
    for i, row in enumerate(rows):
        inputs[i, : len(row)] = [eot, *row[:-1]][: len(row)]
        targets[i, : len(row)], weights[i, : len(row)] = row, 1.0

    def total(params: Any, inputs: Any, targets: Any, weights: Any) -> Any:
        logits = judge.model.apply({"params": params}, inputs).logits
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(weights * chosen)

    nll = float(jax.jit(total)(judge.params, inputs, targets, weights))
    return math.exp(min(700.0, nll / max(1.0, float(weights.sum()))))
