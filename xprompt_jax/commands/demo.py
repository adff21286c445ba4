"""`xprompt demo`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from xprompt_jax.errors import UserError


@dataclass
class Demo:
    """Train a small X-Prompt model from nothing and draw with it: a few minutes, no downloads, no GPU.

    Opens nothing and uploads nothing; the result is WORKDIR/index.html, WORKDIR/demo.png and a model in WORKDIR/model.

    Example: xprompt demo --photos ~/Pictures
    """

    workdir: Path = Path("demo")
    """Folder for everything the demo makes."""
    photos: Path | None = None
    """A folder of photographs to train on as well; without it, the free ones inside scikit-image are used."""
    seed: int = 0
    """Another seed makes other scenes, another training and other images."""
    quick: bool = False
    """A run of about a minute that shows that everything works, not how well."""
    devices: int = 2
    """Virtual devices to split a CPU into, so that training runs on a real mesh."""

    def run(self) -> None:
        """Runs the demo."""
        if self.devices < 1:
            raise UserError("--devices must be at least 1")
        flags = os.environ.get("XLA_FLAGS", "")
        if "device_count" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={self.devices}"
        from xprompt_jax.demo import run_demo

        page = run_demo(self.workdir, quick=self.quick, photos=self.photos, seed=self.seed)
        print(f"open {page}")
