"""Scores of edited images by pretrained features, as the paper's Table 3 has them (facts: data_eval.md 2.2).

A drawn image, its target and its input are each looked at once, by CLIP and by DINO (`Looks`); a score is a cosine between what was
seen. Every score is of one query, against the target unless its name says otherwise; nan is a score of nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from xprompt_jax.data.images import open_image
from xprompt_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Looks:
    """What is seen of one image."""

    pixels: np.ndarray
    """uint8 [h, w, 3]; of the drawn image and of the target at the same size."""
    clip: np.ndarray
    """float32 [512], unit length."""
    dino: np.ndarray
    """float32 [384], unit length."""
    words: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Kind of caption -> CLIP's feature of the image's own, float32 [512], unit length."""


class Encoders:
    """CLIP and DINO, that look at images.

    Args:
      clip: folder of CLIP ViT-B/32.
      dino: folder or file of DINO ViT-S/16.

    Raises:
      UserError: one is not given, or cannot be read.
    """

    def __init__(self, clip: Path | None, dino: Path | None):
        if clip is None or dino is None:
            missing = "--clip DIR (openai/clip-vit-base-patch32)" if clip is None else "--dino DIR (facebook/dino-vits16, or Meta's .pth)"
            raise UserError(f"{missing} is missing: the weights that score edited images")
        from xprompt_jax.vision.clip import CLIP
        from xprompt_jax.vision.dino import DINO

        self.clip, self.dino = CLIP.load(clip), DINO.load(dino)
        self._known = functools.lru_cache(maxsize=64)(self._open)  # the examples of a query stand side by side

    def look(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Images -> (CLIP's feature, DINO's feature) of each."""
        return list(zip(self.clip.images(images), self.dino.images(images), strict=True))

    def look_at(self, image: Path, captions: Mapping[str, str] | None = None) -> Looks:
        """An image of the data with its captions; the last ones are remembered.

        Raises:
          UserError: the image cannot be read.
        """
        return self._known(image, tuple((captions or {}).items()))

    def _open(self, image: Path, captions: tuple[tuple[str, str], ...]) -> Looks:
        pixels = np.asarray(open_image(image))
        ((clip, dino),) = self.look([pixels])
        words = dict(zip((kind for kind, _ in captions), self.clip([text for _, text in captions]), strict=True))
        return Looks(pixels, clip, dino, words)


@functools.lru_cache(maxsize=1)
def load_encoders(clip: Path | None, dino: Path | None) -> Encoders:
    """`Encoders`, the last ones kept: the runs of a table share them."""
    return Encoders(clip, dino)


def clip_image_target(drawn: Looks, target: Looks, source: Looks) -> float:
    """CLIP-I: cosine of the drawn image and the target."""
    return float(drawn.clip @ target.clip)


def dino_target(drawn: Looks, target: Looks, source: Looks) -> float:
    """Cosine of the drawn image and the target, by DINO's class token."""
    return float(drawn.dino @ target.dino)


def clip_text_local(drawn: Looks, target: Looks, source: Looks) -> float:
    """CLIP-T: cosine of the drawn image and the caption of what was edited."""
    return _cosine(drawn.clip, target.words.get("local"))


def clip_text_global(drawn: Looks, target: Looks, source: Looks) -> float:
    """Cosine of the drawn image and the caption of the whole target."""
    return _cosine(drawn.clip, target.words.get("global"))


def clip_text_oracle(drawn: Looks, target: Looks, source: Looks) -> float:
    """Cosine of the target itself and the caption of what was edited: whatever was drawn."""
    return _cosine(target.clip, target.words.get("local"))


def clip_direction(drawn: Looks, target: Looks, source: Looks) -> float:
    """Cosine of (drawn image - input) and (caption of the whole target - caption of the whole input)."""
    before, after = source.words.get("global"), target.words.get("global")
    return float("nan") if before is None or after is None else _cosine(drawn.clip - source.clip, after - before)


def clip_direction_image(drawn: Looks, target: Looks, source: Looks) -> float:
    """Cosine of (drawn image - input) and (target - input): whether what changed is what should, without words."""
    return _cosine(drawn.clip - source.clip, target.clip - source.clip)


def clip_image_input(drawn: Looks, target: Looks, source: Looks) -> float:
    """Cosine of the drawn image and the input: what was kept of it."""
    return float(drawn.clip @ source.clip)


def l1_unit(drawn: Looks, target: Looks, source: Looks) -> float:
    """Mean absolute difference of RGB in [0, 1]."""
    return float(np.mean(np.abs(_difference(drawn, target))))


def l2_unit(drawn: Looks, target: Looks, source: Looks) -> float:
    """Mean squared difference of RGB in [0, 1] (no root)."""
    return float(np.mean(_difference(drawn, target) ** 2))


def _difference(drawn: Looks, target: Looks) -> np.ndarray:
    return (drawn.pixels.astype(np.float64) - target.pixels) / 255


def _cosine(a: np.ndarray, b: np.ndarray | None) -> float:
    """nan without a direction: a caption that is missing, or an image and a caption that did not change."""
    length = 0.0 if b is None else float(np.linalg.norm(a) * np.linalg.norm(b))
    return float("nan") if b is None or length < 1e-12 else float(a @ b) / length
