"""Does the best learning rate of a narrow model fit a wide one? A coordinate check and a sweep, with figures.

    python scripts/mup_transfer.py --out runs/mup

Trains models of several widths on the embedded corpus at several rates, once with one rate and one initial deviation
for all parameters (standard) and once by the rules of gpt_jax/scaling.py (muP). Prints a table and a JSON line; writes
coordinates.png (size of activations after a few updates, by width: flat is right) and sweep.png (loss by rate).
"""

from __future__ import annotations

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt_jax.config import base, resolve
from gpt_jax.model import ModelConfig, Transformer
from gpt_jax.model.taps import Taps
from gpt_jax.objectives.causal_lm import CausalLM
from gpt_jax.pages import new_figure, png_of
from gpt_jax.run import build_run
from gpt_jax.scaling import rate_multipliers, scale_initial
from gpt_jax.sharding import make_mesh
from gpt_jax.step import build_train_step

HEAD = 16


def corpus(rows: int, length: int):
    """Batches of the embedded corpus by step, and its vocabulary's size."""
    config = base()
    config.batch_size, config.context_length = rows, length
    config.data.tokenizer.vocab_size = 512
    config.model.update(num_layers=1, d_model=16, num_heads=1)
    run = build_run(resolve(config), log=lambda line: None)
    return lambda step: run.data.train.rows(step, slice(None)), run.config.model.vocab_size


def setup(width: int, args: argparse.Namespace, vocab_size: int, mup: bool):
    """A step whose learning rate lies in the optimizer's state (one compilation for all rates), and a fresh state."""
    shape = dict(num_layers=2, d_model=width, num_heads=width // HEAD, positions="rope", tie_embeddings=False)
    model = Transformer(ModelConfig(vocab_size=vocab_size, norm="rmsnorm", bias=False, **shape))
    objective = CausalLM(model)

    def adam(learning_rate):
        def scaled(updates, params=None):
            factors = rate_multipliers(updates, width, args.base) if mup else jax.tree.map(lambda u: 1.0, updates)
            return jax.tree.map(lambda u, f: -learning_rate * f * u, updates, factors)

        return optax.chain(optax.scale_by_adam(b2=0.95), optax.stateless(scaled))

    tx = optax.inject_hyperparams(adam)(learning_rate=1.0)
    step = build_train_step(
        objective, tx, objective.batch_spec(args.rows, args.length), mesh=make_mesh(devices=jax.devices()[:1])
    )

    def fresh(rate: float, seed: int):
        state = step.init(seed)
        if mup:
            state = step.with_params(state, scale_initial(state.params, width, args.base))
        state.opt_state.hyperparams["learning_rate"] = jnp.asarray(rate)
        return state

    return model, step, fresh


def coordinates(model: Transformer, params, tokens) -> dict[str, float]:
    """Root mean square of the stream that enters each layer and the output, and of the logits."""
    run = jax.jit(lambda p, t: model.apply({"params": p}, t, taps=Taps(collect=("residual", "mlp_out"))))
    out = run(params["model"], tokens)
    rms = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x))))  # noqa: E731
    found = out.intermediates
    return {
        "feed-forward output": rms(found["mlp_out"][-1]),
        "stream": rms(found["residual_out"]),
        "logits": rms(out.logits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/mup"))
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--base", type=int, default=32, help="the width whose best rate is carried over")
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0**k for k in range(-10, -3)])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--check-steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    batch, vocab_size = corpus(args.rows, args.length)
    losses: dict[str, dict[int, list[float]]] = {}
    sizes: dict[str, dict[int, list[dict[str, float]]]] = {}
    for name, mup in (("standard", False), ("muP", True)):
        losses[name], sizes[name] = {}, {}
        for width in args.widths:
            model, step, fresh = setup(width, args, vocab_size, mup)
            state, tokens = fresh(args.rates[len(args.rates) // 2], 0), batch(10**6)["tokens"]
            sizes[name][width] = [coordinates(model, state.params, tokens)]
            for number in range(args.check_steps):
                state, _ = step(state, step.put(batch(number)))
                sizes[name][width].append(coordinates(model, state.params, tokens))
            losses[name][width] = []
            for rate in args.rates:
                ends = []
                for seed in range(args.seeds):
                    state, tail = fresh(rate, seed), []
                    for number in range(args.steps):
                        state, metrics = step(state, step.put(batch(number)))
                        tail = [*tail, metrics["loss"]][-8:]
                    ends.append(float(np.mean(jax.device_get(tail))))
                losses[name][width].append(float(np.mean(ends)))
            print(f"{name:9} width {width:4}: " + "  ".join(f"{x:.3f}" for x in losses[name][width]), flush=True)
    (args.out / "coordinates.png").write_bytes(plot_coordinates(sizes))
    (args.out / "sweep.png").write_bytes(plot_sweep(losses, args.rates))
    best = {n: {w: args.rates[int(np.nanargmin(v))] for w, v in by.items()} for n, by in losses.items()}
    print(json.dumps({"rates": args.rates, "losses": losses, "best_rate": best, "coordinates": sizes}))


def plot_coordinates(sizes) -> bytes:
    figure, axes = new_figure(10, 6.4, 2, 3, sharex=True)
    for row, (name, by_width) in enumerate(sizes.items()):
        for axis, what in zip(axes[row], next(iter(by_width.values()))[0], strict=True):
            for step in range(len(next(iter(by_width.values())))):
                values = [records[step][what] for records in by_width.values()]
                axis.plot(
                    list(by_width), values, marker="o", color=(0.1, 0.35, 0.7, 0.25 + 0.15 * step), label=f"{step}"
                )
            axis.set(xscale="log", yscale="log", title=f"{name}: {what}")
            axis.set_xticks(list(by_width), [str(w) for w in by_width], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[row][0].set_ylabel("root mean square")
    for axis in axes[-1]:
        axis.set_xlabel("width")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, title="updates", loc="outside right center", fontsize=9)
    return png_of(figure)


def plot_sweep(losses, rates) -> bytes:
    figure, axes = new_figure(9.5, 4.2, 1, 2, sharey=True)
    for axis, (name, by_width) in zip(axes, losses.items(), strict=True):
        for width, values in by_width.items():
            line = axis.plot(rates, values, marker="o", label=f"width {width}")[0]
            at = int(np.nanargmin(values))
            axis.plot(rates[at], values[at], "*", markersize=15, color=line.get_color())
        axis.set(xscale="log", title=name, xlabel="learning rate at the base width (the star is the best)")
        axis.grid(alpha=0.3)
    low = min(min(v) for by in losses.values() for v in by.values())
    axes[0].set(ylabel="training loss (nats per token)", ylim=(low - 0.1, low + 2.0))
    axes[0].legend()
    return png_of(figure)


if __name__ == "__main__":
    main()
