#!/usr/bin/env python3
"""Edit distance as a detector of wrong replacements, beside the discriminator trained for it, on the same corruptions.

    gpt-jax train --config=replaced_token --workdir=runs/rtd --config.steps=2000
    python scripts/edit_distance_detector.py --workdir=runs/rtd [--rows=256] [--select=spans]

The generator of a replaced-token run fills the selected tokens of held-out text. A detector gives every token a score
that should be higher where the fill is not the text's token:
  discriminator    the run's own, which sees the whole corrupted row;
  edit distance    soft distance of the generator's distributions to the tokens within `window` of the one asked about.
                   Among selected tokens the distributions are those it was filled from; among all tokens they are read
                   from the corrupted row, nothing masked. A window of 0 is 1 - p of the token itself.
AUC (area under the ROC curve): 0.5 is chance. Also printed: how often the Levenshtein distance of the filled row to
the text is just the number of wrong tokens. A row per detector and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score

from gpt_jax.edit_distance import levenshtein, soft_edit_distance
from gpt_jax.errors import UserError
from gpt_jax.eval_step import EVALUATION
from gpt_jax.objectives import masking
from gpt_jax.objectives.replaced_token import SHARED, ReplacedToken
from gpt_jax.run import restore_run
from gpt_jax.step import row_keys

WINDOWS = (0, 1, 3)


def agreement(tokens_BxT: jax.Array, logits_BxNxV: jax.Array, places_BxN: jax.Array) -> jax.Array:
    """Probability that position i holds token j of the row, [B, T, T]: the model's at `places`, else 0 or 1."""
    certain = (tokens_BxT[:, :, None] == tokens_BxT[:, None, :]).astype(jnp.float32)
    p_BxNxV = jax.nn.softmax(logits_BxNxV, axis=-1)
    guessed_BxNxT = jnp.take_along_axis(p_BxNxV, tokens_BxT[:, None], axis=2)
    return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(certain, places_BxN, guessed_BxNxT)


def window_costs(p_BxTxT: np.ndarray, rows: np.ndarray, at: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs 1 - p of the square windows around positions (rows, at), [n, W, W] padded, and their lengths [n]."""
    T, W = p_BxTxT.shape[1], 2 * window + 1
    low, high = np.maximum(at - window, 0), np.minimum(at + window + 1, T)
    costs = np.ones((len(at), W, W), np.float32)
    for i, (row, a, b) in enumerate(zip(rows, low, high, strict=True)):
        costs[i, : b - a, : b - a] = 1.0 - p_BxTxT[row, a:b, a:b]
    return costs, high - low


def scores(objective: ReplacedToken, params: dict, batch: dict, keys: jax.Array) -> dict[str, jax.Array]:
    """All that the detectors read of a batch."""
    batch = objective.prepare(batch, keys, jnp.zeros((), jnp.int32))
    logits, corrupted = objective.replace(params, batch, keys)
    T = corrupted.shape[1]
    generator = params["generator"]
    if objective.share == "embeddings":
        generator = {**generator, **{name: params["model"][name] for name in SHARED if name in params["model"]}}
    everywhere = jnp.broadcast_to(jnp.arange(T), corrupted.shape)
    unmasked = objective.masked_lm.token_logits(
        {"model": generator}, {**batch, "inputs": corrupted, "slots": everywhere}
    )
    places = jnp.where(batch["weights"]["mlm"] > 0, batch["slots"], T)
    return {
        "tokens": batch["tokens"],
        "corrupted": corrupted,
        "real": masking.real_tokens(batch),
        "selected": jax.vmap(lambda at: jnp.zeros(T, bool).at[at].set(True, mode="drop"))(places),
        "discriminator": objective.detect(params, batch, corrupted),
        "filled": agreement(corrupted, logits, places),
        "unmasked": agreement(corrupted, unmasked, everywhere),
    }


def aucs(
    truth: np.ndarray, discriminator: np.ndarray, p_BxTxT: np.ndarray, rows: np.ndarray, at: np.ndarray
) -> dict[str, float]:
    """AUC of each detector at positions (rows, at), of which those with `truth` are wrong."""
    values = {"discriminator": discriminator}
    for window in WINDOWS:
        costs, lengths = window_costs(p_BxTxT, rows, at, window)
        values[f"edit distance, window {window}"] = np.asarray(
            soft_edit_distance(jnp.asarray(costs), jnp.asarray(lengths), jnp.asarray(lengths), gamma=0.1)
        )
    return {name: float(roc_auc_score(truth, value)) for name, value in values.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a run of the objective replaced_token")
    parser.add_argument("--rows", type=int, default=256, help="held-out rows")
    parser.add_argument("--select", default="", help="objective.select of the corruption; default: the run's")
    args = parser.parse_args()
    try:
        overrides = {"objective.select": args.select} if args.select else {}
        run, params, step = restore_run(args.workdir, overrides=overrides)
        if not isinstance(run.objective, ReplacedToken):
            raise UserError(f"the run in {args.workdir!r} has no discriminator: its objective is not replaced_token.")
    except UserError as error:
        print(f"edit_distance_detector: {error}", file=sys.stderr)
        return 1
    source = next(iter(run.data.valid.values()))
    size, found, seen = source.batch_size(0), [], 0
    read = jax.jit(lambda params, batch, keys: scores(run.objective, params, batch, keys))
    for number in range(source.num_batches):
        if seen >= args.rows:
            break
        keys = row_keys(run.config.seed, EVALUATION, seen + jnp.arange(size))
        found.append(jax.device_get(read(params, source.rows(number, slice(0, size)), keys)))
        seen += size
    out = {name: np.concatenate([f[name] for f in found])[: args.rows] for name in found[0]}

    wrong = out["corrupted"] != out["tokens"]
    real = out["real"]
    rows = [(c[r], t[r]) for c, t, r in zip(out["corrupted"], out["tokens"], real, strict=True) if r.any()]
    distances = [(levenshtein(c, t), int((c != t).sum())) for c, t in rows]
    lev, hamming = np.array(distances).T
    result = {"step": step, "rows": len(lev), "select": run.objective.select, "auc": {}}
    result |= {"levenshtein_is_hamming": int((lev == hamming).sum()), "levenshtein": float(lev.mean())}
    result |= {"hamming": float(hamming.mean())}
    for where, asked, p in (("selected", out["selected"] & real, "filled"), ("all", real, "unmasked")):
        rows, at = np.nonzero(asked)
        truth = wrong[rows, at]
        print(f"{where} tokens: {len(truth)}, of them wrong {truth.mean():.3f}")
        result["auc"][where] = aucs(truth, out["discriminator"][rows, at], out[p], rows, at)
        for name, auc in result["auc"][where].items():
            print(f"  {name.ljust(26)} AUC {auc:.4f}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
