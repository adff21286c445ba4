"""Reads each step's metrics when the next one is already running; writes them; says when a run has broken."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from tqdm import tqdm

from xprompt_jax.config import Config
from xprompt_jax.files import atomic_path
from xprompt_jax.train.metrics import MetricWriter, peak_flops, step_flops


class Diverged(Exception):
    """A step's loss is not finite or has jumped; what came after it is worth nothing.

    Attributes:
      step: the broken step, counted from 1.
    """

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class Watch:
    """Reads each step's metrics when the next one is already running; writes them; stops a run that broke.

    Args:
      step: of the checkpoint that the run goes on from, or 0.
    """

    def __init__(self, config: Config, writer: MetricWriter, workdir: Path, step: int):
        self.config, self.writer = config, writer
        # Beside the checkpoints: a resumed run must find the spikes that the uninterrupted one finds, and no others.
        self._path = workdir / "mean_loss.json"
        self._means: dict[str, float] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.flops, self.peak = step_flops(config), peak_flops()
        self.pending: tuple | None = None
        self.go_back(step)
        self.time, self.steps, self.waited, self.tokens = time.perf_counter(), 0, 0.0, 0.0

    def go_back(self, step: int) -> None:
        """Takes up the running mean that was remembered at a checkpoint."""
        self.mean_loss = self._means.get(str(step))

    def remember(self, step: int) -> None:
        """Notes the running mean before a checkpoint is written; the metrics of its step must have been read."""
        if self.mean_loss is not None:
            self._means = {known: mean for known, mean in self._means.items() if int(known) < step} | {str(step): self.mean_loss}
        if jax.process_index() == 0:
            with atomic_path(self._path) as temporary:
                temporary.write_text(json.dumps(self._means))

    def started(self, step: int, metrics: Mapping[str, jax.Array], waited: float, padding: float) -> None:
        """Takes the metrics of a step that may still be running, how long its batch was waited for, and its padding."""
        self.pending = step, metrics, waited, padding

    def finish_previous(self, bar: tqdm) -> None:
        """Reads and checks the step before, and writes it where it is due.

        Raises:
          Diverged: its loss is not finite or has jumped.
        """
        if self.pending is None:
            return
        step, metrics, waited, padding = self.pending
        self.pending = None
        values = {name: float(v) for name, v in jax.device_get(dict(metrics)).items()}
        self._check(step, values)
        self.steps, self.waited, self.tokens = self.steps + 1, self.waited + waited, self.tokens + values["tokens"]
        bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        if step % self.config.train.log_every and step not in (1, self.config.train.steps):
            return
        now = time.perf_counter()
        seconds = (now - self.time) / self.steps
        values |= {
            "seconds_per_step": seconds,
            "answer_tokens_per_second": self.tokens / (now - self.time),
            "data_wait": self.waited / (now - self.time),
            "padding": padding,
        }
        memory = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
        if "peak_bytes_in_use" in memory:
            values["peak_device_gib"] = memory["peak_bytes_in_use"] / 2**30
        if self.peak:
            values["mfu"] = self.flops / seconds / (self.peak * jax.device_count())
        self.writer.scalars(step, values)
        self.time, self.steps, self.waited, self.tokens = now, 0, 0.0, 0.0

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        loss, factor = values["loss"], self.config.train.spike_factor
        if not math.isfinite(loss) or not math.isfinite(values["grad_norm"]):
            raise Diverged(step, f"step {step}: loss {loss}, gradient norm {values['grad_norm']}")
        if factor and self.mean_loss is not None and loss > factor * self.mean_loss:
            raise Diverged(step, f"step {step}: loss {loss:.3f} is more than {factor} times its running mean {self.mean_loss:.3f}")
        self.mean_loss = loss if self.mean_loss is None else 0.95 * self.mean_loss + 0.05 * loss
