"""Suites that look at edited pictures through CLIP and DINO instead of comparing pixels; their metrics, and what they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.data import sources
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate import features
from xprompt_jax.evaluate.features import Encoders, Looks, load_encoders
from xprompt_jax.evaluate.measures import Metric, Sums, counted
from xprompt_jax.evaluate.suites import Suite


@dataclasses.dataclass(frozen=True)
class Edit(sources.Record):
    """An edit with captions of both pictures: kind ("local", "global") -> words."""

    captions_before: Mapping[str, str] = dataclasses.field(default_factory=dict)
    captions_after: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EditSuite(Suite):
    """A suite whose metrics compare `Looks` in place of pixels."""

    encoders: Encoders | None = None

    def with_encoders(self, clip: Path | None, dino: Path | None) -> EditSuite:
        """The suite, ready to score; its metrics name the weights that they use.

        Raises:
          UserError: one is not given, or cannot be read.
        """
        encoders = load_encoders(clip, dino)
        told = f"; weights {encoders.clip.name}, {encoders.dino.name}"
        return dataclasses.replace(
            self, encoders=encoders, metrics=tuple(dataclasses.replace(m, protocol=m.protocol + told) for m in self.metrics)
        )

    def score(self, record: sources.Record, images: Mapping[str, np.ndarray], size: int) -> dict[str, dict[str, Sums]]:
        """Metric -> arm -> sums of one query.

        Drawn pictures are compared at the target's size. Features of a square target are taken from the square that was drawn.

        Raises:
          UserError: the suite has no encoders, or an image cannot be read.
        """
        if self.encoders is None:
            raise UserError(f"suite {self.name} needs --clip and --dino")
        before, after = (record.captions_before, record.captions_after) if isinstance(record, Edit) else ({}, {})
        source, target = self.encoders.look_at(record.input, before), self.encoders.look_at(record.output, after)
        height, width = target.pixels.shape[:2]
        pixels = {arm: self.truth.decode(image, (height, width)) for arm, image in images.items()}
        seen = self.encoders.look(list((images if height == width else pixels).values()))
        drawn = {arm: Looks(pixels[arm], *look) for arm, look in zip(images, seen, strict=True)}
        return {m.name: {arm: m.measure(looks, target, source) for arm, looks in drawn.items()} for m in self.metrics}


def _metric(score: Callable[[Looks, Looks, Looks], float], protocol: str, column: str = "", better: Any = "higher") -> Metric:
    return Metric(score.__name__, protocol, "", lambda drawn, target, source: counted(score(drawn, target, source)), better, column)


_B32 = "CLIP ViT-B/32, its own preprocessing"
_DINO = "DINO ViT-S/16, short side 256 bicubic, centre 224"
DIRECTION = _metric(features.clip_direction, f"cosine of image - input and of global caption - the input's: {_B32}", "CLIP_dir")
TEXT_LOCAL = _metric(features.clip_text_local, f"cosine of image and local caption, MagicBrush's CLIP-T: {_B32}", "CLIP_out")
TEXT_GLOBAL = _metric(features.clip_text_global, f"cosine of image and global caption: {_B32}")
IMAGE = _metric(features.clip_image_target, f"cosine of image and target, not input, MagicBrush's CLIP-I: {_B32}", "CLIP_img")
DINO = _metric(features.dino_target, f"cosine of image and target: {_DINO}", "DINO")
IMAGE_DIRECTION = _metric(
    features.clip_direction_image, f"cosine of image - input and of target - input; needs no words: {_B32}"
)  # fmt: skip
KEPT = _metric(features.clip_image_input, f"cosine of image and input: what was kept of it: {_B32}")
L1 = _metric(features.l1_unit, "mean absolute difference of RGB in [0, 1], at the target's size", better="lower")
L2 = _metric(features.l2_unit, "mean squared difference of RGB in [0, 1], at the target's size", better="lower")


def oracle(expected: str) -> Metric:
    """CLIP-T of the target itself.

    Args:
      expected: what it is over the whole test set with the right weights.
    """
    protocol = f"cosine of the target itself and its local caption; {expected} over the whole test set, or weights, captions or "
    return _metric(features.clip_text_oracle, f"{protocol}preprocessing differ: {_B32}")
