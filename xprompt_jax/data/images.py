"""Image files, opened as a person would expect, and Chameleon's way from picture to pixels and back.

Opening: EXIF rotation is applied, transparency is blended on white, CMYK, palette, grey and 16-bit images become 8-bit
RGB. What is no readable image is refused in one line that names the file. Preprocessing is Meta's recipe (facts:
chameleon.md 2.5): short side to `size` by LANCZOS with rounded sides, centre crop, [-1, 1]; back again by truncation.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path

MAX_PIXELS = 100_000_000
"""Larger images are refused before their pixels are read: 30000 x 30000 would take 2.7 GB."""

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"})


def open_image(source: Any) -> PIL.Image.Image:
    """A path, bytes, PIL image or uint8 array [h, w, 3] (or [h, w]) -> RGB image.

    Raises:
      UserError: not an image, damaged, empty, too large, or unreadable.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (3, 4)) or not source.size:
            raise UserError(f"an image array must be uint8 [height, width, 3], not {source.dtype} {list(source.shape)}")
        return _to_rgb(PIL.Image.fromarray(source))
    if isinstance(source, PIL.Image.Image):
        return _to_rgb(source)
    name = str(source) if isinstance(source, str | os.PathLike) else "image"
    try:
        data = bytes(source) if isinstance(source, bytes | bytearray | memoryview) else Path(source).read_bytes()
    except OSError as e:
        raise UserError(f"{name}: cannot read: {e.strerror}") from None
    if not data:
        raise UserError(f"{name}: the file is empty; replace or remove it")
    try:
        image = PIL.Image.open(io.BytesIO(data))
    except (PIL.UnidentifiedImageError, PIL.Image.DecompressionBombError, OSError, ValueError, SyntaxError) as e:
        if isinstance(e, PIL.Image.DecompressionBombError):
            raise UserError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller") from None
        raise UserError(f"{name}: not an image file that can be read; replace or remove it") from None
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{name}: {image.width} x {image.height} is more than {MAX_PIXELS:,} pixels; make it smaller")
    try:
        image.load()
        return _to_rgb(image)
    except (OSError, ValueError, SyntaxError, EOFError) as e:
        raise UserError(f"{name}: the image is damaged or cut short ({e}); replace or remove it") from None


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 or 32 bits per pixel; 16-bit files may open as either
        values = np.asarray(image).astype(np.float64)
        return PIL.Image.fromarray((values / 257.0).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return PIL.Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "L", "1") and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255.0
    return PIL.Image.fromarray((rgba[..., :3] * alpha + 255.0 * (1.0 - alpha)).astype(np.uint8))


def resize_center_crop(image: PIL.Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: short side to `size` (LANCZOS, rounded sides), then the centre."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    resized = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def to_pixels(image: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return image.astype(np.float32) / 255.0 * 2.0 - 1.0


def preprocess(image: PIL.Image.Image, size: int) -> np.ndarray:
    """float32 [size, size, 3] in [-1, 1], Chameleon's input."""
    return to_pixels(resize_center_crop(image, size))


def postprocess(pixels: np.ndarray) -> np.ndarray:
    """float [..., 3] about [-1, 1] -> uint8: clamp, scale, truncate (trap 13)."""
    return ((np.clip(np.asarray(pixels, np.float32), -1.0, 1.0) + 1.0) / 2.0 * 255.0).astype(np.uint8)


def list_images(folder: str | os.PathLike) -> list[Path]:
    """All image files below a folder, by extension, sorted by path.

    Raises:
      UserError: no such folder, unreadable, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")

    def fail(error: OSError):
        raise UserError(f"{error.filename}: cannot read the folder: {error.strerror}; change its permissions") from None

    found = [
        Path(root) / name for root, _, names in os.walk(folder, onerror=fail) for name in names
        if Path(name).suffix.lower() in EXTENSIONS
    ]  # fmt: skip
    if not found:
        raise UserError(f"{folder}: no image files ({', '.join(sorted(EXTENSIONS))}) in it")
    return sorted(found)


def save_png(image: Any, path: str | os.PathLike) -> None:
    """Writes a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        (image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)).save(temporary, "PNG")
