"""Generators of examples: a language model that continues a label, and a masked one that substitutes words under it.

Both begin with a pre-trained run and are tuned on the originals:

    LabelLM             EOT label SEP text EOT, the loss on the text; sampled from EOT label SEP, or with the first
                        words of an original too (LAMBADA: Anaby-Tavor et al. 2020; GPT2-context: Kumar et al. 2020)
    MaskedSubstitution  EOT label SEP text, a part of the text's tokens masked; then the same on originals, the hidden
                        tokens drawn from the model (the label prepended: Kumar et al. 2020); or EOT text, with a vector
                        of the label joined to every token's embedding (CBERT: Wu et al. 2019)
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gpt_jax.augment.base import Synthetic
from gpt_jax.augment.finetune import FineTuner, Recipe
from gpt_jax.data.formats import Arrays, Row, TaskInfo
from gpt_jax.errors import UserError
from gpt_jax.generation import generate
from gpt_jax.loading import Loaded
from gpt_jax.model import Mask, Transformer
from gpt_jax.model.random import fold
from gpt_jax.objectives.base import special_id
from gpt_jax.objectives.masked_lm import MaskedLM
from gpt_jax.objectives.supervised import PromptRows, Supervised
from gpt_jax.sampling import Sampling

_ROWS = 64  # of originals that tokens are substituted in at once: the logits of all of them may not fit


@dataclasses.dataclass(frozen=True)
class LabelledRows(PromptRows):
    """EOT label SEP text EOT: rows of a classification task's examples for a language model (an ExampleRows)."""

    sep: int = 0
    kind: str = "classify"
    pack: bool = False

    @property
    def arrays(self) -> Arrays:
        names = ("segment_ids", "positions")
        return {**super().arrays, **{name: ((self.length,), np.int32) for name in names}}

    def prompt(self, example: Any, tokenizer: Any) -> list[int]:
        return label_prefix(example.label, tokenizer, self.eot, self.sep)

    def encode(self, example: Any, task: TaskInfo, tokenizer: Any) -> list[Row]:
        row = self.row(self.prompt(example, tokenizer), [*tokenizer.encode(example.text).tolist(), self.eot])
        n = len(row["tokens"])
        return [{**row, "segment_ids": np.ones(n, np.int32), "positions": np.arange(n, dtype=np.int32)}]


@dataclasses.dataclass(frozen=True)
class HiddenRows:
    """EOT label SEP text: rows for a masked language model, of which only the text may be hidden (an ExampleRows).

    With `embedded` the text alone, and the label's number beside it as "label".
    """

    eot: int
    sep: int
    length: int
    embedded: bool = False
    kind: str = "classify"
    pack: bool = False
    generates: bool = False

    @property
    def arrays(self) -> Arrays:
        kinds = {"tokens": np.int32, "targets": np.int32, "target_weights": np.float32}
        kinds |= {"segment_ids": np.int32, "positions": np.int32}
        label = {"label": ((), np.int32)} if self.embedded else {}
        return {name: ((self.length,), kind) for name, kind in kinds.items()} | label

    def encode(self, example: Any, task: TaskInfo, tokenizer: Any) -> list[Row]:
        prefix = [self.eot] if self.embedded else label_prefix(example.label, tokenizer, self.eot, self.sep)
        ids = np.array([*prefix, *tokenizer.encode(example.text).tolist()], np.int32)[: self.length]
        places = np.arange(len(ids), dtype=np.int32)
        weights = (places >= len(prefix)).astype(np.float32)
        ones = np.ones(len(ids), np.int32)
        row = {"tokens": ids, "targets": ids, "target_weights": weights, "segment_ids": ones, "positions": places}
        return [row | ({"label": np.int32(task.labels.index(example.label))} if self.embedded else {})]


@dataclasses.dataclass(frozen=True)
class LabelledMaskedLM(MaskedLM):
    """A masked language model that is told each row's label by a vector of it, joined to all token embeddings.

    The vectors are 0 at first, so that tuning begins at the pre-trained model (CBERT has them in place of BERT's
    segment embeddings). Batch: as MaskedLM's, and label [B].
    """

    labels: int = 1

    def init(self, key: Any, batch: Any) -> Any:
        roots = super().init(key, batch)
        table = jnp.zeros((self.labels, self.model.config.embed_size), self.model.config.param_dtype)
        return {**roots, "label": {"embedding": nn.LogicallyPartitioned(table, (None, "embed"))}}

    def batch_spec(self, batch_size: int, context_length: int) -> Any:
        label = jax.ShapeDtypeStruct((batch_size,), np.int32)
        return {**super().batch_spec(batch_size, context_length), "label": label}

    def added(self, params: Any, batch: Any) -> Any:
        return jnp.take(params["label"]["embedding"], batch["label"], axis=0)[:, None]


def label_prefix(label: str, tokenizer: Any, eot: int, sep: int) -> list[int]:
    return [eot, *tokenizer.encode(label).tolist(), sep]


def start_of(run: Loaded, objective: str, what: str) -> Mapping[str, Any]:
    """Returns the parameters of a run that a generator starts from; raises UserError for a run of another objective."""
    found = run.config.objective["name"]
    if found != objective:
        raise UserError(f"{what} starts from a run with the objective {objective!r}, not {found!r}.")
    return run.all_params


class LabelLM:
    """Samples texts of a class from a language model tuned on the originals.

    Args:
      run: a pre-trained causal_lm. labels: of the task. recipe: of the tuning. prefix_words: first words of an original
        that a sample begins with; 0 is none. per_class: samples of each class at a call. max_tokens: of a sample.
      temperature, top_p: of the sampler.
    """

    copies = False

    def __init__(
        self,
        run: Loaded,
        labels: Sequence[str],
        recipe: Recipe,
        *,
        prefix_words: int = 0,
        per_class: int = 64,
        max_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 0.9,
    ):
        self.name = "lm_prefix" if prefix_words else "lm"
        self.run, self.labels, self.prefix_words, self.per_class = run, tuple(labels), prefix_words, per_class
        self.sampler = dict(temperature=temperature, top_p=top_p, max_tokens=max_tokens or recipe.length // 2)
        tokenizer = run.tokenizer
        self.eot, self.sep = (special_id(tokenizer.specials, name) for name in ("eot", "sep"))
        rows = LabelledRows(self.eot, recipe.length, "target", recipe.length, False, sep=self.sep)
        objective = Supervised(Transformer(run.config.model))
        start = {"model": start_of(run, "causal_lm", "the generator 'lm'")["model"]}
        self.tuner = FineTuner(objective, rows, tokenizer, start, recipe, labels)

    def augment(self, train: Sequence[Any], rng: random.Random) -> list[Synthetic]:
        params = self.tuner.fitted(train)
        prompts, parents, labels, begun = [], [], [], []
        tokenizer = self.run.tokenizer
        for label in self.labels:
            own = [i for i, example in enumerate(train) if example.label == label]
            for _ in range(self.per_class if own else 0):
                parent = rng.choice(own) if self.prefix_words else -1
                words = train[parent].text.split()[: self.prefix_words] if self.prefix_words else []
                start = " ".join(words)
                prefix = label_prefix(label, tokenizer, self.eot, self.sep)
                prompts.append([*prefix, *tokenizer.encode(start).tolist()])
                parents.append(parent)
                labels.append(label)
                begun.append(start)
        seeds = [rng.getrandbits(32) for _ in prompts]
        new, scores = generate(
            self.tuner.objective.model,
            params["model"],
            prompts,
            eot=self.eot,
            seeds=seeds,
            logprobs=True,
            **self.sampler,
        )
        out = []
        for label, parent, start, ids, logp in zip(labels, parents, begun, new, scores, strict=True):
            text = " ".join((start + tokenizer.decode(ids)).split())
            out.append(Synthetic(label, text, float(np.exp(np.mean(logp))) if logp else 0.0, parent))
        return out


class MaskedSubstitution:
    """Replaces some tokens of originals by what a masked language model finds likely there, under the label.

    Args:
      run: a pre-trained masked_lm. labels, recipe: as in LabelLM. rate: part of the tokens hidden (one at least).
      per_example: texts of each original at a call. temperature: of the draws; 0 takes the most likely token.
      embedded: the label as a vector joined to every token's embedding, not as tokens in front.
    """

    copies = False

    def __init__(
        self,
        run: Loaded,
        labels: Sequence[str],
        recipe: Recipe,
        *,
        rate: float = 1 / 7,
        per_example: int = 8,
        temperature: float = 1.0,
        embedded: bool = False,
    ):
        self.name = "mlm_embedded" if embedded else "mlm"
        self.run, self.rate, self.per_example = run, rate, per_example
        self.temperature = Sampling(temperature).temperature
        tokenizer = run.tokenizer
        self.eot, self.sep, self.mask = (special_id(tokenizer.specials, name) for name in ("eot", "sep", "mask"))
        specials = tuple(tokenizer.specials.values())
        self.hidden_from_draws = np.isin(np.arange(run.config.model.vocab_size), specials)
        objective = functools.partial(LabelledMaskedLM, labels=len(labels)) if embedded else MaskedLM
        objective = objective(Transformer(run.config.model), mask_token=self.mask, specials=specials, rate=rate)
        start = {"model": start_of(run, "masked_lm", "the generator 'mlm'")["model"]}
        self.rows = HiddenRows(self.eot, self.sep, recipe.length, embedded)
        self.tuner = FineTuner(objective, self.rows, tokenizer, start, recipe, labels)
        self._fill = jax.jit(self._fill_in)

    def augment(self, train: Sequence[Any], rng: random.Random) -> list[Synthetic]:
        params = self.tuner.fitted(train)
        encoded = self.tuner.encode(train)
        n = encoded.rows_per_epoch
        rows = encoded.build(np.zeros(n, np.int64), np.arange(n))
        prefix = (rows["target_weights"] == 0).astype(int).cumprod(1).sum(1)
        out = []
        for _ in range(self.per_example):
            draws = np.random.default_rng(rng.getrandbits(63))
            hidden = self.choose(rows["target_weights"] > 0, draws)
            ids, logp = self.fill(params, rows, hidden, jax.random.key(rng.getrandbits(31)))
            for i, owner in enumerate(encoded.owners.tolist()):
                used = int((rows["segment_ids"][i] > 0).sum())
                text = self.run.tokenizer.decode(ids[i, prefix[i] : used].tolist())
                score = float(np.exp(logp[i][hidden[i]].mean())) if hidden[i].any() else 0.0
                out.append(Synthetic(train[owner].label, " ".join(text.split()), score, owner))
        return out

    def choose(self, may_BxT: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Hides round(rate n) of each row's n tokens that may be, one at least. [B, T] booleans."""
        hidden = np.zeros_like(may_BxT)
        for row, may in zip(hidden, may_BxT, strict=True):
            places = np.flatnonzero(may)
            row[rng.choice(places, min(len(places), max(1, round(self.rate * len(places)))), replace=False)] = True
        return hidden

    def fill(
        self, params: Any, rows: Mapping[str, np.ndarray], hidden_BxT: np.ndarray, key: Any, chunk: int = _ROWS
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws the hidden tokens, `chunk` rows at a time: (ids, their log-probabilities), [B, T].

        `params` by root. A row's draws depend on `key` and its number alone; specials are never drawn.
        """
        n = len(hidden_BxT)
        chunk, parts = min(chunk, n), []
        for start in range(0, n, chunk):
            numbers = np.arange(start, start + chunk)
            at = np.minimum(numbers, n - 1)  # the last chunk is filled up with the last row, and compiles nothing new
            some = {name: values[at] for name, values in rows.items()}
            parts.append(jax.device_get(self._fill(params, some, hidden_BxT[at], key, numbers)))
        ids, logp = (np.concatenate(found)[:n] for found in zip(*parts, strict=True))
        return ids, logp

    def _fill_in(self, params: Any, rows: Mapping[str, Any], hidden: Any, key: Any, numbers: Any) -> tuple[Any, Any]:
        objective, model = self.tuner.objective, self.tuner.objective.model
        batch = {**rows, "inputs": jnp.where(hidden, self.mask, rows["tokens"])}
        states = objective.states(params, batch, Mask("bidirectional", segments_BxT=rows["segment_ids"]))
        logits = model.apply({"params": params["model"]}, states, method="unembed")[..., : model.config.vocab_size]
        logits = jnp.where(self.hidden_from_draws, -1e30, logits) / (self.temperature or 1.0)
        if self.temperature == 0:
            drawn = jnp.argmax(logits, axis=-1)
        else:
            drawn = jax.vmap(lambda number, row: jax.random.categorical(fold(key, number), row))(numbers, logits)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], -1)[..., 0]
        return jnp.where(hidden, drawn, rows["tokens"]), log_p
