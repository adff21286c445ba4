"""Where numbers of a run go (JSONL, TensorBoard, wandb, the terminal), and how much arithmetic a step really is."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xprompt_jax.config import Config, ModelConfig, OptimConfig
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path
from xprompt_jax.prompt import SlotShape, most_targets

log = logging.getLogger(__name__)

# Dense bf16 peak of one device in FLOP/s, by a part of jax's device_kind (vendors' data sheets; facts: frameworks.md 3.9).
PEAK_FLOPS = {
    "H100": 989e12, "H200": 989e12, "A100": 312e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12,
    "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6": 918e12,
}  # fmt: skip


def peak_flops() -> float | None:
    """Peak of this machine's device; None where it is unknown (a CPU)."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def attention_pairs(shape: SlotShape) -> float:
    """(query, key) pairs that the XP mask lets through in a full row; a plain causal row of L has L^2 / 2."""
    context, xp, examples = 1 + shape.context, shape.xp, shape.examples
    example = context**2 / 2 + xp * (context + xp / 2)
    return examples * example + (1 + examples * xp + shape.todo) ** 2 / 2


def row_flops(model: ModelConfig, shape: SlotShape, answers: int, optim: OptimConfig | None = None) -> float:
    """Floating-point operations of one training row, forward and backward, without recomputation.

    A matrix product costs 2 per parameter and token in the forward pass, 2 for the gradient of what goes in and 2 for that of its weights;
    attention 4 H K per pair, and 8 in the backward pass. The head sees the answer tokens alone. What `optim` freezes has no gradient
    of weights, and adapters of rank r are two matrices more; where nothing is trained below the head, there is no backward pass through
    the blocks.
    """
    optim = optim or OptimConfig()
    backward = optim.trainable != "image_head" and not (optim.trainable == "xp" and not shape.xp)
    matrices = dict.fromkeys(("wq", "wo"), model.num_heads * model.head_dim) | dict.fromkeys(
        ("wk", "wv"), model.num_kv_heads * model.head_dim
    )
    matrices |= dict.fromkeys(("gate", "up", "down"), model.ffn_dim)
    adapters = sum(6 * optim.lora_rank * (model.dim + matrices[name]) for name in optim.lora_targets) if optim.trainable == "lora" else 0
    layer = sum(2 * (1 + backward + (optim.trainable == "all")) * model.dim * width for width in matrices.values()) + adapters
    head = 2 * (1 + backward + (optim.trainable in ("all", "image_head"))) * model.dim * model.vocab_size
    attention = (12 if backward else 4) * model.num_heads * model.head_dim
    return model.num_layers * (layer * shape.length + attention * attention_pairs(shape)) + head * answers


def step_flops(config: Config) -> float:
    """Floating-point operations of one step over all devices."""
    shapes = {b.name: SlotShape.of(b, config.model.num_xp_tokens, config.data.mode) for b in config.data.buckets}
    answers = {b.name: most_targets(b, shapes[b.name], config.data.loss) for b in config.data.buckets}
    return sum(b.rows * row_flops(config.model, shapes[b.name], answers[b.name], config.optim) for b in config.data.buckets)


def padding_fraction(batch: Mapping[str, Mapping[str, np.ndarray]]) -> float:
    """Fraction of the slots of all buckets that hold nothing. Positions are 0 on padding and on the SINK alone."""
    rows = [part["positions"] for part in batch.values()]
    filled = sum(np.count_nonzero(p) + len(p) for p in rows)
    return 1.0 - filled / sum(p.size for p in rows)


class MetricWriter:
    """Writes scalars and pictures of a run into its folder; only the first process does.

    metrics.jsonl holds one object per line; on resuming, lines of steps that will be done again are dropped.
    """

    def __init__(self, workdir: Path, *, resume_step: int, wandb_project: str | None = None, run_config: Mapping[str, Any] | None = None):
        self._on = jax.process_index() == 0
        self._wandb: Any = None
        if not self._on:
            return
        self._path = workdir / "metrics.jsonl"
        self._keep(resume_step)
        import tensorboardX  # takes more than a second where torch is installed

        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise UserError("train.wandb_project is set, but wandb is not installed: pip install 'xprompt-jax[wandb]'") from None
            self._wandb = wandb.init(project=wandb_project, dir=str(workdir), config=dict(run_config or {}), resume="allow")

    def go_back(self, step: int) -> None:
        """Forgets the lines after `step`, which will be done again."""
        if self._on:
            self._jsonl.close()
            self._keep(step)

    def _keep(self, step: int) -> None:
        kept = [line for line in read_metrics(self._path.parent) if line["step"] <= step] if self._path.exists() else []
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._jsonl = self._path.open("a")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one point of every curve."""
        if not self._on:
            return
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def image(self, step: int, name: str, picture: Any) -> None:
        """A uint8 [h, w, 3] picture in TensorBoard."""
        if self._on:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes everything."""
        if self._on:
            self._jsonl.close()
            self._board.close()
            if self._wandb:
                self._wandb.finish()


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; a line that a killed process left half-written is passed over."""
    found = []
    for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found
