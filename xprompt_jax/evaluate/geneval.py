"""GenEval, the paper's Table 1: text to image, judged by an object detector (arXiv 2310.11513).

    OUT/00000/metadata.jsonl         prompt 0's line of evaluation_metadata.jsonl: the official layout
    OUT/00000/samples/0000.png ...   its images
    OUT/run.json                     what they were drawn with
    OUT/results.jsonl                a line for each image, when detections were judged here: the official format
    OUT/result.json, scores.csv, index.html, grid.png   the score

Two ways from images to a score: the official evaluation/evaluate_images.py reads OUT and writes results.jsonl, which `summarise` reads; or
any detector's boxes and colours are judged here, by the official rules (geneval_rules.py).
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from xprompt_jax.data.images import open_image, save_png
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate import geneval_rules as rules
from xprompt_jax.evaluate import published
from xprompt_jax.evaluate.pages import SHOWN, small
from xprompt_jax.evaluate.report import ReportRow, Table, contact_sheet, write_report
from xprompt_jax.evaluate.results import FORMAT, WHOLE, Shard, fingerprint, read_json, start, versions, write_json
from xprompt_jax.files import atomic_path, read_json_lines

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELIABLE = 0.8
"""Detectors that are set up wrongly score low without a word; published models reach this on single objects."""
PROMPTS, IMAGES = 553, 4
"""Of the benchmark: prompts, and images of each."""

Image = tuple[int, int]
"""Number of the prompt, number of the image."""


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """The prompts of evaluation_metadata.jsonl: {"tag", "prompt", "include": [{"class", "count", "color", "position"}], "exclude"}.

    Raises:
      UserError: unreadable, empty, or a line of another kind.
    """
    if not path.is_file():
        fields = '{"tag", "prompt", "include": [{"class", "count", "color", "position"}], "exclude"}'
        raise UserError(f"{path}: no such file; give GenEval's prompts/evaluation_metadata.jsonl, {PROMPTS} lines {fields}")
    rows = []
    for number, row in read_json_lines(path):
        problem = _problem(row)
        if problem:
            raise UserError(f"{path}, line {number}: {problem}; give GenEval's evaluation_metadata.jsonl")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: empty; give GenEval's evaluation_metadata.jsonl")
    return rows


def _problem(row: Mapping[str, Any]) -> str:
    if row.get("tag") not in TAGS or not isinstance(row.get("prompt"), str):
        return f'no "prompt", or "tag" is none of {", ".join(TAGS)}'
    for kind in ("include", "exclude"):
        clauses = row.get(kind, [] if kind == "exclude" else None)
        if not isinstance(clauses, list) or (kind == "include" and not clauses):
            return f'"{kind}" must be a list of objects'
        for number, clause in enumerate(clauses):
            if not (
                isinstance(clause, dict) and isinstance(clause.get("class"), str) and isinstance(clause.get("count"), int)
                and clause["count"] > 0 and clause.get("color", "red") in rules.COLORS
            ):  # fmt: skip
                return f'"{kind}" needs a "class", a "count" above 0 and perhaps a "color" of {", ".join(rules.COLORS)}'
            if "position" in clause:
                position = clause["position"]
                if not (
                    isinstance(position, list) and len(position) == 2 and position[0] in rules.RELATIONS
                    and type(position[1]) is int and position[1] in range(number)
                ):  # fmt: skip
                    return f'"position" must be one of {", ".join(rules.RELATIONS)} and the number of a clause before it'
    return ""


def sample_path(out: Path, prompt: int, image: int) -> Path:
    """Where an image lies, in the official layout."""
    return out / f"{prompt:05d}" / "samples" / f"{image:04d}.png"


def draw_prompts(
    model: XPrompt, metadata: Sequence[Mapping[str, Any]], out: Path, *, num_images: int = 4, seed: int = 0, shard: Shard = WHOLE,
    overwrite: bool = False, progress: bool = True, sampling: Mapping[str, Any] | None = None,
) -> int:  # fmt: skip
    """Draws what `out` does not hold yet.

    Args:
      metadata: of `read_metadata`.
      num_images: of each prompt; the benchmark has 4.
      shard: the prompts to draw, by their numbers.
      overwrite: draw again what other settings drew.
      sampling: arguments of `XPrompt.text_to_image`.

    Returns:
      The number of images drawn now.

    Raises:
      UserError: `out` holds images of other settings or prompts, or cannot be written.
    """
    from xprompt_jax.sample.draw import MAX_BATCH

    sampling = dict(sampling or {})
    settings = {
        "suite": "geneval", "model": model.fingerprint, "prompts": fingerprint(*(row["prompt"] for row in metadata)),
        "num_images": num_images, "seed": seed, "precision": model.precision, "sampling": sampling,
    }  # fmt: skip
    start(out, settings, images=lambda: out.glob("[0-9]*/samples/*.png"), overwrite=overwrite, shard=shard)
    for prompt, row in enumerate(metadata):
        with atomic_path(out / f"{prompt:05d}" / "metadata.jsonl") as temporary:
            temporary.write_text(json.dumps(row), encoding="utf-8")
    files = [[sample_path(out, prompt, image) for image in range(num_images)] for prompt in range(len(metadata))]
    todo = [prompt for prompt, paths in enumerate(files) if shard.has(prompt) and not all(path.is_file() for path in paths)]
    at_once = max(1, MAX_BATCH // num_images)
    with tqdm(total=len(todo) * num_images, unit="image", desc="drawing", disable=not progress) as bar:
        for first in range(0, len(todo), at_once):
            part = todo[first : first + at_once]
            images = model.text_to_image([metadata[p]["prompt"] for p in part], seed=seed, num_images=num_images, **sampling)
            for image, path in zip(images, (path for p in part for path in files[p]), strict=True):
                save_png(image, path)
            bar.update(len(images))
    return len(todo) * num_images


def is_complete(out: Path, metadata: Sequence[Mapping[str, Any]], num_images: int = 4) -> bool:
    """Whether no image is missing."""
    return all(sample_path(out, p, i).is_file() for p in range(len(metadata)) for i in range(num_images))


def check_folder(out: Path, metadata: Sequence[Mapping[str, Any]], num_images: int = 4) -> None:
    """Sees that a folder is what the official evaluation expects: it would score what is there and not tell what is missing.

    Raises:
      UserError: an image or a prompt is missing, one too many is there, or a folder is another prompt's; names the first and counts.
    """
    wanted = {sample_path(out, p, i) for p in range(len(metadata)) for i in range(num_images)}
    found = set(out.glob("[0-9]*/samples/*.png"))
    for problem, paths in ((f"of {len(wanted)} images missing", wanted - found), ("images not asked for", found - wanted)):
        if paths:
            raise UserError(f"{out}: {len(paths)} {problem}, the first is {min(paths).relative_to(out)}; "
                            "draw them with --model, or correct --data and --num-images")  # fmt: skip
    for prompt, row in enumerate(metadata):
        path = out / f"{prompt:05d}" / "metadata.jsonl"
        if [r for _, r in read_json_lines(path)] != [row]:
            raise UserError(f"{path}: not line {prompt + 1} of --data; these images are of other prompts")


def _images_of(path: Path, metadata: Sequence[Mapping[str, Any]], num_images: int) -> dict[Image, dict[str, Any]]:
    """The lines of a file that has one for each image, by image.

    Raises:
      UserError: an image is missing, unknown or there twice.
    """
    found: dict[Image, dict[str, Any]] = {}
    for number, row in read_json_lines(path):
        where, match = f"{path}, line {number}", re.search(r"(\d+)[/\\]samples[/\\](\d+)\.png$", str(row.get("filename", "")))
        if not match:
            raise UserError(f'{where}: "filename" must end like 00000/samples/0000.png')
        image = int(match[1]), int(match[2])
        if image in found or image[0] >= len(metadata) or image[1] >= num_images:
            raise UserError(f"{where}: {match[0]} is there twice, or is not asked for by --data and --num-images")
        found[image] = row
    total = len(metadata) * num_images
    if len(found) < total:
        first = next((p, i) for p in range(len(metadata)) for i in range(num_images) if (p, i) not in found)
        raise UserError(f"{path}: {total - len(found)} of {total} images missing, the first is "
                        f"{sample_path(Path(), *first)}; run the detector on the whole folder")  # fmt: skip
    return dict(sorted(found.items()))


def read_results(path: Path, metadata: Sequence[Mapping[str, Any]], num_images: int = 4) -> dict[Image, bool]:
    """Image -> whether it is right, of the official results.jsonl.

    Raises:
      UserError: unreadable, incomplete, or of other prompts.
    """
    found = _images_of(path, metadata, num_images)
    for image, row in found.items():
        if not isinstance(row.get("correct"), bool) or any(row.get(key) != metadata[image[0]][key] for key in ("tag", "prompt")):
            raise UserError(f'{path}: the line of {sample_path(Path(), *image)} has no "correct", or is of another prompt than --data has')
    return {image: row["correct"] for image, row in found.items()}


def take_results(path: Path, out: Path, metadata: Sequence[Mapping[str, Any]], num_images: int = 4) -> dict[Image, bool]:
    """As `read_results`, and puts a copy beside the images, as OUT/results.jsonl."""
    correct = read_results(path, metadata, num_images)
    with atomic_path(out / "results.jsonl") as temporary:
        temporary.write_bytes(path.read_bytes())
    return correct


def judge_detections(path: Path, out: Path, metadata: Sequence[Mapping[str, Any]], num_images: int = 4) -> dict[Image, bool]:
    """Judges the detections of a file by the official rules and writes OUT/results.jsonl in the official format.

    A line is {"filename": "00000/samples/0000.png", "objects": [{"class": "bench", "box": [left, top, right, bottom], "confidence": 0.97,
    "color": "red"}, ...]}, boxes in pixels and unfiltered; "color" is needed where the prompt asks for one.

    Returns:
      Image -> whether it is right.

    Raises:
      UserError: unreadable, incomplete, or a colour is missing.
    """
    verdicts, rows = {}, []
    for image, line in _images_of(path, metadata, num_images).items():
        name = sample_path(Path(), *image)
        objects: dict[str, list[rules.Detection]] = {}
        try:
            for found in line["objects"]:
                box = tuple(map(float, found["box"]))
                if len(box) != 4 or found.get("color", "red") not in (*rules.COLORS, None):
                    raise ValueError
                objects.setdefault(found["class"], []).append(rules.Detection(box, float(found["confidence"]), found.get("color")))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f'{path}: the line of {name} must have "objects", each with "class", "box" of 4 numbers, "confidence" and '
                            f'perhaps "color" of {", ".join(rules.COLORS)}') from None  # fmt: skip
        row = metadata[image[0]]
        try:
            correct, reasons = rules.judge(row, objects)
        except UserError as e:
            raise UserError(f"{path}: {name}: {e}") from None
        verdicts[image] = correct
        kept = {key: [[*d.box, d.confidence] for d in rules.keep(found, row["tag"])] for key, found in objects.items()}
        rows.append({
            "filename": str(sample_path(out, *image)), "tag": row["tag"], "prompt": row["prompt"], "correct": correct,
            "reason": "\n".join(reasons), "metadata": json.dumps(row), "details": json.dumps({k: v for k, v in kept.items() if v}),
        })  # fmt: skip
    with atomic_path(out / "results.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return verdicts


def summarise(correct: Mapping[Image, bool], metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The official summary.

    Returns:
      {"tasks": tag -> share of right images, "overall": mean over the tasks, which weigh alike with their 80 to 100 prompts, "images":
      share of right images, "prompts": share of prompts with any right image}.
    """
    tags: dict[str, list[bool]] = {}
    prompts: dict[str, bool] = {}
    for (prompt, _), right in correct.items():
        row = metadata[prompt]
        tags.setdefault(row["tag"], []).append(right)
        key = json.dumps(row)  # what is asked for twice is one prompt
        prompts[key] = prompts.get(key, False) or right
    tasks = {tag: float(np.mean(tags[tag])) for tag in TAGS if tag in tags}
    return {
        "tasks": tasks, "overall": float(np.mean(list(tasks.values()))), "images": float(np.mean(list(correct.values()))),
        "prompts": float(np.mean(list(prompts.values()))),
    }  # fmt: skip


def make_result(correct: Mapping[Image, bool], metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What result.json says of the scores; its queries are the prompts, scored by their share of right images."""
    summary = summarise(correct, metadata)
    images: dict[int, list[bool]] = {}
    for (prompt, _), right in correct.items():
        images.setdefault(prompt, []).append(right)
    tasks, names = summary["tasks"], [fingerprint(json.dumps(row, sort_keys=True)) for row in metadata]
    protocols = {tag: f"share of right images of the prompts of {tag}" for tag in tasks}
    protocols["overall"] = "mean over the tasks of their share of right images"
    return {
        "format": FORMAT, "suite": "geneval",
        "measures": "GenEval: whether images show the objects, counts, colours and positions that their text asks for.",
        "data": {"fingerprint": fingerprint(*sorted(names)), "queries": len(metadata), "images": len(correct)},
        "protocol": {"metrics": {name: {"protocol": p, "unit": "", "better": "higher"} for name, p in protocols.items()}},
        "scores": {name: {"drawn": {"mean": value}} for name, value in [*tasks.items(), ("overall", summary["overall"])]},
        "shares": {"images": summary["images"], "prompts": summary["prompts"]},
        "queries": [
            {"sha256": names[p], "prompt": metadata[p]["prompt"], "scores": {metadata[p]["tag"]: {"drawn": float(np.mean(images[p]))}}}
            for p in sorted(images)
        ],
    }  # fmt: skip


def write_scores(out: Path, correct: Mapping[Image, bool], metadata: Sequence[Mapping[str, Any]], *, judged_by: str) -> dict[str, Any]:
    """Writes result.json, scores.csv, index.html and grid.png.

    Args:
      judged_by: where the verdicts come from, in words.

    Returns:
      What result.json holds.
    """
    run = read_json(out / "run.json") if (out / "run.json").exists() else {}  # images of another program have none
    result = make_result(correct, metadata) | {
        "model": {"fingerprint": run.get("model")}, "judged_by": judged_by,
        "published": {"source": published.SOURCE, "rows": published.TABLE_1, "note": _note(len(metadata), len(correct))},
        "seed": run.get("seed"), "sampling": run.get("sampling"), "versions": versions(),
    }  # fmt: skip
    write_json(out / "result.json", result)
    write_tables(out, out, result, correct, metadata)
    return result


def write_tables(
    to: Path, out: Path, result: Mapping[str, Any], correct: Mapping[Image, bool], metadata: Sequence[Mapping[str, Any]]
) -> None:  # fmt: skip
    """scores.csv, index.html and grid.png in a folder, from what result.json says and the images of a run."""
    counts = Counter(metadata[prompt]["tag"] for prompt, _ in correct)
    scores, shares = {name: arms["drawn"]["mean"] for name, arms in result["scores"].items()}, result["shares"]
    rows = tuple((name, f"{score:.5f}", str(counts.get(name, len(correct)))) for name, score in scores.items())
    text = lambda value: "" if value is None else f"{value:.2f}"
    beside = [("this run", *(text(scores.get(name)) for name in ("overall", *TAGS)))]
    beside += [(row, *(text(columns.get(name)) for name in ("overall", *TAGS))) for row, columns in published.TABLE_1.items()]
    with atomic_path(to / "scores.csv") as temporary, temporary.open("w", newline="", encoding="utf-8", errors="replace") as f:
        writer = csv.writer(f)
        writer.writerow(["prompt", "tag", "share of right images"])
        writer.writerows((q["prompt"], tag, arms["drawn"]) for q in result["queries"] for tag, arms in q["scores"].items())
    pictures = _picture_rows(out, correct, metadata)
    contact_sheet(to / "grid.png", pictures, title="xprompt eval geneval", scale=1)
    write_report(
        to / "index.html", title="xprompt eval geneval",
        lead=f"{result['measures']} Judged by {result['judged_by']}. The overall score is the mean over the tasks, not over the images. "
             f"Beside published numbers: {result['published']['note']}.",
        facts=[("model", str(result["model"]["fingerprint"])), ("prompts", str(len(metadata))), ("images", str(len(correct))),
               ("right images", f"{shares['images']:.2%}"), ("prompts with a right image", f"{shares['prompts']:.2%}")],
        rows=pictures, heading="Prompts and verdicts", curves=[],
        tables=[
            Table("Share of right images", ("task", "share", "images"), rows),
            Table(f"Beside Table 1 of {published.SOURCE}", ("model", "overall", *(tag.replace("_", " ") for tag in TAGS)), tuple(beside)),
        ],
    )  # fmt: skip


def _note(prompts: int, images: int) -> str:
    """What to know before comparing."""
    if (prompts, images) != (PROMPTS, PROMPTS * IMAGES):
        return f"{images} images of {prompts} prompts are not the benchmark, which has {PROMPTS} prompts and {IMAGES} images of each"
    return "scores of the official detector compare, those of another one do not"


def _picture_rows(out: Path, correct: Mapping[Image, bool], metadata: Sequence[Mapping[str, Any]]) -> list[ReportRow]:
    """The first prompts of each task with their images and verdicts."""
    rows: list[ReportRow] = []
    images: dict[int, list[int]] = {}
    for prompt, image in correct:
        images.setdefault(prompt, []).append(image)
    for tag in TAGS:
        for prompt in [p for p in images if metadata[p]["tag"] == tag][: SHOWN // len(TAGS)]:
            told = {True: "right", False: "wrong"}
            shown = tuple((told[correct[prompt, i]], small(np.asarray(open_image(sample_path(out, prompt, i))))) for i in images[prompt])
            rows.append(ReportRow(tag, metadata[prompt]["prompt"], shown))
    return rows


def lines(result: Mapping[str, Any]) -> list[str]:
    """One line for each task and the overall score, beside the paper's; what to know, and a warning where the detector may be at fault."""
    scores = {name: arms["drawn"]["mean"] for name, arms in result["scores"].items()}
    row, paper = next(iter(published.TABLE_1.items()))
    told = [f"geneval {name}: {value:.4f}; paper: {row} {paper[name]:g}" for name, value in scores.items()]
    told.append(f"geneval: {result['published']['note']}")
    if scores.get("single_object", 1.0) < RELIABLE:
        told.append(f"geneval: single_object is below {RELIABLE}: see first whether the detector's configuration and checkpoint fit")
    return told
