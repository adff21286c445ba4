"""Image files, opened as a person would expect, and Chameleon's way from picture to pixels and back.

Opening: EXIF rotation is applied, transparency is blended on white, CMYK, palette, grey and 16-bit images become 8-bit
RGB. What is no readable image is refused in one line that names the file. Preprocessing follows one of two recipes,
bit for bit (facts: chameleon.md 2.5):

              transparency on white     long side           levels x to pixels
    meta      float64, truncated        round(side * scale) x / 255 * 2 - 1 in float64, to float32
    hf        integers, rounded         int                 x * 0.0078 in float64, to float32, - 1

Both take the short side to `size` by LANCZOS, then the centre (offset rounded down). Chameleon learnt with Meta's; use
Hugging Face's only to reproduce numbers of transformers: its brightest white is 0.989. It has no way back from pixels;
Meta's clamps and truncates. Beyond Meta's, opening turns by EXIF, keeps the range of 16 bits, and knows RGB files with a
transparent colour.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import PIL.Image
import PIL.ImageOps

from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path

MAX_PIXELS = 89_000_000
"""Larger images are refused before their pixels are decoded: 30000 x 30000 would take 2.7 GB."""

_ROWS = 64
"""Of an image that are computed with at once."""

Recipe = Literal["meta", "hf"]
"""Whose preprocessing: Meta's (the default everywhere), or that of transformers' image processor, PIL backend (its torchvision
backend moves some levels by one)."""

_LEVELS: dict[Recipe, np.ndarray] = {
    "meta": (np.arange(256) / 255.0 * 2.0 - 1.0).astype(np.float32),
    "hf": (np.arange(256) * 0.0078).astype(np.float32) - np.float32(1.0),
}

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"})


def open_image(source: Any, recipe: Recipe = "meta") -> PIL.Image.Image:
    """A path, bytes, PIL image or uint8 array [h, w], [h, w, 3] or [h, w, 4] -> RGB image; `recipe` blends transparency.

    Raises:
      UserError: not an image, damaged, empty, too large, or unreadable; an unknown recipe.
    """
    _check(recipe)
    if isinstance(source, str | os.PathLike):
        name, data = str(source), _read(Path(source))
    elif isinstance(source, bytes | bytearray | memoryview):
        name, data = f"image of {len(source)} bytes", bytes(source)
    elif isinstance(source, PIL.Image.Image):
        return _decode(source, getattr(source, "filename", "") or "image", recipe)
    elif hasattr(source, "__array__"):
        return _to_rgb(_from_array(np.asarray(source)), recipe)
    else:
        raise UserError(f"an image must be a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}")
    if not data:
        raise UserError(f"{name}: empty; replace or remove it")
    # Decoders meet hostile bytes with nearly any exception (struct.error, zlib.error, KeyError, ...).
    try:
        image = PIL.Image.open(io.BytesIO(data))
    except PIL.Image.DecompressionBombError:
        raise UserError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except Exception:
        raise UserError(f"{name}: not an image, or of an unknown format; convert it to PNG or remove it") from None
    return _decode(image, name, recipe)


def _check(recipe: str) -> None:
    if recipe not in get_args(Recipe):
        raise UserError(f"image recipe {recipe!r} is unknown; use {' or '.join(get_args(Recipe))}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the path") from None
    except OSError as e:
        raise UserError(f"{path}: cannot read: {e.strerror}; give an image file that you may read") from None
    except ValueError as e:  # a zero byte in the name
        raise UserError(f"{str(path)!r}: {e}; correct the path") from None


def _from_array(array: np.ndarray) -> PIL.Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise UserError(f"an image array must be uint8 [height, width, 3], not {array.dtype} {list(array.shape)}")
    return PIL.Image.fromarray(array)


def _decode(image: PIL.Image.Image, name: str, recipe: Recipe) -> PIL.Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{name}: {image.width} x {image.height} is more than {MAX_PIXELS:,} pixels; make it smaller")
    try:
        image.load()
        return _to_rgb(image, recipe)
    except Exception as e:
        raise UserError(f"{name}: damaged or cut short ({e}); replace or remove it") from None


def _to_rgb(image: PIL.Image.Image, recipe: Recipe) -> PIL.Image.Image:
    with contextlib.suppress(Exception):  # unreadable EXIF says nothing about the pixels
        image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits per pixel, in 16 or 32
        return _by_strips(image, lambda levels: (levels / 257.0).clip(0, 255))
    if image.mode == "F":
        return PIL.Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if recipe == "hf":
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return _by_strips(image if image.mode == "RGBA" else image.convert("RGBA"), _on_white)


def _on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255.0
    return rgba[..., :3] * alpha + 255.0 * (1.0 - alpha)


def _by_strips(image: PIL.Image.Image, levels_of: Callable[[np.ndarray], np.ndarray]) -> PIL.Image.Image:
    """An image of 8 bits from levels in float64, some rows at a time: whole, they would take ten times the memory of the pixels."""
    made = PIL.Image.new("RGB", image.size)
    for top in range(0, image.height, _ROWS):
        strip = np.asarray(image.crop((0, top, image.width, min(top + _ROWS, image.height)))).astype(np.float64)
        made.paste(PIL.Image.fromarray(levels_of(strip).astype(np.uint8)), (0, top))
    return made


def resize_center_crop(image: PIL.Image.Image, size: int, recipe: Recipe = "meta", *, exact: bool = False) -> np.ndarray:
    """uint8 [size, size, 3]: short side to `size` (LANCZOS, long side as `recipe` has it), then the centre (offset rounded down).

    With `exact`, the nearest pixel is taken instead: colours that stand for numbers are not mixed.

    Raises:
      UserError: the image is so narrow that its long side would become enormous; an unknown recipe.
    """
    _check(recipe)
    short = min(image.size)
    width, height = (round(side * (size / short)) if recipe == "meta" else int(size * side / short) for side in image.size)
    if width * height > MAX_PIXELS:
        raise UserError(f"an image of {image.width} x {image.height} is too narrow to be {size} pixels wide; crop it")
    resized = image.resize((width, height), PIL.Image.Resampling.NEAREST if exact else PIL.Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def to_pixels(image: np.ndarray, recipe: Recipe = "meta") -> np.ndarray:
    """uint8 -> float32 in [-1, 1].

    Raises:
      UserError: an unknown recipe.
    """
    _check(recipe)
    return _LEVELS[recipe][image]


def preprocess(image: PIL.Image.Image, size: int, recipe: Recipe = "meta") -> np.ndarray:
    """float32 [size, size, 3] in [-1, 1], Chameleon's input; raises like `resize_center_crop`."""
    return to_pixels(resize_center_crop(image, size, recipe), recipe)


def postprocess(pixels: np.ndarray) -> np.ndarray:
    """float [..., 3] about [-1, 1] -> uint8: clamp, scale, truncate, in Meta's order and float32 (trap 13)."""
    return ((np.clip(np.asarray(pixels, np.float32), -1.0, 1.0) + 1.0) / 2.0 * 255.0).astype(np.uint8)


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """All image files below a folder, by extension, sorted by path; links are followed, what is hidden is left out.

    Raises:
      UserError: no such folder, unreadable, or no image in it.
    """
    folder = Path(folder)

    def fail(error: OSError):
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UserError(f"{folder}: no such folder; give a folder of images") from None
        raise UserError(f"{error.filename}: cannot read the folder: {error.strerror}; change its permissions") from None

    found = [
        Path(root) / name for root, names in walk(folder, fail, twice=False) for name in names
        if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")
    ]  # fmt: skip
    if not found:
        raise UserError(f"{folder}: no image files ({', '.join(sorted(EXTENSIONS))}) in it; give another folder")
    return sorted(found)


def walk(folder: str | os.PathLike[str], fail: Callable[[OSError], None], *, twice: bool = True) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of a folder and all below it but hidden ones; links are followed unless they lead back.

    Args:
      fail: told of folders that cannot be read.
      twice: whether links are followed that lead to another place in the folder itself, whose files then come again.
    """
    above: dict[str, frozenset[str]] = {}
    top = os.path.realpath(folder)
    for root, folders, names in os.walk(os.fspath(folder), onerror=fail, followlinks=True):
        around, here = above.pop(root, frozenset()), os.path.realpath(root)
        if here in around or (not twice and os.path.islink(root) and os.path.commonpath([here, top]) == top != here):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        above |= {os.path.join(root, name): around | {here} for name in folders}
        yield root, names


def save_png(image: PIL.Image.Image | np.ndarray, path: str | os.PathLike) -> None:
    """Writes a PNG, whole or not at all; an array is uint8 [h, w] or [h, w, 3].

    Raises:
      UserError: the place cannot be written.
    """
    with atomic_path(path) as temporary:
        (image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)).save(temporary, "PNG")
