"""`xprompt demo`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from xprompt_jax.errors import UserError


@dataclass
class Demo:
    """Show the model that ships with the package examples of tasks it was never trained on: under a minute, no downloads, no GPU.

    Opens nothing and uploads nothing; the result is WORKDIR/index.html, WORKDIR/demo.png and compiled prompts in WORKDIR/prompts. With
    --train, a smaller model is trained from nothing instead, in some minutes, and kept in WORKDIR/model.

    Examples:
      xprompt demo
      xprompt sample --model mini --task demo/prompts/sepia.xprompt --inputs demo/inputs --out drawn
      xprompt demo --train --photos ~/Pictures
    """

    workdir: Path = Path("demo")
    """Folder for everything the demo makes."""
    photos: Path | None = None
    """A folder of photographs to use beside rendered scenes; for --train, the free ones inside scikit-image where there is none."""
    seed: int = 0
    """Another seed makes other scenes and other images."""
    train: bool = False
    """Train a model from nothing: photographs and scenes, tokenizers, tokens, training on a mesh, drawing."""
    quick: bool = False
    """With --train: a run of about a minute that shows that everything works, not how well."""
    devices: int | None = None
    """With --train: virtual devices to split a CPU into, so that training runs on a real mesh; 2 without the flag."""

    def run(self) -> None:
        """Runs the demo."""
        if self.devices is not None and self.devices < 1:
            raise UserError("--devices must be at least 1")
        if self.devices and not self.train:
            raise UserError("--devices belongs to --train; the demo without it trains nothing")
        if self.quick and not self.train:
            raise UserError("--quick belongs to --train; without it the demo is quick")
        from xprompt_jax.sample.arguments import seed_of

        seed_of(self.seed, "--seed")
        if self.workdir.exists() and not self.workdir.is_dir():
            raise UserError(f"--workdir {self.workdir}: a file; give a folder")
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)  # before the work
        except OSError as e:
            raise UserError(f"--workdir {self.workdir}: cannot make the folder: {e.strerror}; give another one") from None
        if not self.train:
            from xprompt_jax.demo.shipped import run_demo

            page = run_demo(self.workdir, photos=self.photos, seed=self.seed)
        else:
            flags = os.environ.get("XLA_FLAGS", "")
            if "device_count" not in flags:
                os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={self.devices or 2}"
            from xprompt_jax.demo.training import train_demo

            page = train_demo(self.workdir, quick=self.quick, photos=self.photos, seed=self.seed)
        print(f"open {page}")
