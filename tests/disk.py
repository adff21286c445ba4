"""A disk that really is full: a small file system in a mount namespace of its own."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def on_a_small_disk(size: str, script: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python script that finds an empty file system of `size` at /mnt."""
    inner = f'mount -t tmpfs -o size={size} none /mnt && exec "$PYTHON" -c "$SCRIPT"'
    return subprocess.run(
        ["unshare", "-Urm", "sh", "-c", inner], capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={"PYTHON": sys.executable, "SCRIPT": textwrap.dedent(script), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def needs_a_small_disk() -> None:
    """Skips the test where a user may not have a mount namespace (some containers)."""
    if not _works():
        pytest.skip("this machine lets nobody mount a file system of his own")


@functools.cache
def _works() -> bool:
    return shutil.which("unshare") is not None and on_a_small_disk("1m", "print('mounted')").stdout == "mounted\n"
