"""One self-contained page for a run, and the same rows as one picture.

Everything is in the file: images as data URIs, curves as SVG, a few lines of script to sort tables. It opens from disk,
from a mail, in ten years.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from xprompt_jax.files import atomic_path

_COLOURS = ("#3565c4", "#c4663a", "#3b8f6b", "#8657b5")
_WIDTH = 780  # pixels that the images of a row may take together on the page
_LEAST, _SHOWN = 104, 128  # of one image's side: a row is made narrower to fit on a line, or else broken


@dataclass(frozen=True)
class ReportRow:
    """One episode: labelled pictures, words, scores."""

    title: str
    caption: str
    images: tuple[tuple[str, np.ndarray], ...]
    """(label, uint8 [h, w, 3])."""
    scores: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Curve:
    """A line of a plot."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by its columns."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write_report(
    path: str | Path, *, title: str, lead: str, facts: Sequence[tuple[str, str]], rows: Sequence[ReportRow], curves: Sequence[Curve],
    tables: Sequence[Table] = (), heading: str = "One example, then the same to a new image",
) -> Path:  # fmt: skip
    """Writes the page, whole or not at all.

    Args:
      lead: one paragraph under the title.
      facts: (name, value), shown as cards.
      heading: above the rows.

    Returns:
      `path`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xprompt_jax.evaluate", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    fits = _WIDTH // max((len(row.images) for row in rows), default=1)
    shown = min(fits, _SHOWN) if fits >= _LEAST else _SHOWN
    page = environment.get_template("report.html.jinja").render(
        title=title, lead=lead, heading=heading, facts=facts, rows=rows, tables=tables, plot=_plot(curves), picture=_data_uri, shown=shown
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # not all names of files are UTF-8
    return Path(path)


def _data_uri(image: np.ndarray) -> str:
    data = io.BytesIO()
    PIL.Image.fromarray(image).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _plot(curves: Sequence[Curve]) -> dict | None:
    """Coordinates of an SVG of 640 x 240 with axes; None when there is nothing finite to draw."""
    lines = [[(float(x), float(y)) for x, y in zip(c.steps, c.values, strict=True) if math.isfinite(y)] for c in curves]
    points = [p for line in lines for p in line]
    if not points:
        return None
    left, top, width, height = 46, 12, 580, 190
    x_max = max(max(x for x, _ in points), 1.0)
    y_top = max(y for _, y in points)
    step = _nice(y_top / 4 or 1.0)
    y_max = step * max(math.ceil(y_top / step), 1)
    at = lambda x, y: f"{left + width * x / x_max:.1f},{top + height * (1 - y / y_max):.1f}"
    x_step = _nice(x_max / 5)
    return {
        "lines": [
            {"name": c.name, "points": " ".join(at(*p) for p in line), "colour": _COLOURS[i % len(_COLOURS)], "dots": len(line) <= 12}
            for i, (c, line) in enumerate(zip(curves, lines, strict=True)) if line
        ],
        "y_ticks": [(f"{i * step:g}", at(0, i * step).split(",")[1]) for i in range(round(y_max / step) + 1)],
        "x_ticks": [(f"{i * x_step:g}", at(i * x_step, 0).split(",")[0]) for i in range(int(x_max / x_step) + 1)],
        "left": left, "right": left + width, "bottom": top + height,
    }  # fmt: skip


def _nice(value: float) -> float:
    """1, 2 or 5 times a power of ten, not below `value`."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * 0.999)


def contact_sheet(path: str | Path, rows: Sequence[ReportRow], *, title: str, scale: int = 3) -> Path:
    """Writes the rows as one PNG with labels; images are enlarged `scale` times without smoothing."""
    font, small = PIL.ImageFont.load_default(size=15), PIL.ImageFont.load_default(size=12)
    side = max((max(image.shape[:2]) for row in rows for _, image in row.images), default=32) * scale
    columns = max((len(row.images) for row in rows), default=1)
    gap, head, label, margin = 14, 48, 34, 20
    width = 2 * margin + columns * side + (columns - 1) * gap
    width = max(width, 2 * margin + int(font.getlength(title)))
    sheet = PIL.Image.new("RGB", (width, head + len(rows) * (side + label) + 24), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    draw.text((margin, 10), title, fill="#1c1c1e", font=font)
    for column, (name, _) in enumerate(rows[0].images if rows else ()):
        draw.text((margin + column * (side + gap), 30), name, fill="#6b6b70", font=small)
    for i, row in enumerate(rows):
        top = head + i * (side + label)
        for column, (_, image) in enumerate(row.images):
            picture = PIL.Image.fromarray(image).resize((image.shape[1] * scale, image.shape[0] * scale), PIL.Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + column * (side + gap), top))
        words = " · ".join([row.title, *(f"{name} {value}" for name, value in row.scores)])
        draw.text((margin, top + side + 4), words, fill="#1c1c1e", font=small)
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")
    return Path(path)
