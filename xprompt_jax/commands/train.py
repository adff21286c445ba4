"""`xprompt train`, whose flags are the whole configuration."""

from __future__ import annotations

import itertools
import re
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from xprompt_jax.config import Config, load_json
from xprompt_jax.errors import UserError


@dataclass
class Train:
    """Train from one configuration; the same command resumes, and --workdir alone does too.

    Every setting of the configuration is a flag; flags override the file.

    Examples:
      xprompt train --config configs/debug_cpu.py --workdir runs/debug
      xprompt train --config configs/chameleon_7b_pod.py --workdir /shared/runs/7b --mesh.fsdp 128 --optim.learning-rate 5e-5
      xprompt train --workdir runs/debug
    """

    workdir: Path
    """Folder of the run: config, checkpoints, metrics, and the model at the end."""
    config: Path | None = None
    """A Python file that defines `config = Config(...)`, or a JSON file; without it, WORKDIR/config.json."""
    distributed: str = "auto"
    """How processes find each other: auto (SLURM, Open MPI, TPU pods), off, or address:port,count,index."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def run(self) -> None:
        """Trains."""
        if re.match(r"\w+:/", str(self.workdir)):  # Path has made one slash of two
            raise UserError(f"--workdir {self.workdir}: not a folder; mount the bucket on all hosts and give the path there")
        from xprompt_jax.mesh import log_devices, start_distributed

        start_distributed(self.distributed)
        log_devices()
        from xprompt_jax.runner import run_training

        if run_training(self.settings, self.workdir) is not None:
            print(f"{self.workdir / 'model'}: the trained model")


@dataclass
class Export:
    """Write a checkpoint of a run as a model folder; the run may still be going on.

    A finished run has its model in WORKDIR/model already.

    Example: xprompt export --workdir runs/debug --out models/debug-500 --step 500
    """

    workdir: Path
    """Folder of the run."""
    out: Path
    """Folder to write; must not exist."""
    step: int | None = None
    """Which checkpoint; without it, the newest."""

    def run(self) -> None:
        """Writes the folder."""
        if self.out.exists():
            raise UserError(f"--out {self.out}: exists already; choose another folder")
        from xprompt_jax.runner import export_checkpoint

        step = export_checkpoint(self.workdir, self.out, step=self.step)
        print(f"{self.out}: step {step} of {self.workdir}")


def load_config(path: Path) -> Config:
    """A configuration from a Python file (`config = Config(...)`) or a JSON file.

    Raises:
      UserError: the file is missing, does not run, or defines no configuration.
    """
    if path.suffix == ".json" or not path.is_file():
        return load_json(Config, path)
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError:
        raise
    except Exception as e:  # whatever a person's file raises: an unknown key is a TypeError
        raise UserError(f"{path}: {type(e).__name__}: {e}") from None
    if not isinstance(config, Config):
        raise UserError(f"{path}: defines no `config = Config(...)`")
    return config


def settings_of(arguments: Sequence[str]) -> Config:
    """What the flags of `train` and `inspect` override: the configuration that --config names, else that of the run in --workdir.

    Raises:
      UserError: it cannot be read, or there is none.
    """
    split = [part for flag in arguments for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    given = dict(itertools.pairwise(split))
    if "--config" in given:
        return load_config(Path(given["--config"]))
    if "--workdir" in given and (Path(given["--workdir"]) / "config.json").exists():
        return load_json(Config, Path(given["--workdir"]) / "config.json")
    if {"-h", "--help"} & set(arguments) or "--workdir" not in given:
        return Config()
    raise UserError(f"--workdir {given['--workdir']}: no run there yet; start one with --config FILE")
