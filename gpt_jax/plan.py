"""The command `gpt-jax plan`: will a config fit a machine that is not here, what will it send, how fast at best?

It compiles the real train step ahead of time, for a TPU slice, a GPU cluster or simulated devices: no accelerator, no
data, no parameters. A table for people, then a line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gpt_jax import cluster
from gpt_jax import config as configs
from gpt_jax.ahead import Compiled, compile_step
from gpt_jax.compiler_flags import USABLE
from gpt_jax.config import Config
from gpt_jax.errors import UserError
from gpt_jax.hlo import totals
from gpt_jax.objectives.compose import part_rows
from gpt_jax.sharding import too_replicated
from gpt_jax.topologies import CHIPS, GIB, Machine, describe, simulated

_MOST_TRIALS = 12  # compilations in a search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--config", required=True, metavar="FILE|NAME", help="a config file, or its name in configs/")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--topology",
        default="",
        metavar="CHIP:SIZES",
        help=f"a TPU slice (v5e:16x16, v5p:8x16x16; --config.mesh.slices=N for several) or a GPU cluster, hosts x GPUs "
        f"(h100:128x8); chips: {', '.join(CHIPS)}",
    )
    where.add_argument("--devices", type=int, default=0, metavar="N", help="simulated devices of this CPU instead")
    where.add_argument(
        "--here",
        action="store_true",
        help="pre-flight instead, on every host: devices, versions, config and data, memory, speeds, folders",
    )
    parser.add_argument("--workdir", default="", help="--here: the run's directory, to write to and read from")
    parser.add_argument(
        "--needed-bytes",
        type=int,
        default=0,
        metavar="N",
        help="--here: what a device needs (hbm_bytes_per_chip of a plan)",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="--here: the time there is")
    parser.add_argument(
        "--limit",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="--here: when to end in the midst of a check that hangs; 0: after 60, or --seconds if that is more",
    )
    cluster.add_arguments(parser)
    parser.add_argument("--max-batch", action="store_true", help="search the largest batch that fits")
    parser.add_argument("--no-advice", action="store_true", help="do not search what would fit when this does not")
    parser.add_argument("--json", action="store_true", help="print one JSON line, nothing else")


def main(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Runs the command."""
    config = configs.load(args.config, overrides)
    show = functools.partial(print, flush=True)
    if args.here:
        from gpt_jax.preflight import run_preflight

        return run_preflight(
            config,
            workdir=args.workdir,
            needed_bytes=args.needed_bytes,
            seconds=args.seconds,
            limit=args.limit,
            environ=cluster.environment_of(args),
            log=(lambda line: show(line) if line.startswith("{") else None) if args.json else show,
        )
    machine = machine_of(args.topology, args.devices, config)
    say = (lambda line: None) if args.json else show
    compiled = compile_step(config, machine)
    result = summary(compiled, machine)
    say(table(compiled, machine))
    whole = too_replicated(*compiled.replicated)
    if whole:
        print(f"gpt-jax: warning: {whole}", file=sys.stderr)
    if result["fits"] is False and not args.no_advice:
        say("does not fit; looking for what would ...")
        result["advice"] = advise(compiled, machine)
        for line in result["advice"] or ["nothing tried does: take a larger machine"]:
            say(f"  {line}")
    if args.max_batch:
        result["max_batch_per_shard"] = max_batch(compiled, machine)
        result["max_batch_per_chip"] = result["max_batch_per_shard"] * compiled.shards / result["chips"]
        say(f"largest batch that fits: {result['max_batch_per_shard']} sequences a shard and micro-batch")
    print(json.dumps(result))
    return 0


def machine_of(topology: str, devices: int, config: Config) -> Machine:
    """Returns the machine that the flags name."""
    if topology:
        return describe(topology, max(1, config.mesh.slices))
    return simulated(devices)


def capacity(machine: Machine) -> int:
    """Bytes of memory of a chip; of a simulated device, its share of this machine's."""
    if machine.chip:
        return machine.chip.capacity
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(machine.devices)


def fits(compiled: Compiled, machine: Machine) -> bool:
    """Whether arguments + outputs - aliased + temporaries leave 8% of the memory free."""
    return compiled.program and compiled.hbm_bytes <= USABLE * capacity(machine)


def roofline(compiled: Compiled, machine: Machine) -> dict[str, float]:
    """Seconds that a step needs at least for each resource, were all of them used at their published rates at once.

    compute: matrix products at the bf16 peak. hbm: memory traffic. link: collectives within a slice or host. network:
    those beyond it. {} for simulated devices, whose times mean nothing, and where there is no program.
    """
    chip = machine.chip
    if chip is None or not compiled.program:
        return {}
    far = sum(c.beyond for c in compiled.collectives)
    near = sum(c.bytes for c in compiled.collectives) - far
    return {
        "compute": compiled.flops / len(machine.devices) / chip.peak,
        "hbm": compiled.memory_traffic / chip.hbm,
        "link": near / chip.link,
        "network": far / chip.network,
    }


def mfu_bound(compiled: Compiled, machine: Machine) -> float | None:
    """The MFU that the longest of the times allows; None where there are none.

    The memory traffic of attention that stands in for a GPU's is not the run's, so that it bounds nothing.
    """
    times = roofline(compiled, machine)
    if machine.chip is None or not times:
        return None
    longest = max(seconds for name, seconds in times.items() if name != "hbm" or not compiled.stand_in)
    return compiled.model_flops / (len(machine.devices) * machine.chip.peak) / longest


def summary(compiled: Compiled, machine: Machine) -> dict[str, Any]:
    """What the command prints as JSON. Bytes are those of one chip and step; FLOPs those of all chips.

    A batch per shard is the sequences of a micro-batch on one of the `shards` it is cut into (axes data and fsdp).
    """
    return {
        "config": compiled.config.name,
        "topology": machine.name,
        "chips": len(machine.devices),
        "mesh": compiled.mesh,
        "params": compiled.params,
        "fits": fits(compiled, machine),
        "hbm_bytes_per_chip": compiled.hbm_bytes,
        "hbm_capacity_bytes": capacity(machine),
        "state_bytes_per_chip": compiled.state_bytes,
        "temporary_bytes_per_chip": compiled.temporary_bytes,
        "host_bytes_per_chip": compiled.host_bytes,
        "replicated_part": compiled.replicated[0],
        "replicated": compiled.replicated[1],
        "flops_per_step": compiled.flops,
        "model_flops_per_step": compiled.model_flops,
        "flops_over_model_flops": compiled.flops / compiled.model_flops,
        "hbm_traffic_bytes": compiled.memory_traffic,
        "collective_bytes": sum(c.bytes for c in compiled.collectives),
        "collectives": totals(compiled.collectives),
        "unknown_loops": compiled.unknown_loops,
        "roofline_s": roofline(compiled, machine),
        "mfu_bound": mfu_bound(compiled, machine),
        "stand_in": compiled.stand_in,
        "shards": compiled.shards,
        "batch_per_shard": compiled.rows,
        "max_batch_per_shard": None,
        "max_batch_per_chip": None,
        "compile_s": round(compiled.compile_s, 1),
    }


def table(compiled: Compiled, machine: Machine) -> str:
    """What the command prints for people."""
    c, config, room = compiled, compiled.config, capacity(machine)
    times = roofline(compiled, machine)
    mesh = " x ".join(f"{axis} {size}" for axis, size in c.mesh.items())
    verdict = "fits" if fits(c, machine) else "does NOT fit"
    spare = USABLE * room - c.hbm_bytes
    lines = [
        f"{config.name} on {machine.name}: {len(machine.devices):,} chips, {mesh}; compiled in {c.compile_s:.1f} s",
        _line("parameters", f"{c.params:,}"),
        _line(
            "batch",
            f"{config.batch_size:,} x {config.context_length:,} tokens in {config.microbatches} micro-batches: "
            f"{c.rows} sequences a shard; remat {config.model.remat}, attention {config.model.attention}",
        ),
        _line(
            "memory of a chip",
            f"{_gib(c.state_bytes)} state and batch + {_gib(c.temporary_bytes)} temporaries = {_gib(c.hbm_bytes)} "
            f"of {_gib(room)} ({c.hbm_bytes / room:.1%})",
        ),
        _line("", f"{verdict}: {_gib(abs(spare))} {'to spare of' if spare >= 0 else 'more than'} the {USABLE:.0%}"),
    ]
    if c.host_bytes:
        lines.append(_line("memory of its host", _gib(c.host_bytes)))
    lines.append(
        _line(
            "FLOPs of a step",
            f"{c.flops:.4g} in matrix products = {c.flops / c.model_flops:.2f} x (6 N + 12 L D T per token, "
            "less of what is frozen)",
        )
    )
    if not c.program:
        return "\n".join([*lines, _line("", "the compiler refused the program: no more is known of it")])
    lines.append(_line("memory traffic", f"{c.memory_traffic / 1e9:,.1f} GB a chip and step"))
    for kind, one in totals(c.collectives).items():
        lines.append(_line(kind, f"{one['bytes'] / 1e9:,.3f} GB sent a chip and step, in {one['count']:,.0f} calls"))
    if c.unknown_loops:
        lines.append(_line("", f"{c.unknown_loops} loops of unknown length, counted {config.microbatches} times"))
    if times:
        bound, but = mfu_bound(c, machine), " but hbm, where attention stands in for cuDNN's" * c.stand_in
        shown = ", ".join(f"{name} {1e3 * seconds:,.1f}" for name, seconds in times.items())
        lines.append(_line("at least, in ms", f"{shown}; so MFU is at most {bound:.1%} (bound by the largest{but})"))
    return "\n".join(lines)


def _line(name: str, text: str) -> str:
    return f"  {name:20}{text}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _try(config: Config, machine: Machine) -> Compiled | None:
    """Compiles a variant; None for one that cannot be."""
    try:
        return compile_step(config, machine)
    except UserError:
        return None


def advise(compiled: Compiled, machine: Machine) -> list[str]:
    """Returns lines of single changes that would make a config fit; where none does, of one combination that would."""
    config, lines = compiled.config, []
    trials = 0
    for options in (remats(config), micro_batches(compiled), meshes(config, compiled.mesh), batches(compiled)):
        for text, changed in options:
            if trials >= _MOST_TRIALS:
                break
            found = _try(changed, machine)
            trials += 1
            if found and fits(found, machine):
                lines.append(f"{text}: {_gib(found.hbm_bytes)} a chip")
                break
    if lines:
        return lines
    full = _model(config, remat="full")
    for text, changed in (*micro_batches(compiled, full), *meshes(full, compiled.mesh)):
        found = _try(changed, machine)
        if found and fits(found, machine):
            return [f"--config.model.remat=full {text}: {_gib(found.hbm_bytes)} a chip"]
    return []


def _model(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def remats(config: Config) -> Iterator[tuple[str, Config]]:
    """Remat policies that keep less, the cheapest in time first."""
    order = ("none", "dots", "dots_no_batch", "offload_dots", "full")
    for policy in order[order.index(config.model.remat) + 1 :]:
        if policy == "offload_dots":  # takes the host's memory: for the user to choose
            continue
        yield f"--config.model.remat={policy}", _model(config, remat=policy)


def micro_batches(compiled: Compiled, config: Config | None = None) -> Iterator[tuple[str, Config]]:
    """More micro-batches, down to one sequence a shard."""
    config, rows = config or compiled.config, compiled.rows
    for times in range(2, rows + 1):
        if rows % times == 0:
            pieces = config.microbatches * times
            yield f"--config.microbatches={pieces}", dataclasses.replace(config, microbatches=pieces)


def meshes(config: Config, mesh: Mapping[str, int]) -> Iterator[tuple[str, Config]]:
    """All of the data axis to fsdp, then more and more of it to tensor."""
    chips = mesh["data"] * mesh["fsdp"] * mesh["tensor"]
    for tensor in (1, 2, 4, 8):
        if chips % tensor or tensor < mesh["tensor"] or config.mesh.slices > 1:
            continue
        sizes = dict(data=1, fsdp=chips // tensor, tensor=tensor)
        if sizes == {axis: mesh[axis] for axis in sizes} or config.batch_size % (sizes["fsdp"] * config.microbatches):
            continue
        text = " ".join(f"--config.mesh.{axis}={size}" for axis, size in sizes.items())
        yield text, dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))


def batches(compiled: Compiled) -> Iterator[tuple[str, Config]]:
    """Smaller batches, halved down to one sequence a shard."""
    rows = compiled.rows
    while rows > 1:
        rows //= 2
        changed = with_rows(compiled, rows)
        if changed is None:
            continue
        text = f"--config.batch_size={changed.batch_size}"
        if changed.objective != compiled.config.objective:
            text += f' "--config.objective={dict(changed.objective)!r}"'
        yield text, changed


def with_rows(compiled: Compiled, rows: int) -> Config | None:
    """The same config with another number of sequences a shard; None where a mixture's rows cannot be scaled to it."""
    config, pieces = compiled.config, compiled.config.microbatches * compiled.shards
    size = rows * pieces
    objective = config.objective
    if isinstance(objective.get("tasks"), Mapping):
        counts = part_rows(objective, config.batch_size)
        if any(count * size % (config.batch_size * pieces) for count in counts.values()):
            return None
        tasks = {
            name: {**task, "rows": counts[name] * size // config.batch_size} if "rows" in task else task
            for name, task in objective["tasks"].items()
        }
        objective = {**objective, "tasks": tasks}
    return dataclasses.replace(
        config,
        batch_size=size,
        batch_schedule=(),
        eval=dataclasses.replace(config.eval, batch_size=0),
        objective=objective,
    )


def max_batch(compiled: Compiled, machine: Machine) -> int:
    """Returns the most sequences a shard (and micro-batch) that fit; 0 if one does not.

    Raises:
      UserError: the config refuses a size for another reason than memory.
    """
    # Counted in the fewest rows that a mixture's parts can share.
    step = next(n for n in range(1, compiled.rows + 1) if compiled.rows % n == 0 and with_rows(compiled, n))
    known: dict[int, bool] = {compiled.rows: fits(compiled, machine)}
    sizes: dict[int, int] = {compiled.rows: compiled.hbm_bytes} if compiled.program else {}

    def holds(steps: int) -> bool:
        rows = steps * step
        if rows not in known:
            found = compile_step(with_rows(compiled, rows), machine)
            known[rows] = fits(found, machine)
            if found.program:
                sizes[rows] = found.hbm_bytes
        return known[rows]

    def guess() -> int | None:
        rows = _guess(sizes, USABLE * capacity(machine))
        return None if rows is None else rows // step

    return step * largest(holds, compiled.rows // step, guess)


def largest(holds: Callable[[int], bool], start: int, guess: Callable[[], int | None]) -> int:
    """Returns the largest n >= 0 with `holds(n)`, which is true up to some n: looks from `start`, helped by guesses."""
    low, high = 0, None
    at = start
    for _ in range(4 * _MOST_TRIALS):
        if holds(at):
            low = at
        else:
            high = at
        if high is not None and high - low <= 1:
            return low
        next_at = guess()
        if high is None:
            at = max(low + 1, min(next_at or 2 * low, 8 * low)) if low else start
        else:
            at = min(max(next_at, low + 1), high - 1) if next_at is not None else (low + high) // 2
    return low


def _guess(sizes: Mapping[int, int], limit: float) -> int | None:
    """Where a straight line through the two largest known sizes meets the limit."""
    if len(sizes) < 2:
        return None
    a, b = sorted(sizes)[-2:]
    slope = (sizes[b] - sizes[a]) / (b - a)
    return int(b + (limit - sizes[b]) / slope) if slope > 0 else None
