"""The paper's Table 5: images through the image tokenizer and back, which bounds every score of what a model draws.

    image --stretched--> side x side --codes--> side x side --stretched back--> scored at the image's own size

At the model's own side this is the `ceiling` arm of the suites. A larger side has more codes for the same image, so it loses less; the
tokenizer takes any side, a trained decoder only its own. Images go through one at a time: one of 1024 pixels takes some 1.5 GB with
Chameleon's tokenizer.

    OUT/images/00000/512.png   image 0 after 512 x 512, at that size
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
from tqdm import tqdm

from xprompt_jax.data.images import list_images, open_image, postprocess, save_png, to_pixels
from xprompt_jax.data.store import vqgan_fingerprint
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate import published
from xprompt_jax.evaluate.measures import PHOTOGRAPH_METRICS, reduce_sums
from xprompt_jax.evaluate.pairs import paired_bootstrap
from xprompt_jax.evaluate.report import ReportRow, Table, contact_sheet, write_report
from xprompt_jax.evaluate.results import FORMAT, WHOLE, Shard, file_fingerprint, fingerprint, finite, read_json, start, versions, write_json
from xprompt_jax.evaluate.truths import Colours
from xprompt_jax.files import atomic_path
from xprompt_jax.model.vqgan import VQGAN

MEASURES = "Images through the image tokenizer and back: what no model with this tokenizer can beat."
PUBLISHED = {f"{name}, Table 5": columns for name, columns in published.TABLE_5.items()}
NOTE = "the paper says neither whether RGB or Y was scored, nor how images came to 512 and 1024 pixels"
SHOWN, SIDE = 6, 256
"""Rows of pictures on the page, and pixels of their sides."""
MAX_SIDE = 8192
"""Pixels: one image of so many takes 100 GB and more with Chameleon's tokenizer."""


_through = jax.jit(lambda model, pixels: model.decode(model.encode(pixels)))


def reconstruct(
    vqgan: VQGAN, data: Path, out: Path, *, sides: Sequence[int] = (), shard: Shard = WHOLE, overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any] | None:  # fmt: skip
    """Takes every image of a folder through the tokenizer, and scores what comes back; goes on after a stop.

    Args:
      data: a folder of images.
      sides: pixels, multiples of the tokenizer's cell; () takes the model's and twice that.
      shard: the images to take, by their numbers; whichever part finds the folder complete scores the whole.
      overwrite: forget what `out` holds of other settings.

    Returns:
      What result.json holds; its arms are the sides. None while other parts are missing.

    Raises:
      UserError: no images, one that cannot be read, `out` among them, or a side that is no multiple of the cell, too large or given twice.
    """
    if out.resolve().is_relative_to(data.resolve()):
        raise UserError(f"--out {out} lies inside --data {data}, and the next run would take its images; choose a folder beside it")
    sides, cell = tuple(sides) or (vqgan.config.image_size, 2 * vqgan.config.image_size), vqgan.config.downsample
    for side in sides:
        if side < 1 or side % cell:
            raise UserError(f"--sides {side}: must be a multiple of {cell}, the pixels of one code")
        if side > MAX_SIDE:
            raise UserError(f"--sides {side}: must be at most {MAX_SIDE}, or memory does not hold one image")
        if sides.count(side) > 1:
            raise UserError(f"--sides {side}: given twice; give every side once")
    paths = list_images(data)
    settings = {"suite": "reconstruction", "model": vqgan_fingerprint(vqgan), "images": fingerprint(*map(file_fingerprint, paths))}
    start(out, settings, images=lambda: out.glob("images/*/*.png"), overwrite=overwrite, where={"data": str(data)}, shard=shard)
    own = [number for number in range(len(paths)) if shard.has(number)]
    with tqdm(total=len(own) * len(sides), unit="image", desc="reconstructing", disable=not progress) as bar:
        for number in own:
            path = paths[number]
            for side in sides:
                if not (drawn := _file(out, number, side)).is_file():
                    square = open_image(path).resize((side, side), PIL.Image.Resampling.LANCZOS)
                    save_png(postprocess(np.asarray(_through(vqgan, to_pixels(np.asarray(square))[None]))[0]), drawn)
                bar.update(1)
    if not all(_file(out, number, side).is_file() for number in range(len(paths)) for side in sides):
        return None
    result = score_reconstructions(out, paths, sides)
    write_json(out / "result.json", result)
    write_tables(out, out, paths, result)
    return result


def write_tables(to: Path, out: Path, paths: Sequence[Path], result: dict[str, Any]) -> None:
    """scores.csv, index.html and grid.png in a folder, from what result.json and the images of a run hold."""
    _write_csv(to / "scores.csv", result)
    _write_page(to, out, paths, result)


def _file(out: Path, number: int, side: int) -> Path:
    return out / "images" / f"{number:05d}" / f"{side}.png"


def score_reconstructions(out: Path, paths: Sequence[Path], sides: Sequence[int]) -> dict[str, Any]:
    """The result from the files of a run: mean of each metric over the images, with its 95 % bootstrap interval.

    Raises:
      UserError: a file is missing or damaged.
    """
    run = read_json(out / "run.json")
    queries: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        image = np.asarray(open_image(path))
        back = {str(side): Colours().decode(np.asarray(open_image(_file(out, number, side))), image.shape[:2]) for side in sides}
        scores = {m.name: {arm: reduce_sums([m.measure(b, image, image)]) for arm, b in back.items()} for m in PHOTOGRAPH_METRICS}
        queries.append({"number": number, "input": str(path), "sha256": file_fingerprint(path), "scores": scores})
    summary: dict[str, dict[str, Any]] = {}
    for m in PHOTOGRAPH_METRICS:
        for arm in map(str, sides):
            mean, low, high = paired_bootstrap([q["scores"][m.name][arm] for q in queries])
            summary.setdefault(m.name, {})[arm] = {"mean": mean, "low": low, "high": high}
    return finite({
        "format": FORMAT, "suite": "reconstruction", "measures": MEASURES, "model": {"fingerprint": run["model"]},
        "data": {"path": run["where"]["data"], "fingerprint": fingerprint(*sorted(q["sha256"] for q in queries)), "queries": len(paths)},
        "protocol": {
            "frame": "whole images, stretched to side x side pixels and back; scored there; an arm is a side",
            "metrics": {m.name: {"protocol": m.protocol, "unit": m.unit, "better": m.better} for m in PHOTOGRAPH_METRICS},
            "mean": "over the images, with the 95 % percentile interval of 5000 resamples",
        },
        "sides": list(sides), "versions": versions(), "scores": summary,
        "published": {"source": published.SOURCE, "rows": PUBLISHED, "note": NOTE}, "queries": queries,
    })  # fmt: skip


def lines(result: dict[str, Any]) -> list[str]:
    """One line for each metric and side."""
    text = lambda value: "-" if value is None else f"{value:.3f}"
    told = []
    for name, arms in result["scores"].items():
        unit = result["protocol"]["metrics"][name]["unit"]
        for arm, s in arms.items():
            label = f"reconstruction {name}{f' ({unit})' if unit else ''} at {arm}"
            told.append(f"{label}: {text(s['mean'])} [{text(s['low'])}, {text(s['high'])}]")
    return told


def _write_csv(path: Path, result: dict[str, Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="replace") as f:
        writer = csv.writer(f)
        writer.writerow(["input", "metric", *map(str, result["sides"])])
        for query in result["queries"]:
            writer.writerows([query["input"], metric, *arms.values()] for metric, arms in query["scores"].items())


def _write_page(to: Path, out: Path, paths: Sequence[Path], result: dict[str, Any]) -> None:
    text = lambda value: "" if value is None else f"{value:.3f}"
    body = [
        (f"{name} at {arm}", text(s["mean"]), f"{text(s['low'])} to {text(s['high'])}")
        for name, arms in result["scores"].items() for arm, s in arms.items()
    ]  # fmt: skip
    body += [(f"published: {row}, {column}", f"{value:g}", "") for row, columns in PUBLISHED.items() for column, value in columns.items()]
    small = lambda path: np.asarray(open_image(path).resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS))
    after = lambda number: ((f"after {side}", small(_file(out, number, side))) for side in result["sides"])
    rows = [ReportRow(path.name, "", (("image", small(path)), *after(number))) for number, path in enumerate(paths[:SHOWN])]
    contact_sheet(to / "grid.png", rows, title="xprompt eval reconstruction", scale=1)
    write_report(
        to / "index.html", title="xprompt eval reconstruction",
        lead=f"{MEASURES} {result['protocol']['frame'].capitalize()}. Beside published numbers: {NOTE}.",
        facts=[("tokenizer", result["model"]["fingerprint"]), ("images", str(len(paths))), ("data", result["data"]["fingerprint"])],
        rows=rows, heading="Images and what came back", curves=[],
        tables=[Table("Mean over the images", ("what", "mean", "95 % interval"), tuple(body))],
    )  # fmt: skip
