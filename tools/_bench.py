"""What benchmarks of several contenders share: each runs in a process of its own, and a result says where it was measured."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """A flag's type: a whole number that is not smaller."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def run_alone(*flags: object) -> dict:
    """What the calling benchmark prints last with these flags, in a process of its own: its JSON, or {"failed": why}."""
    done = subprocess.run([sys.executable, sys.argv[0], *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def save(path: Path, figures: dict) -> None:
    """Writes figures, and where and how they were measured."""
    result = figures | {
        "cpus_allowed": len(os.sched_getaffinity(0)),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("jax", "torch", "transformers")},
        "command": shlex.join(["python", *sys.argv]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


def fastest(call: Callable[[], object], repeats: int) -> float:
    """Seconds of a call that has been compiled before: what else runs on the machine can only add to them."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
