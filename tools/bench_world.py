"""Measures how many scenes a second the procedural world renders; one JSON result per device kind.

    python tools/bench_world.py --size 64 --batch 64 --seconds 5

Counts whole renders (picture, depth, normals, labels) that stay on the device. Compilation is timed apart.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import jax
import jaxlib

from xprompt_jax.data import world


def main() -> None:
    """Parses the flags, measures, writes benchmarks/results/world_<device>.json and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="pixels along one side")
    parser.add_argument("--batch", type=int, default=64, help="scenes per call")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the result")
    args = parser.parse_args()

    device = jax.devices()[0]
    scenes = jax.block_until_ready(world.sample_scenes(jax.random.key(0), args.batch))
    start = time.perf_counter()
    jax.block_until_ready(world.render_batch(scenes, args.size))
    first = time.perf_counter() - start

    times = []
    while sum(times) < args.seconds:
        start, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(world.render_batch(scenes, args.size))
        times.append(time.perf_counter() - start)
        last_cpu = time.process_time() - cpu
    result = {
        "benchmark": "world",
        "size": args.size,
        "batch": args.batch,
        "scenes_per_second": round(args.batch * len(times) / sum(times), 1),
        "scenes_per_second_best_call": round(args.batch / min(times), 1),
        "host_cpu_seconds_per_call": round(last_cpu, 4),
        "first_call_seconds": round(first, 2),
        "calls": len(times),
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        "command": shlex.join(["python", *sys.argv]),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"world_{device.device_kind.lower().replace(' ', '_')}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{path}: {json.dumps(result)}")


if __name__ == "__main__":
    main()
