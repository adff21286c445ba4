"""Small pictures of an example, carried inside a compiled prompt so that a person can see what it does."""

from __future__ import annotations

import base64
import io

import PIL.Image

_SIDE = 96


def thumbnail(before: PIL.Image.Image, after: PIL.Image.Image) -> str:
    """Base64 PNG of the two images side by side, at most 96 pixels high."""
    pair = [image.copy() for image in (before, after)]
    for image in pair:
        image.thumbnail((_SIDE, _SIDE))
    canvas = PIL.Image.new("RGB", (sum(i.width for i in pair) + 2, max(i.height for i in pair)), "white")
    canvas.paste(pair[0], (0, 0))
    canvas.paste(pair[1], (pair[0].width + 2, 0))
    data = io.BytesIO()
    canvas.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()
