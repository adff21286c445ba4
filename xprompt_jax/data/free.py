"""Photographs that need no download and no permission."""

from __future__ import annotations

import numpy as np

from xprompt_jax.data.images import open_image, resize_center_crop
from xprompt_jax.errors import UserError

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
"""Of scikit-image's wheel: NASA's are in the public domain, the others CC0, as its documentation says."""


def free_photographs(size: int, count: int = 600, seed: int = 0) -> list[np.ndarray]:
    """Random crops, mirrored at random, of the public-domain and CC0 photographs inside scikit-image's wheel.

    Args:
      size: pixels of a side; a crop is taken between this size and the whole photograph.
      count: of crops; the photographs take turns.

    Returns:
      uint8 [size, size, 3] each.

    Raises:
      UserError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError:
        raise UserError("the free photographs come with scikit-image: pip install 'xprompt-jax[demo]', or give --photos DIR") from None
    rng = np.random.default_rng(seed)
    whole = [getattr(data, name)()[..., :3] for name in NAMES]
    crops = []
    for i in range(count):
        image = whole[i % len(whole)]
        side = int(rng.integers(size, min(image.shape[:2]) + 1))
        top, left = (int(rng.integers(0, n - side + 1)) for n in image.shape[:2])
        part = image[top : top + side, left : left + side]
        crops.append(resize_center_crop(open_image(np.ascontiguousarray(part[:, ::-1] if rng.random() < 0.5 else part)), size))
    return crops
