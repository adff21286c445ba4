"""From pictures to the pixels that CLIP and DINO were trained on, as their own code does it with PIL (facts: data_eval.md 2.2).

           short side to    crop    mean and deviation
    CLIP   224, bicubic     224     OpenAI's
    DINO   256, bicubic     224     ImageNet's

Scores move by 0.02 where this is done otherwise, so it is part of the encoders here. The crop is torchvision's: its offset is half
the margin, rounded to even (Hugging Face's processor rounds down; the two differ for margins of 3, 7, 11 ... pixels).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image

from xprompt_jax.data.images import open_image

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def clip_pixels(image: Any, size: int = 224) -> np.ndarray:
    """Whatever `images.open_image` takes -> float32 [size, size, 3].

    Raises:
      UserError: not a readable image.
    """
    return _pixels(image, size, size, CLIP_MEAN, CLIP_STD)


def dino_pixels(image: Any, size: int = 224) -> np.ndarray:
    """Whatever `images.open_image` takes -> float32 [size, size, 3]; resized to 8/7 of it before the crop.

    Raises:
      UserError: not a readable image.
    """
    return _pixels(image, size * 256 // 224, size, IMAGENET_MEAN, IMAGENET_STD)


def _pixels(image: Any, short: int, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    picture = open_image(image)
    width, height = picture.size
    least = min(width, height)
    picture = picture.resize((short * width // least, short * height // least), PIL.Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in picture.size)
    cropped = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32) / 255
    return (cropped - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
