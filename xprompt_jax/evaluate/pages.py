"""The page, the table and the picture of a suite of pairs."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from xprompt_jax.evaluate.report import ReportRow, Table, contact_sheet, write_report
from xprompt_jax.evaluate.runs import ARMS, Plan, open_images
from xprompt_jax.evaluate.suites import Suite
from xprompt_jax.files import atomic_path

SHOWN = 12
"""Rows of pictures on the page."""
SIDE = 256
"""Most pixels of a picture's side there."""

NAMES = {
    "drawn": "drawn from the right example", "wrong": "drawn from a wrong example", "none": "drawn without an example",
    "copied": "the input, unchanged", "ceiling": "the target through the image tokenizer",
}  # fmt: skip


def write_tables(to: Path, plan: Plan, out: Path, result: Mapping[str, Any]) -> None:
    """scores.csv, index.html and grid.png in a folder, from what result.json and the images of a run hold."""
    write_csv(to / "scores.csv", result)
    rows = picture_rows(plan, out, result)
    write_page(to / "index.html", plan.suite, result, rows)
    write_grid(to / "grid.png", plan.suite, rows)


def write_csv(path: Path, result: Mapping[str, Any]) -> None:
    """A line for each query, example and metric."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="replace") as f:
        writer = csv.writer(f)
        writer.writerow(["task", "group", "input", "example", "choice", "metric", *ARMS])
        for query in result["queries"]:
            for metric, arms in query["scores"].items():
                head = [query[name] for name in ("task", "group", "input", "example", "choice")]
                writer.writerow([*head, metric, *(arms[arm] for arm in ARMS)])


def picture_rows(plan: Plan, out: Path, result: Mapping[str, Any]) -> list[ReportRow]:
    """The first queries of each task."""
    rows: list[ReportRow] = []
    size = result["model"]["image_size"]
    shown, tasks, metric = Counter[str](), len({e.query.task for e in plan.episodes}), plan.suite.metrics[0]
    for episode, told in zip(plan.episodes, result["queries"], strict=True):
        query = episode.query
        if episode.choice or len(rows) == SHOWN or shown[query.task] == max(1, SHOWN // tasks):
            continue
        shown[query.task] += 1
        images, example = open_images(plan, out, episode, size), plan.suite.read(episode.example, size)
        target = plan.suite.read(query, size)[1]
        pictures = (
            ("example input", example[0]), ("example output", example[1]), ("input", images["copied"]), ("generated", images["drawn"]),
            ("target", target), ("error", error_map(images["drawn"], target)), ("wrong example", images["wrong"]),
            ("no example", images["none"]), ("ceiling", images["ceiling"]),
        )  # fmt: skip
        number = lambda value: "-" if value is None else f"{value:.{metric.digits}f}"
        numbers = tuple((f"{metric.name}, {arm}", number(told["scores"][metric.name][arm])) for arm in ARMS)
        reduced = tuple((label, small(image)) for label, image in pictures)
        rows.append(ReportRow(query.task or plan.suite.name, query.instruction, reduced, numbers))
    return rows


def error_map(image: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean absolute difference over the channels, uint8 [h, w, 3]: black is none, white 128 levels and more."""
    difference = np.abs(image.astype(np.int32) - target).mean(-1)
    return np.repeat(np.clip(2 * difference, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def small(image: np.ndarray) -> np.ndarray:
    """At most SIDE pixels: the page holds many."""
    if image.shape[0] <= SIDE:
        return image
    return np.asarray(PIL.Image.fromarray(image).resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS))


def write_grid(path: Path, suite: Suite, rows: Sequence[ReportRow]) -> None:
    """The rows as one picture."""
    side = max(image.shape[0] for row in rows for _, image in row.images)
    contact_sheet(path, rows, title=f"xprompt eval {suite.name}", scale=max(1, 96 // side))


def write_page(path: Path, suite: Suite, result: Mapping[str, Any], rows: Sequence[ReportRow]) -> None:
    """index.html."""
    from xprompt_jax.evaluate.scores import CONTROLS

    tables = []
    for metric in suite.metrics:
        scores, digits = result["scores"][metric.name], metric.digits
        text = lambda value, digits=digits: "" if value is None else f"{value:.{digits}f}"
        body = [(NAMES[arm], text(scores[arm]["mean"]), text(scores[arm]["spread"])) for arm in ARMS]
        for control in CONTROLS:
            gap = scores[f"drawn_minus_{control}"]
            body.append((f"drawn - {control}, 95 % interval", text(gap["mean"]), f"{text(gap['low'])} to {text(gap['high'])}"))
        paper = [(row, columns[metric.column]) for row, columns in suite.published.items() if metric.column in columns]
        body += [(f"published: {row}", text(value), "") for row, value in paper]
        unit = f" in {metric.unit}" if metric.unit else ""
        title = f"{metric.name}{unit}, {metric.better} is better: {metric.protocol}"
        tables.append(Table(title, ("what", "mean", "spread over examples"), tuple(body)))
    tables.append(_by_query(suite, result))
    data = result["data"]
    facts = [
        ("model", result["model"]["fingerprint"]), ("examples shown as", result["model"]["mode"]), ("queries", str(data["queries"])),
        ("images drawn", str(2 * data["episodes"] + data["queries"])),
        ("seed", str(result["seed"])), ("data", data["fingerprint"]),
    ]  # fmt: skip
    frame = result["protocol"]["frame"].capitalize()
    lead = f"{suite.measures} {frame}. The wrong example is {data['wrong_example']}, under the right words."
    if note := result["published"]["note"]:
        lead += f" Beside published numbers: {note}."
    write_report(path, title=f"xprompt eval {suite.name}", lead=lead, facts=facts, rows=rows, curves=[], tables=tables)


def _by_query(suite: Suite, result: Mapping[str, Any]) -> Table:
    """What was drawn of each query, to sort by any score."""
    cell = lambda value, digits: "" if value is None else f"{value:.{digits}f}"
    body = tuple(
        (
            f"{q['number']}-{q['choice']}", q["task"] or suite.name,
            *(cell(q["scores"][m.name]["drawn"], m.digits) for m in suite.metrics),
        )
        for q in result["queries"]
    )  # fmt: skip
    return Table("Every query from every example, as drawn", ("query-example", "task", *(m.name for m in suite.metrics)), body)
