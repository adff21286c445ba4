"""Pairs of any dataset as a manifest with images beside it, for `xprompt annotate` and for looking at them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xprompt_jax.data.datasets.base import Pairs
from xprompt_jax.data.images import open_image, save_png
from xprompt_jax.files import atomic_path


def _packing(image: Any) -> str:
    """The extension of an image's bytes as they are; "" of what must be packed first."""
    head = image[:12] if isinstance(image, bytes) else b""
    known = {".jpg": head[:3] == b"\xff\xd8\xff", ".png": head[:4] == b"\x89PNG", ".webp": head[:4] + head[8:] == b"RIFFWEBP"}
    return next((extension for extension, there in known.items() if there), "")


def export(pairs: Pairs, folder: Path, *, progress: bool = True) -> int:
    """Writes folder/pairs.jsonl. Images that are files already are referred to where they are; others become files in folder/images,
    JPEG, PNG and WebP as they were packed, all else as PNG.

    Returns:
      the number of pairs.

    Raises:
      UserError: an image cannot be read, or the folder cannot be written.
    """

    def written(image: Any, name: str) -> str:
        if isinstance(image, str | os.PathLike):
            return os.path.relpath(os.path.realpath(image), os.path.realpath(folder))
        opened = open_image(image)  # what is damaged is refused here
        file = f"images/{name}{_packing(image) or '.png'}"
        if _packing(image):
            (folder / file).write_bytes(image)
        else:
            save_png(opened, folder / file)
        return file

    (folder / "images").mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "pairs.jsonl") as temporary, temporary.open("w") as file:
        for number, record in enumerate(tqdm(pairs, unit="pair", desc="exporting", disable=not progress)):
            row = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
            row["input"] = written(record.input, f"{number:07d}-input")
            row["output"] = row["input"] if record.output is record.input else written(record.output, f"{number:07d}-output")
            row["more_inputs"] = [written(image, f"{number:07d}-input{i}") for i, image in enumerate(record.more_inputs, 2)]
            file.write(
                json.dumps({name: value for name, value in row.items() if value or name in ("instruction",)}, ensure_ascii=False) + "\n"
            )
    return len(pairs)
