"""`xprompt inspect`: training rows as people read them."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from xprompt_jax.config import Config
from xprompt_jax.errors import UserError


@dataclass
class Inspect:
    """Show the rows that a run trains on: pictures, words, roles and what carries loss, and where each row came from.

    They are read back from the batch that the trainer gets, and decoded by the store's tokenizers. Every setting of the configuration is
    a flag, as for `xprompt train`.

    Examples:
      xprompt inspect --config configs/debug_cpu.py --data.store data/rain
      xprompt inspect --workdir runs/debug --step 100 --bucket in_context --rows 8 --out rows.html
      xprompt inspect --config configs/paper_mixture.py --mixture
    """

    config: Path | None = None
    """A run's configuration, as for `xprompt train`."""
    workdir: Path | None = None
    """A run's folder, in place of --config."""
    step: int = 0
    """Which step's rows, counted from 0."""
    rows: int = 4
    """How many of each bucket, at most."""
    bucket: str = ""
    """Of this bucket alone."""
    split: Literal["train", "eval"] = "train"
    """Training rows, or held-out ones."""
    out: Path | None = None
    """Write a page (HTML, self-contained) instead of to the terminal."""
    mixture: bool = False
    """Instead of rows, show the store's datasets: pairs here, pairs in the paper, and how often each is drawn."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def run(self) -> None:
        """Writes the page, or prints."""
        if (self.config is None) == (self.workdir is None):
            raise UserError("give one of --config FILE and --workdir DIR")
        if self.step < 0 or self.rows < 1:
            raise UserError("--step must not be negative, and --rows at least 1")
        config = self.settings
        if self.mixture:
            from xprompt_jax.data.mixture import report

            print(report(config, split=self.split))
            return
        from xprompt_jax.inspection.show import collect, facts, to_text, write_page

        shown = collect(config, step=self.step, rows=self.rows, bucket=self.bucket, split=self.split)
        about = facts(config, shown, step=self.step, split=self.split)
        if self.out is not None:
            print(f"{write_page(self.out, shown, about)}: {len(shown)} rows")
            return
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(to_text(shown, about, width=shutil.get_terminal_size().columns, colour=colour))
