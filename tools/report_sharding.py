"""What one training step moves between devices, and what it keeps on each, for machines that need not be here.

    python tools/report_sharding.py --config configs/chameleon_7b_pod.py --compute.attention xla --devices 256 --json report.json
    python tools/report_sharding.py --config ... --compute.attention xla --mesh.slices 2 --mesh.data 2 --mesh.fsdp 64
    python tools/report_sharding.py --config configs/chameleon_7b_pod.py --topology v5p:4x8x8  # ten minutes; pip install libtpu, no TPU

The step is compiled and its collectives are counted (hlo_collectives.py). With --devices the devices are virtual CPUs, and the program
counted is the one that XLA's partitioner wrote: no backend has touched it, so its types are the recipe's own (the CPU's later passes
widen bfloat16). With --topology it is the TPU compiler's final program. Flags of `xprompt train` that set the configuration work here too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hlo_collectives import collectives


def abstract_batches(config: Any, mesh: Any) -> dict[str, dict[str, Any]]:
    """The batches of a step as shapes, types and shardings."""
    import jax
    from jax.sharding import NamedSharding

    from xprompt_jax.mesh import spec
    from xprompt_jax.prompt import most_targets
    from xprompt_jax.train.step import shapes_of

    shapes, sharding = shapes_of(config), NamedSharding(mesh, spec("batch"))
    targets = {b.name: most_targets(b, shapes[b.name], config.data.loss) for b in config.data.buckets}
    array = lambda *shape, dtype=np.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return {
        b.name: {
            "ids": array(b.rows, shapes[b.name].length), "positions": array(b.rows, shapes[b.name].length),
            "example_lengths": array(b.rows, shapes[b.name].examples),
            "targets": array(b.rows, targets[b.name]), "weights": array(b.rows, targets[b.name], dtype=np.float32),
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
