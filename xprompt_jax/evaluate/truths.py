"""What the target files of a suite mean, how a model draws that, and what a drawn picture says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image

from xprompt_jax.data import palettes
from xprompt_jax.data.images import open_image
from xprompt_jax.errors import UserError


class Truth(Protocol):
    """What the target files of a suite mean."""

    def read(self, path: Any) -> np.ndarray:
        """The truth in its own units, [h, w] or [h, w, 3]."""

    def picture(self, truth: np.ndarray) -> np.ndarray:
        """How a model draws it, uint8 [h, w, 3]."""

    def decode(self, picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """What a drawn picture says, at (height, width) and in the units of `read`."""


def _resize(picture: np.ndarray, shape: tuple[int, int], how: PIL.Image.Resampling) -> np.ndarray:
    return picture if picture.shape[:2] == shape else np.asarray(PIL.Image.fromarray(picture).resize(shape[::-1], how))


class Colours:
    """Pictures that mean themselves; brought to the target's size by BICUBIC, as Painter does."""

    def read(self, path: Any) -> np.ndarray:
        """uint8 [h, w, 3]."""
        return np.asarray(open_image(path))

    def picture(self, truth: np.ndarray) -> np.ndarray:
        """Itself."""
        return truth

    def decode(self, picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """uint8 [h, w, 3]."""
        return _resize(picture, shape, PIL.Image.Resampling.BICUBIC)


@dataclasses.dataclass(frozen=True)
class Depth:
    """Depth in metres: 16-bit PNG in millimetres (NYUv2 as BTS has it) or .npy in metres; 0 is unknown. Resized in metres, bilinearly."""

    palette: palettes.Palette

    def read(self, path: Any) -> np.ndarray:
        """float32 [h, w] metres."""
        if Path(path).suffix == ".npy":
            try:
                depth = np.load(path, allow_pickle=False)
            except (OSError, ValueError) as e:
                raise UserError(f"{path}: not a readable .npy of depth ({e})") from None
        else:
            depth = raw_numbers(path)
            if depth.dtype == np.uint8:
                raise UserError(f"{path}: a depth map of 8 bits tells no millimetres; give 16-bit PNG in mm, or .npy in metres")
            depth = depth / np.float32(1000)
        if Path(path).suffix == ".npy" and depth.dtype.kind != "f":
            raise UserError(f"{path}: depth of {depth.dtype}, which tells no unit; give .npy of floats in metres, or 16-bit PNG in mm")
        if depth.ndim != 2:
            raise UserError(f"{path}: a depth map must be [h, w], not {list(depth.shape)}; give 16-bit PNG in mm, or .npy in metres")
        return depth.astype(np.float32)

    def picture(self, truth: np.ndarray) -> np.ndarray:
        """In the palette's colours, 0 to 10 m."""
        return self.palette.encode(truth)

    def decode(self, picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """float32 [h, w] metres."""
        return _resize(self.palette.decode(picture), shape, PIL.Image.Resampling.BILINEAR)


@dataclasses.dataclass(frozen=True)
class Labels:
    """Classes: 8-bit PNG, 0 is unlabelled, class i is i + 1 (ADE20K). Resized as colours, by the nearest pixel."""

    palette: palettes.ClassPalette
    norm: int = 2
    """Of the distance to a class's colour: Painter's is 1."""

    def read(self, path: Any) -> np.ndarray:
        """int64 [h, w], -1 where unlabelled."""
        labels = raw_numbers(path)
        if labels.ndim != 2 or labels.max() > len(self.palette.colors):
            raise UserError(f"{path}: not a map of {len(self.palette.colors)} classes (8-bit PNG, 0 unlabelled)")
        return labels.astype(np.int64) - 1

    def picture(self, truth: np.ndarray) -> np.ndarray:
        """In the palette's colours."""
        return self.palette.encode(truth)

    def decode(self, picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """int64 [h, w]."""
        return self.palette.decode(_resize(picture, shape, PIL.Image.Resampling.NEAREST), self.norm)


class Normals:
    """Normals: 8-bit RGB PNG, round((n + 1) / 2 * 255). Resized as colours, bilinearly.

    Unknown is what decodes to no unit vector: black (GeoNet's ground truth), white or middle grey (NYUD-MT's).
    """

    def read(self, path: Any) -> np.ndarray:
        """float32 [h, w, 3]; zero where unknown."""
        rgb = np.asarray(open_image(path))
        length = np.linalg.norm(rgb / 255.0 * 2 - 1, axis=-1, keepdims=True)
        return np.where((length > 0.5) & (length < 1.5), palettes.decode_normals(rgb), np.float32(0))

    def picture(self, truth: np.ndarray) -> np.ndarray:
        """As in GeoNet's files."""
        return np.where(truth.any(axis=-1, keepdims=True), palettes.encode_normals(truth), np.uint8(0))

    def decode(self, picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """float32 [h, w, 3]."""
        return palettes.decode_normals(_resize(picture, shape, PIL.Image.Resampling.BILINEAR))


def raw_numbers(path: Any) -> np.ndarray:
    """A grey or palette PNG's own numbers.

    Raises:
      UserError: there is no such file, or it is no image.
    """
    try:
        with PIL.Image.open(path) as image:
            return np.asarray(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the path") from None
    except Exception:  # decoders meet hostile bytes with nearly any exception
        raise UserError(f"{path}: not a readable image; replace or remove it") from None
