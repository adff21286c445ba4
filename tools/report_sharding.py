"""What one training step moves between devices, and what it keeps on each, for machines that need not be here.

    python tools/report_sharding.py --config configs/chameleon_7b_pod.py --compute.attention xla --devices 256 --json report.json
    python tools/report_sharding.py --config ... --compute.attention xla --mesh.slices 2 --mesh.data 2 --mesh.fsdp 64
    python tools/report_sharding.py --config configs/chameleon_7b_pod.py --topology v5p:4x8x8  # ten minutes; pip install libtpu, no TPU

The step is compiled, and every collective counted as often as its loops run (layers, microbatches, slices of the head). With --devices the
devices are virtual CPUs, and the program counted is the one that XLA's partitioner wrote: no backend has touched it, so its types
are the recipe's own (the CPU's later passes widen bfloat16). Two things that GPU and TPU compilers do with it are taken as done: an
all-reduce of which each device keeps its slice alone is a reduce-scatter, and all-reduces that are only added up are one. With
--topology it is the TPU compiler's final program. All flags of `xprompt train` that set the configuration work here too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def abstract_batches(config: Any, mesh: Any) -> dict[str, dict[str, Any]]:
    """The batches of a step as shapes, types and shardings."""
    import jax
    from jax.sharding import NamedSharding

    from xprompt_jax.mesh import spec
    from xprompt_jax.train.step import shapes_of

    shapes, sharding = shapes_of(config), NamedSharding(mesh, spec("batch"))
    array = lambda *shape, dtype=np.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return {
        b.name: {
            "ids": array(b.rows, shapes[b.name].length), "positions": array(b.rows, shapes[b.name].length),
            "example_lengths": array(b.rows, shapes[b.name].examples),
            "targets": array(b.rows, b.answer), "weights": array(b.rows, b.answer, dtype=np.float32),
        }
        for b in config.data.buckets
    }  # fmt: skip


def lowered_step(config: Any, mesh: Any, platform: str) -> tuple[Any, Any]:
    """(the abstract state, the step lowered for a platform). The mesh may be abstract: no device is needed."""
    import jax

    from xprompt_jax.train.optim import make_optimizer
    from xprompt_jax.train.state import abstract_state
    from xprompt_jax.train.step import make_train_step

    optimizer = make_optimizer(config.optim, config.train.steps)
    state = abstract_state(config, optimizer, mesh)
    step = make_train_step(config, optimizer, jax.tree.map(lambda a: a.sharding, state))
    under = jax.sharding.use_abstract_mesh if isinstance(mesh, jax.sharding.AbstractMesh) else jax.set_mesh
    with under(mesh):
        return state, step.trace(state, abstract_batches(config, mesh)).lower(lowering_platforms=(platform,))


def whole_leaves(state: Any) -> dict[str, int]:
    """Bytes of every array of a state that stands whole on every device."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(p): a.size * a.dtype.itemsize for p, a in leaves if a.ndim and a.sharding.is_fully_replicated}


def compile_step(config: Any, mesh: Any, platform: str) -> tuple[Any, Any, str]:
    """(the abstract state, the compiled step, the HLO to count in)."""
    state, lowered = lowered_step(config, mesh, platform)
    if platform != "cpu":
        compiled = lowered.compile()
        return state, compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        # Level 0 asks LLVM for no optimisation: the program is never run.
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning", "xla_backend_optimization_level": 0}
        compiled = lowered.compile(compiler_options=options)
        partitioned = list(Path(folder).glob("*after_spmd-partitioning*.txt"))  # none for one device
        return state, compiled, partitioned[0].read_text() if partitioned else ""


def describe(config: Any, mesh: Any, platform: str) -> dict[str, Any]:
    """Everything the report says, as JSON."""
    import jax

    from xprompt_jax.train.metrics import step_flops

    start = time.perf_counter()
    state, compiled, hlo = compile_step(config, mesh, platform)
    memory, size = compiled.memory_analysis(), lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    return {
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "device_kind": mesh.devices.flat[0].device_kind,
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "compile_seconds": round(time.perf_counter() - start, 1),
        "flops_per_device": step_flops(config) / mesh.size,
        "state_bytes": size(state),
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "output_not_reused": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        },
        "whole_on_every_device": whole_leaves(state),
        "collectives": [dataclasses.asdict(c) | {"sent": c.sent} for c in collectives(hlo, dict(mesh.shape))],
    }


def table(report: Mapping[str, Any], least: float = 0.001) -> Iterator[str]:
    """The report as lines of text; collectives below a share of `least` are summed up in one."""
    gib = 2**30
    memory = report["memory"]
    yield f"{report['devices']} x {report['device_kind']}, mesh {report['mesh']}, compiled in {report['compile_seconds']} s"
    yield (f"on a device: {memory['arguments'] / gib:.2f} GiB state and batch + {memory['temporary'] / gib:.2f} GiB temporary; "
           f"{report['flops_per_device'] / 1e12:.1f} TFLOP a step")  # fmt: skip
    whole = sum(report["whole_on_every_device"].values())
    yield (f"whole on every device: {len(report['whole_on_every_device'])} arrays, {whole / 2**20:.2f} MiB of "
           f"{report['state_bytes'] / gib:.1f} GiB of state")  # fmt: skip
    total = sum(c["sent"] for c in report["collectives"])
    rows = [("kind", "axes", "devices", "count", "MiB sent", "whole", "asked for by")]
    for c in report["collectives"]:
        if c["sent"] >= least * total:
            rows.append((c["kind"], c["axes"], str(c["group"]), str(c["count"]), f"{c['sent'] / 2**20:,.0f}", c["type"], c["where"]))
    rest = [c for c in report["collectives"] if c["sent"] < least * total]
    rows.append(("others", "", "", str(sum(c["count"] for c in rest)), f"{sum(c['sent'] for c in rest) / 2**20:,.0f}", "", ""))
    by_axes: dict[str, int] = defaultdict(int)
    for c in report["collectives"]:
        by_axes[c["axes"]] += c["sent"]
    widths = [max(len(r[i]) for r in rows) for i in range(7)]
    yield from ("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows)
    yield (
        "sent by a device: " + ", ".join(f"{axes} {sent / gib:.2f} GiB" for axes, sent in by_axes.items()) + f"; all {total / gib:.2f} GiB"
    )


def main() -> None:
    """Reads the flags, compiles, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a Python or JSON file, as for `xprompt train`")
    parser.add_argument("--devices", type=int, help="virtual CPU devices (256), or how many of the topology's (all)")
    parser.add_argument("--topology", help="a TPU instead, e.g. v5p:4x8x8 or v6e:16x16 (chips); needs libtpu")
    parser.add_argument("--json", type=Path, help="also write the report here")
    arguments, settings = parser.parse_known_args()

    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would ask a metadata server that is not there
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices or 256}"
    import jax
    import tyro
    from jax.experimental import topologies

    from xprompt_jax.commands.train import load_config
    from xprompt_jax.config import Config
    from xprompt_jax.errors import UserError
    from xprompt_jax.mesh import make_mesh

    logging.getLogger("jax").setLevel(logging.ERROR)
    try:
        config = tyro.cli(Config, default=load_config(arguments.config), args=settings)
        if arguments.topology:
            try:
                devices = topologies.get_topology_desc(arguments.topology, platform="tpu").devices[: arguments.devices]
            except Exception as e:
                raise UserError(f"--topology {arguments.topology}: {str(e).splitlines()[0]}; is libtpu installed?") from None
        else:
            devices = jax.devices()
        report = {"config": str(arguments.config), "settings": settings, "topology": arguments.topology}
        report |= describe(config, make_mesh(config.mesh, devices), "tpu" if arguments.topology else "cpu")
    except UserError as e:
        sys.exit(f"error: {e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report)))


if __name__ == "__main__":
    main()
