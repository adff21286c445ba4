"""Further crops of an image beside its centre, at the same place in all images of a pair.

+------------------+        a window is (side, x, y): its side as a fraction of the image's short side, its place as
|    +------+      |        a fraction of the room that it leaves, so that it means the same place in an image of
|    | k    |      |        another size. The centre crop would be (1, 0.5, 0.5).
|    +------+      |
+------------------+
"""

from __future__ import annotations

import hashlib

import numpy as np
import PIL.Image

MAX_CROPS = 4
MIN_SIDE = 0.7
"""Least side of a window: half of the short side's square."""


def crop_windows(image: PIL.Image.Image, crops: int) -> list[tuple[float, float, float]]:
    """The windows of crops 1, 2, ... of a pair.

    Args:
      image: the pair's input. A hash of its pixels gives the windows, so that they are the same whenever it is met.
      crops: of each image, the centre included.

    Returns:
      (side, x, y) of each; sides are `MIN_SIDE` to 1.
    """
    if crops == 1:
        return []
    pixels = hashlib.sha256(image.tobytes()).digest()
    windows = []
    for crop in range(1, crops):
        side, x, y = (np.frombuffer(hashlib.sha256(pixels + bytes([crop])).digest()[:24], "<u8") / 2**64).tolist()
        windows.append((MIN_SIDE + (1 - MIN_SIDE) * side, x, y))
    return windows


def cut(image: PIL.Image.Image, window: tuple[float, float, float], size: int, *, exact: bool = False) -> np.ndarray:
    """uint8 [size, size, 3]: a window of an image, see `crop_windows`; with `exact` the nearest pixels, whose colours are not mixed."""
    side = window[0] * min(image.size)
    left, top = window[1] * (image.width - side), window[2] * (image.height - side)
    box = left, top, min(left + side, image.width), min(top + side, image.height)  # rounding must not lead outside
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.NEAREST if exact else PIL.Image.Resampling.LANCZOS, box))
