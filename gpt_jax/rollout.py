"""Rollouts: answers drawn from the current policy, rewarded, and served as training batches for some steps.

The one source of data that sees parameters. Every `rollout_every` steps it draws answers to the next prompts with the
parameters as they are, on their own mesh and buffers; the rewards are counted on the host. What it draws is a function
of (seed, step, those parameters): a run is only saved between rollouts, and one that is continued makes the same again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gpt_jax.data import Loader
from gpt_jax.data.mixture import assign, block_counts
from gpt_jax.data.permutation import mix, permute
from gpt_jax.errors import UserError
from gpt_jax.eval_step import build_predict_step
from gpt_jax.generation import stream_batch
from gpt_jax.objectives.supervised import cut_prompt
from gpt_jax.rewards import make_rewards
from gpt_jax.sampling import Sampling
from gpt_jax.step import TrainStep

_DRAWS, _ORDER, _PROMPTS = 11, 12, 13  # what a seed is mixed with, so that no two uses share draws


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a policy answered.

    Attributes:
      ids: of each answer, the EOT that ended it included. texts: without it. finished: whether one did.
    """

    ids: list[list[int]]
    texts: list[str]
    finished: np.ndarray


class RolloutSource:
    """Training batches of `policy_gradient`.

    Args:
      objective: the PolicyGradient. source: of the data, whose tasks the prompts are of (a TrainSource or MixtureSource
        over EncodedTasks).

    Attributes:
      every: steps that a rollout serves. size: its answers. perf: what the last one took.

    Raises:
      UserError: rewards that do not exist, sizes that do not divide, a growing batch, several processes.
    """

    def __init__(self, objective: Any, source: Any):
        self.objective, self.every = objective, objective.rollout_every
        self.makers = list(getattr(source, "makers", None) or [source.maker])
        # Examples are drawn here; the source's weights are of rows, which may hold several.
        of_a_row = [len(maker.examples) / maker.rows_per_epoch for maker in self.makers]
        weights = getattr(source, "weights", [1.0])
        self.counts = block_counts([w * n for w, n in zip(weights, of_a_row, strict=True)])
        self.seed, self.rows_per_batch = source.seed, source.order.batch_size
        self.size = self.rows_per_batch * self.every // objective.rollout_epochs
        self.rewards = make_rewards(objective.rewards)
        self.perf: dict[str, float] = {}
        self.rollouts: dict[int, dict[str, np.ndarray]] = {}  # the last two, by number: one may yet be looked back at
        self._score: Any = None
        if source.order.schedule or source.order.skip:
            raise UserError("policy_gradient takes neither batch_schedule nor data.skip: its batches are rollouts.")
        if self.size % objective.group:
            raise UserError(
                f"objective.group is {objective.group}, which the {self.size} answers of a rollout (batch_size="
                f"{self.rows_per_batch} x rollout_every={self.every} / rollout_epochs={objective.rollout_epochs}) "
                "are no multiple of."
            )
        if jax.process_count() > 1:
            raise UserError("policy_gradient generates within one process; this run has several.")

    @property
    def rows_per_epoch(self) -> int:
        return sum(len(maker.examples) for maker in self.makers) * self.objective.group

    @property
    def tokenizer(self) -> Any:
        return self.makers[0].tokenizer

    def spec(self) -> dict[str, Any]:
        return self.objective.batch_spec(self.rows_per_batch, self.makers[0].length)

    def batch_size(self, step: int) -> int:
        return self.rows_per_batch

    def rows(self, step: int, rows: slice) -> dict[str, np.ndarray]:
        """Returns rows [start:stop) of the batch of a step, which one of the last two rollouts must serve."""
        if step // self.every not in self.rollouts:
            raise RuntimeError(f"no rollout serves step {step}: call refresh first.")
        places = self.places(step)[rows]
        return {name: values[places] for name, values in self.rollouts[step // self.every].items()}

    def places(self, step: int) -> np.ndarray:
        """Returns which answers of its rollout a step trains on: in an epoch each once, in an order of its own."""
        first = step % self.every * self.rows_per_batch
        epochs, places = np.divmod(first + np.arange(self.rows_per_batch), self.size)
        out = np.empty(self.rows_per_batch, np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = permute(places[here], self.size, mix(self.seed, step // self.every, epoch, _ORDER))
        return out

    def examples(self, number: int) -> list[tuple[Any, Any]]:
        """Returns the prompts of rollout `number`, as (the EncodedTask, its example): all once before any twice."""
        count = self.size // self.objective.group
        rows = number * count + np.arange(count)
        tasks, indices = np.zeros_like(rows), rows
        if len(self.makers) > 1:
            tasks, indices = assign(rows, self.counts, self.seed)
        out = []
        for task, index in zip(tasks.tolist(), indices.tolist(), strict=True):
            maker = self.makers[task]
            epoch, place = divmod(index, len(maker.examples))
            place = int(permute(place, len(maker.examples), mix(self.seed, task, epoch, _PROMPTS)))
            out.append((maker, maker.examples[place]))
        return out

    def refresh(self, step: int, params: Any, train_step: TrainStep) -> str:
        """Makes the rollout that serves `step` and those after it; returns a line about it for people."""
        started = time.perf_counter()
        number, group = step // self.every, self.objective.group
        owners = [pair for pair in self.examples(number) for _ in range(group)]
        prompts = [self.prompt(maker, example) for maker, example in owners]
        seeds = [mix(self.seed, number, row, _DRAWS) & 0xFFFFFFFF for row in range(self.size)]
        answers = self.draw(params["model"], prompts, seeds)
        layout = self.makers[0].format
        rows = _stack([layout.row(p, ids) for p, ids in zip(prompts, answers.ids, strict=True)], self.makers[0].length)
        if self._score is None:
            self._score = build_predict_step(train_step, self.spec(), self.objective)
        values, rewards = self.reward(answers.texts, [example for _, example in owners])
        rows |= {
            "rewards": values,
            "group_rewards": np.repeat(rewards.reshape(-1, group), group, axis=0),
            "member": np.tile(np.arange(group, dtype=np.int32), self.size // group),
            "group_kl": np.zeros((self.size, group), np.float32),
            **{f"{who}_logprobs": np.zeros(rows["tokens"].shape, np.float32) for who in ("behaviour", "reference")},
        }
        rows |= self._scores(params, rows, train_step)
        difference = rows["target_weights"] * (rows["behaviour_logprobs"] - rows["reference_logprobs"])
        rows["group_kl"] = np.repeat(difference.sum(1).reshape(-1, group), group, axis=0).astype(np.float32)
        self.rollouts = {n: kept for n, kept in self.rollouts.items() if n == number - 1} | {number: rows}
        seconds, tokens = time.perf_counter() - started, sum(map(len, answers.ids))
        self.perf = {"perf/rollout_tokens_per_s": tokens / seconds, "perf/rollout_s": seconds}
        shown = f"{owners[0][1].source[-40:]}|{answers.texts[0][:60]}".replace("\n", "\\n")
        return (
            f"step {step:05d} | rollout | reward {rewards.mean():.4f} | length {tokens / self.size:.1f} | ended "
            f"{answers.finished.mean():.0%} | {tokens / seconds:,.0f} tok/s | {shown}"
        )

    def prompt(self, maker: Any, example: Any) -> list[int]:
        """Ids of a prompt, cut on its left to leave room for the answer in the row, and in the model's positions."""
        room = self.makers[0].length - min(self.objective.max_new, maker.length // 2)
        return cut_prompt(maker.format.prompt(example, self.tokenizer), room)

    def draw(self, params: Any, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Answers:
        """Draws an answer to each prompt under its own seed."""
        eot, length = self.tokenizer.eot, self.makers[0].length
        ids: list[list[int]] = []
        for start in range(0, len(prompts), self.objective.generate_rows):
            some = slice(start, start + self.objective.generate_rows)
            parts = stream_batch(
                self.objective.model,
                params,
                prompts[some],
                max_tokens=min(self.objective.max_new, length // 2),
                sampling=Sampling(self.objective.temperature),
                eot=eot,
                seeds=seeds[some],
                bidirectional_prompt=self.objective.mask == "prefix",
            )
            new = next(parts)[0].tolist()
            ids += [row[: row.index(eot) + 1] if eot in row else row for row in new]
        finished = np.array([row[-1] == eot for row in ids])
        return Answers(ids, [self.tokenizer.decode([i for i in row if i != eot]) for row in ids], finished)

    def reward(self, texts: Sequence[str], examples: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Returns each reward [N, K] of the answers and their weighted sum [N], float32."""
        found = [np.asarray(function(texts, examples), np.float32) for _, _, function in self.rewards]
        for (name, _, _), values in zip(self.rewards, found, strict=True):
            if values.shape != (len(texts),) or not np.isfinite(values).all():
                raise UserError(f"reward {name} must give a finite number per answer; it gave {values[:4]}...")
        values = np.stack(found, axis=1)
        weights = np.array([weight for _, weight, _ in self.rewards], np.float32)
        return values, (values * weights).sum(1)

    def _scores(self, params: Any, rows: dict[str, np.ndarray], train_step: TrainStep) -> dict[str, np.ndarray]:
        """Log-probabilities of the answers as training computes them, so that the first ratio is 1."""
        parts = []
        for start in range(0, self.size, self.rows_per_batch):
            batch = {name: rows[name][start : start + self.rows_per_batch] for name in self.spec()}
            placed = {name: jax.device_put(batch[name], s) for name, s in self._placements(train_step).items()}
            parts.append(jax.device_get(self._score(params, placed)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _placements(self, train_step: TrainStep) -> dict[str, Any]:
        from gpt_jax.sharding import batch_shardings

        return batch_shardings(self.spec(), train_step.mesh)


def _stack(rows: Sequence[dict[str, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """Pads rows of single sequences with 0 to [N, length] and adds segment_ids and positions."""
    out = {name: np.zeros((len(rows), length), values.dtype) for name, values in rows[0].items()}
    out |= {name: np.zeros((len(rows), length), np.int32) for name in ("segment_ids", "positions")}
    for i, row in enumerate(rows):
        n = len(row["tokens"])
        for name, values in row.items():
            out[name][i, :n] = values
        out["segment_ids"][i, :n], out["positions"][i, :n] = 1, np.arange(n)
    return out


class RolloutLoader:
    """As `Loader`, for a source that sees parameters: at each boundary it makes the next rollout, then serves it.

    Args:
      source: has `refresh`, or parts of which some have. step: the train step. params: gives the current parameters.
      start_step: between rollouts. stop_step: where it ends. log: takes a line per rollout.
    """

    def __init__(
        self,
        source: Any,
        step: TrainStep,
        params: Callable[[], Any],
        start_step: int,
        stop_step: int,
        *,
        prefetch: int = 2,
        log: Callable[[str], None] = print,
    ):
        self.stall_seconds, self.perf = 0.0, {}
        self._source, self._step, self._params, self._log = source, step, params, log
        self._sources = [part for part in getattr(source, "parts", {"": source}).values() if hasattr(part, "refresh")]
        self._at, self._stop, self._prefetch = start_step, stop_step, prefetch
        self._inner: Loader | None = None

    def __iter__(self) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        return self

    def __next__(self) -> tuple[int, dict[str, jax.Array]]:
        self.perf, waited = {}, 0.0
        if self._at >= self._stop:
            raise StopIteration
        due = [source for source in self._sources if self._inner is None or self._at % source.every == 0]
        if due:
            started = time.perf_counter()
            self.close()
            for source in due:
                self._log(source.refresh(self._at, self._params(), self._step))
                self.perf |= source.perf
            end = min(self._at - self._at % source.every + source.every for source in self._sources)
            placed = self._step.batch_shardings
            self._inner = Loader(self._source, placed, self._at, min(end, self._stop), prefetch=self._prefetch)
            waited = time.perf_counter() - started
        item = next(self._inner)
        self.stall_seconds = waited + self._inner.stall_seconds
        self._at += 1
        return item

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()

    def __enter__(self) -> RolloutLoader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
