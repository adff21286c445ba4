"""Collectives of a partitioned HLO module: which there are, over which mesh axes, how often they run, and what they send.

A collective is counted as often as its loops run (layers, microbatches, slices of the head). Two things that GPU and TPU compilers do with
a program that only XLA's partitioner has seen are taken as done: an all-reduce of which each device keeps its slice alone is a
reduce-scatter, and all-reduces that are only added up are one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "token": 0}
# What may stand between an all-reduce and the slice a device keeps of it, without needing the whole.
_PASSED_THROUGH = {"bitcast", "convert", "copy", "get-tuple-element", "reshape", "transpose"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of one step."""

    kind: str
    axes: str
    """Mesh axes it runs over."""
    group: int
    """Devices that take part together."""
    type: str
    """Type and shape of the whole: what is gathered, reduced or exchanged."""
    count: int
    """Times per step."""
    bytes: int
    """Bytes of the whole, once."""
    where: str
    """The operation of the model that asked for it."""

    @property
    def sent(self) -> int:
        """Bytes that a device sends per step, by the ring: (n - 1)/n of the whole, twice for an all-reduce."""
        if self.kind == "collective-permute":
            return self.count * self.bytes
        return self.count * self.bytes * (self.group - 1) * (2 if self.kind == "all-reduce" else 1) // self.group


@dataclasses.dataclass
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: list[str]
    elements: list[str]
    """Which element of a tuple each operand is; empty where the operand is no tuple's."""
    rest: str


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(body|condition|calls|to_apply|called_computations|branch_computations)=(?:%?([\w.\-]+)|\{([^}]*)\})")


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The computations of an HLO module by name, and the name of its entry."""
    found: dict[str, list[_Instruction]] = {}
    entry, lines = "", list[_Instruction]()
    for text in hlo.splitlines():
        if header := _HEADER.match(text):
            found[header[2]] = lines = []
            entry = header[2] if header[1] else entry
        elif line := _LINE.match(text):
            name, kind, opcode, tail = line.groups()
            inside, _, rest = tail.partition(")")
            operands = re.findall(r"%([\w.\-]+)(?:#(\d+))?", inside)
            lines.append(_Instruction(name, kind, opcode, [o for o, _ in operands], [e for _, e in operands], rest))
    return found, entry


def _arrays(type_text: str) -> list[tuple[str, int, int]]:
    """(text, elements, bytes) of every array of a type, a tuple's in order."""
    out = []
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", type_text):
        size = math.prod(int(d) for d in dims.split(",") if d)
        bits = _BITS.get(kind) or int(re.sub(r"\D.*", "", kind.lstrip("fsuc")) or 0)
        out.append((f"{kind}[{dims}]", size, size * bits // 8))
    return out


def _trips(loop: _Instruction, computations: Mapping[str, list[_Instruction]], constants: Mapping[str, int]) -> float:
    """How often a loop runs: the compiler's word, or the one constant its condition compares with; nan if neither says."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    compares = [i for i in computations[condition[1]] if i.opcode == "compare" and "direction=LT" in i.rest] if condition else []
    limits = [constants[operand] for i in compares for operand in i.operands if operand in constants]
    return limits[0] if len(limits) == 1 else math.nan


def _runs(computations: Mapping[str, list[_Instruction]], entry: str, constants: Mapping[str, int]) -> dict[str, float]:
    """How often each computation runs per step; nan inside a loop of unknown length."""
    runs: dict[str, float] = defaultdict(float)

    def visit(name: str, times: float) -> None:
        runs[name] += times
        for i in computations.get(name, []):
            trips = _trips(i, computations, constants) if i.opcode == "while" else 1
            for how, one, several in _CALLED.findall(i.rest):
                for called in [one] if one else re.findall(r"%?([\w.\-]+)", several):
                    visit(called, times * (trips if how in ("body", "condition") else 1))

    visit(entry, 1)
    return runs


def device_groups(text: str) -> np.ndarray:
    """The groups [groups, devices] of a replica_groups attribute, in any of XLA's three notations.

    Raises:
      ValueError: a fourth notation.
    """
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text):
        axes, dims, order, chosen = mesh.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        ids = _iota(dims, order) if dims else np.arange(math.prod(sizes.values()))
        # A chosen axis may be a part of one, 'x':(before)size: the axis is split into before x size x rest.
        parts = {
            name: (int(before or 1), int(size or sizes[name])) for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen)
        }
        split = [n for name, size in sizes.items() for n in (*parts.get(name, (size, 1)), size // math.prod(parts.get(name, (size, 1))))]
        inside = [3 * list(sizes).index(name) + 1 for name in parts]
        return np.moveaxis(ids.reshape(split), inside, range(-len(inside), 0)).reshape(-1, math.prod(split[i] for i in inside))
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota[2], iota[3]).reshape([int(x) for x in iota[1].split(",")])
    if listed := re.match(r"\{(\{[\d,{}]*\})\}", text):
        return np.array([[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    raise ValueError(f"replica_groups={text[:80]} is not understood")


def _iota(dims: str, order: str | None) -> np.ndarray:
    """0 .. n - 1 laid out as `dims`, transposed."""
    ids = np.arange(math.prod(int(d) for d in dims.split(","))).reshape([int(d) for d in dims.split(",")])
    return ids.transpose([int(d) for d in order.split(",")]) if order else ids


def mesh_axes(group: np.ndarray, mesh: Mapping[str, int]) -> str:
    """The mesh axes along which the devices of a group differ; with the group's size where it is a part of them."""
    places = np.unravel_index(np.asarray(group), tuple(mesh.values()))
    axes = [axis for axis, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1]
    part = "" if math.prod(mesh[a] for a in axes) == len(group) else f" ({len(group)} of {math.prod(mesh[a] for a in axes)})"
    return " x ".join(axes) + part


def _kept_slice(start: str, elements: int, group: int, lines: list[_Instruction]) -> bool:
    """Whether a device uses its 1/group of a result alone."""
    users = [i for i in lines if start in i.operands]
    return bool(users) and all(
        _kept_slice(i.name, elements, group, lines) if i.opcode in _PASSED_THROUGH
        else i.opcode == "dynamic-slice" and i.operands[0] == start and _arrays(i.type)[0][1] * group == elements
        for i in users
    )  # fmt: skip


def _added_up(lines: list[_Instruction]) -> set[str]:
    """All-reduces that cost nothing because they are only added to another: sum(a) + sum(b) = sum(a + b), of which one stays."""
    by_name = {i.name: i for i in lines}
    uses = Counter(o for i in lines for o in set(i.operands))

    def terms(name: str) -> list[str]:
        """The all-reduces whose sum this is; none if it is anything else, or is needed elsewhere."""
        i = by_name[name]
        if uses[name] != 1:
            return []
        if i.opcode == "all-reduce":
            return [name] if len(i.operands) == 1 else []
        if i.opcode in _PASSED_THROUGH | {"dynamic-slice"}:
            return terms(i.operands[0])
        parts = [terms(o) for o in i.operands] if i.opcode == "add" else []
        return [t for p in parts for t in p] if parts and all(parts) else []

    sums = [[terms(o) for o in i.operands] for i in lines if i.opcode == "add"]
    return {t for parts in sums if all(parts) for t in [t for p in parts for t in p][1:]}


def collectives(hlo: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective of a partitioned HLO module, equal ones together, most bytes first.

    Args:
      hlo: text of the module.
      mesh: sizes of the mesh axes by name, in the mesh's order.

    Raises:
      ValueError: a collective runs in a loop of unknown length, or between devices in a notation that is not understood.
    """
    computations, entry = _computations(hlo)
    constants = {m[1]: int(m[2]) for m in re.finditer(r"%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", hlo)}
    runs = _runs(computations, entry, constants)
    found: Counter = Counter()
    for name, lines in computations.items():
        types, free = {i.name: i.type for i in lines}, _added_up(lines)
        for i in lines:
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS or not runs[name] or i.name in free:
                continue
            if math.isnan(runs[name]):
                raise ValueError(f"{i.name} runs in a loop of unknown length")
            where = re.search(r'op_name="([^"]*)"', i.rest)
            if kind == "collective-permute":
                pairs = re.findall(r"\{(\d+),(\d+)\}", i.rest.split("source_target_pairs=")[1].split("}}")[0] + "}")
                groups = np.array([[int(a), int(b)] for a, b in pairs if a != b][:1] or [[0]])
            else:
                groups = device_groups(i.rest.split("replica_groups=")[1])
            group = groups.shape[1]
            if group == 1:
                continue
            for operand, element in zip(i.operands, i.elements, strict=True):
                arrays = _arrays(types[operand])
                for text, elements, size in [arrays[int(element)]] if element else arrays:
                    own = kind
                    if kind == "all-gather":
                        text, size = f"{text} x {group}", size * group
                    if kind == "all-reduce" and len(i.operands) == 1 and _kept_slice(i.name, elements, group, lines):
                        own = "reduce-scatter"
                    found[own, mesh_axes(groups[0], mesh), group, text, size, _short(where[1] if where else "")] += round(runs[name])
    out = [Collective(kind, axes, group, text, count, size, where) for (kind, axes, group, text, size, where), count in found.items()]
    return sorted(out, key=lambda c: -c.sent)


def _short(op_name: str) -> str:
    """forward, backward or again (recomputed), and the last words of an operation's path."""
    phase = "again" if "rematted" in op_name else "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else "update"
    return f"{phase}: {'/'.join(op_name.split('/')[-2:])}"
