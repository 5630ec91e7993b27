"""What a compiled program moves: collectives by kind and bytes to memory, from XLA's text, loops counted as they run.

XLA's `cost_analysis` counts a loop's body once and is empty for GPUs that are not here. This reads the program instead:
computations, instructions, and for each loop how often it runs (XLA's own note, or the constant its condition compares
with). All bytes are those of one device.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Sequence

_SIZES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5}
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# No traffic of their own: names for what is there, or containers whose contents are counted.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "iota",
    "partition-id",
    "replica-id",
    "optimization-barrier",
    "async-done",
    "async-update",
    "domain",
    "add-dependency",
    "broadcast",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: name, opcode, type as text, what is in its parentheses, and the rest of the line."""

    name: str
    opcode: str
    type: str
    arguments: str
    rest: str
    root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-~]+)", self.arguments))


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the program.

    Attributes:
      kind: all-gather, ..., or "send to other slices". count: how often it runs in a step.
      bytes: what a device sends in all those runs, by a ring (all-gather: (n-1)/n of the result; all-reduce: twice
        that; reduce-scatter, all-to-all: (n-1)/n of the operand; permute: the operand).
      group: devices that take part together. beyond: those of `bytes` that leave the slice or host, when each of a
        group's devices in it sends its share (see `_beyond`).
    """

    kind: str
    count: float
    bytes: float
    group: int
    beyond: float

    @property
    def far(self) -> bool:
        """Whether a group reaches beyond the fast network."""
        return self.beyond > 0


@dataclasses.dataclass(frozen=True)
class Program:
    """Collectives, bytes read and written to memory by a device, and loops whose length could not be found."""

    collectives: tuple[Collective, ...]
    memory_bytes: float
    unknown_loops: int


def read_program(text: str, *, domains: Sequence[int], trips: int = 1) -> Program:
    """Reads a compiled program.

    Args:
      text: of `compiled.as_text()`. domains: for each device of the mesh, flattened, the number of the slice or host
        within which the network is fast.
      trips: how often a loop of unknown length runs.
    """
    computations, entry = parse(text)
    counts: dict[str, float] = collections.defaultdict(float)
    unknown = _run_counts(computations, entry, 1.0, trips, counts)
    found: dict[tuple[str, str], Collective] = {}
    memory = 0.0
    reached = _with_fusions(computations, counts)
    for name, instructions in computations.items():
        if name not in reached:
            continue
        table = {i.name: i for i in instructions}
        for i in instructions:
            kind = i.opcode.removesuffix("-start")
            if kind == "send" and "megascale" in i.rest:  # between TPU slices a host sends for each chip
                size = sum(_all_bytes(table[o].type) for o in i.operands if o in table)
                size *= reached[name]
                sent = Collective("send to other slices", reached[name], size, 2, size)
                found[kind, f"{name}/{i.name}"] = sent
            elif kind in _COLLECTIVES:
                if kind == "all-reduce" and "all-reduce-scatter" in name:
                    kind = "reduce-scatter"  # as TPUs write it: the sum, and the slice that is kept
                one = _collective(kind, i, table, reached[name], domains)
                # TPUs spread one collective over several fusions: they share its channel.
                channel = re.search(r"channel_id=(\d+)", i.rest)
                key = (kind, channel[1] if channel else f"{name}/{i.name}")
                if key not in found or found[key].bytes < one.bytes:
                    found[key] = one
            if name in counts:
                memory += counts[name] * _traffic(i, table, computations)
    return Program(tuple(found.values()), memory, unknown)


def totals(collectives: Sequence[Collective]) -> dict[str, dict[str, float]]:
    """{kind: {"count": ..., "bytes": ...}} of a step, the most bytes first."""
    out: dict[str, dict[str, float]] = {}
    for c in collectives:
        if c.bytes:
            one = out.setdefault(c.kind, {"count": 0.0, "bytes": 0.0})
            one["count"] += c.count
            one["bytes"] += c.bytes
    return dict(sorted(out.items(), key=lambda item: -item[1]["bytes"]))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns computations by name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            head = re.match(r"(ENTRY )?%?([\w.\-~]+) .*\{\s*$", line)
            if head and not line.startswith("HloModule"):
                current = computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":
            current = None
        else:  # a kernel's description may go over several lines: what is no instruction is skipped
            instruction = _instruction(line)
            if instruction:
                current.append(instruction)
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s*(ROOT )?%?([\w.\-~]+) = ", line)
    if not head:
        return None
    at = head.end()
    end = _closing(line, at) if line[at] == "(" else line.find(" ", at)
    kind, rest = line[at:end], line[end:].lstrip()
    opcode = re.match(r"([\w\-]+)\(", rest)
    if not opcode:
        return None
    close = _closing(rest, opcode.end() - 1)
    return Instruction(head[2], opcode[1], kind, rest[opcode.end() : close - 1], rest[close:], bool(head[1]))


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


@functools.lru_cache(maxsize=100_000)
def _bytes(text: str) -> float:
    """Bytes in main memory of a type as text; arrays that the compiler keeps on the chip (S(1), ...) are 0."""
    total = 0.0
    for kind, dims, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?", text):
        space = re.search(r"S\((\d+)\)", layout)
        if space and space[1] != "0":
            continue
        total += _size(kind) * math.prod(int(d) for d in dims.split(",") if d)
    return total


@functools.lru_cache(maxsize=100_000)
def _all_bytes(text: str) -> float:
    """Bytes of a type as text, wherever it lies."""
    return sum(
        _size(kind) * math.prod(int(d) for d in dims.split(",") if d)
        for kind, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", text)
    )


def _size(kind: str) -> float:
    if kind in _SIZES:
        return _SIZES[kind]
    bits = re.match(r"[a-z]+(\d+)", kind)
    return int(bits[1]) / 8 if bits else 0.0


def _called(i: Instruction, *keys: str) -> list[str]:
    names = []
    for key in keys:
        for group in re.findall(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-~]+)", i.rest):
            names += re.findall(r"%?([\w.\-~]+)", group)
    return names


def _run_counts(computations: dict, name: str, times: float, trips: int, counts: dict[str, float]) -> int:
    """Adds how often each sequential computation runs; returns how many loops have an unknown length."""
    counts[name] += times
    unknown = 0
    for i in computations.get(name, ()):
        if i.opcode == "while":
            length = _trip_count(i, computations)
            unknown += length is None
            for body in _called(i, "body"):
                unknown += _run_counts(computations, body, times * (trips if length is None else length), trips, counts)
        elif i.opcode in ("call", "async-start"):
            for inner in _called(i, "to_apply", "calls", "called_computations"):
                unknown += _run_counts(computations, inner, times, trips, counts)
        elif i.opcode == "conditional":
            for inner in _called(i, "branch_computations", "true_computation", "false_computation"):
                unknown += _run_counts(computations, inner, times, trips, counts)
    return unknown


def _trip_count(loop: Instruction, computations: dict) -> int | None:
    noted = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if noted:
        return int(noted[1])
    for name in _called(loop, "condition"):
        lines = list(computations.get(name, ()))
        lines += [j for i in lines for inner in _called(i, "calls") for j in computations.get(inner, ())]
        bounds = []
        for i in lines:
            if i.opcode == "constant" and i.arguments.isdigit() and re.match(r"[su]\d+\[\]", i.type):
                bounds.append(int(i.arguments))
        compares = any("direction=LT" in i.rest or i.opcode == "fusion" for i in lines)
        if bounds and compares:
            return max(bounds)
    return None


def _with_fusions(computations: dict, counts: dict[str, float]) -> dict[str, float]:
    """How often each computation runs, those that fusions call included."""
    reached = dict(counts)
    waiting = list(counts)
    while waiting:
        name = waiting.pop()
        for i in computations.get(name, ()):
            if i.opcode == "while":
                continue
            for inner in _called(i, "calls", "to_apply"):
                if inner not in reached:
                    reached[inner] = reached[name]
                    waiting.append(inner)
    return reached


def _collective(kind: str, i: Instruction, table: dict, times: float, domains: Sequence[int]) -> Collective:
    groups = _groups(i.rest) or [list(range(len(domains)))]
    size = max(len(g) for g in groups)
    operand = sum(_all_bytes(table[o].type) for o in i.operands if o in table)
    if not operand and kind == "all-gather":
        operand = _all_bytes(i.type) / size
    elif not operand:
        operand = _all_bytes(i.type)
    part = (size - 1) / size
    sent = {
        "all-gather": operand * (size - 1),
        "all-reduce": 2 * operand * part,
        "collective-permute": operand,
        "collective-broadcast": operand,
    }.get(kind, operand * part)
    beyond = max(_beyond(kind, [domains[device] for device in group]) for group in groups)
    return Collective(kind, times, times * sent, size, beyond * times * sent)


def _beyond(kind: str, domains: Sequence[int]) -> float:
    """Part of what a device of a group sends that must leave its slice or host.

    Of n devices on h hosts, n / h on each, those at the same place of each host exchange one n-th of all, the rest
    goes over the fast network: (h - 1) of the (n - 1) parts. All-to-all: what is for the devices of other hosts.
    """
    n, h = len(domains), len(set(domains))
    if h == 1:
        return 0.0
    return (n - n / h if "all-to-all" in kind else h - 1) / (n - 1)


def _groups(rest: str) -> list[list[int]]:
    """The groups of devices of a collective; [] is one of all."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if pairs:
        return [[int(a), int(b)] for a, b in re.findall(r"\{?(\d+),(\d+)\}?", pairs[1])]
    short = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if short:
        shape, base = ([int(n) for n in short[k].split(",")] for k in (1, 2))
        order = [int(n) for n in short[3].split(",")] if short[3] else list(range(len(base)))
        return _iota(shape, base, order)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
    if named:
        return _mesh_groups(named[1], named[2])
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    return []


def _iota(shape: list[int], base: list[int], order: list[int]) -> list[list[int]]:
    import numpy as np

    flat = np.arange(math.prod(base)).reshape(base).transpose(order).reshape(shape)
    return flat.reshape(-1, shape[-1]).tolist()


def _mesh_groups(mesh: str, axes: str) -> list[list[int]]:
    """Groups along some axes, e.g. "'a'=4,'b'=2" and "'a'", or a part of one: "'a':(1)2" is its first two of four."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in
             re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}  # fmt: skip
    shape, moving = [], []
    for name, size in sizes.items():
        before, width = parts.get(name, (1, 1))
        moving += [len(shape) + 1] if name in parts else []
        shape += [before, width, size // (before * width)]
    order = [axis for axis in range(len(shape)) if axis not in moving] + moving
    members = math.prod(shape[axis] for axis in moving)
    return _iota([math.prod(shape) // members, members], shape, order)


def _traffic(i: Instruction, table: dict, computations: dict) -> float:
    """Bytes that an instruction reads and writes; of an array it takes a slice of, the slice."""
    if i.opcode in _FREE or i.opcode.endswith("-done"):
        return 0.0
    types = [table[o].type for o in i.operands if o in table]
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _bytes(i.type)
    if i.opcode == "dynamic-update-slice":
        return 2 * _bytes(types[1]) if len(types) > 1 else 0.0
    if i.opcode.removesuffix("-start") in (*_COLLECTIVES, "copy") and i.opcode.endswith("-start"):
        return 2 * sum(_bytes(t) for t in types)
    if i.opcode == "fusion":
        inner = next((computations[c] for c in _called(i, "calls") if c in computations), None)
        if inner is not None:
            return _fusion(i, types, inner)
    return _bytes(i.type) + sum(_bytes(t) for t in types)


def _fusion(i: Instruction, types: list[str], inner: list[Instruction]) -> float:
    """Traffic of a fusion: of its parameters what it uses of them, and what it makes anew."""
    total = 0.0
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for j in inner:
        for operand in j.operands:
            users[operand].append(j)
    by_name = {j.name: j for j in inner}
    for j in inner:
        if j.opcode != "parameter":
            continue
        number = int(j.arguments) if j.arguments.isdigit() else len(types)
        outer = _bytes(types[number] if number < len(types) else j.type)
        uses = [u for u in _through_bitcasts(j, users) if not (u.root and u.opcode == "tuple")]
        if uses and all(u.opcode in ("dynamic-slice", "slice", "gather") for u in uses):
            total += min(sum(_all_bytes(u.type) for u in uses), outer)
        elif uses and not all(u.opcode == "dynamic-update-slice" and _source(u, by_name) is j for u in uses):
            total += outer  # else it is handed on, or written to in place
    root = next((j for j in inner if j.root), None)
    if root is None:
        return total + _bytes(i.type)
    made = [by_name[o] for o in root.operands if o in by_name] if root.opcode == "tuple" else [root]
    return total + sum(_written(j, by_name) for j in made)


def _through_bitcasts(j: Instruction, users: dict[str, list[Instruction]]) -> list[Instruction]:
    out = []
    for use in users[j.name]:
        out += _through_bitcasts(use, users) if use.opcode == "bitcast" else [use]
    return out


def _unwrap(j: Instruction | None, by_name: dict[str, Instruction]) -> Instruction | None:
    while j is not None and j.opcode == "bitcast" and j.operands:
        j = by_name.get(j.operands[0])
    return j


def _source(update: Instruction, by_name: dict[str, Instruction]) -> Instruction | None:
    return _unwrap(by_name.get(update.operands[0]) if update.operands else None, by_name)


def _written(j: Instruction, by_name: dict[str, Instruction]) -> float:
    made = _unwrap(j, by_name)
    if made is None or made.opcode == "parameter":
        return 0.0
    if made.opcode == "dynamic-update-slice" and len(made.operands) > 1 and made.operands[1] in by_name:
        return 2 * _all_bytes(by_name[made.operands[1]].type)
    return _bytes(j.type)
