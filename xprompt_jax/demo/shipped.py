"""`xprompt demo`: the model inside the package follows examples of tasks that it was never trained on.

An example pair -> XP tokens -> a file of some 200 KB -> the same done to new images, beside what the controls would have drawn. The words
are the same for all tasks and say nothing ("do the same to this image"), so whatever a drawing gets right came through the XP tokens.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.convert.formats import MINI
from xprompt_jax.data.images import save_png
from xprompt_jax.data.levels import Level, held_pairs
from xprompt_jax.data.pipeline import GENERIC_INSTRUCTIONS
from xprompt_jax.data.sources import photographs
from xprompt_jax.demo.clock import Clock
from xprompt_jax.evaluate.metrics import psnr_rgb
from xprompt_jax.evaluate.pairs import NO_EXAMPLE, Outcome, make_episodes, run_pairs
from xprompt_jax.evaluate.report import ReportRow, Table, contact_sheet, write_report
from xprompt_jax.model.params import flatten
from xprompt_jax.sample.compiled import CompiledPrompt
from xprompt_jax.sample.sampler import Example, XPrompt

log = logging.getLogger(__name__)

SHOWN: Mapping[str, Level] = {
    "sepia": "parameters", "tone_curve": "parameters", "depth_ramp": "parameters", "normals": "parameters", "foreground": "parameters",
    "denoise": "parameters", "derain": "tasks", "low_light": "tasks",
}  # fmt: skip
"""Tasks, and how new they are (`data/levels.py`): dense, style and restoration; docs/in_context.md tells of all, edits included."""
NEWNESS: Mapping[Level, str] = {
    "parameters": "a trained kind of task with parameters that training never drew",
    "combinations": "parts that were trained, never together",
    "tasks": "a kind of task that training never showed",
}
QUERIES = 2
WORDS = GENERIC_INSTRUCTIONS[0]
SAMPLING: Mapping[str, Any] = {"guidance": 2.0, "temperature": 0.5}
"""Greedy drawing sometimes falls into flat colour; a narrow law and twice what the example says keep objects."""
ARMS = {
    "drawn": "generated", "wrong": "from a wrong example", NO_EXAMPLE: "without an example", "copied": "input, unchanged",
    "ceiling": "tokenizer's ceiling",
}  # fmt: skip
_SEED = 2000  # tools/bench_in_context.py asks 1000 and the seeds after it


def run_demo(
    workdir: Path, *, photos: Path | None = None, seed: int = 0, tasks: Mapping[str, Level] = SHOWN, queries: int = QUERIES
) -> Path:
    """Runs the demo.

    Args:
      workdir: gets index.html, demo.png, scores.json, prompts/TASK.xprompt, and the pictures in examples/ and inputs/.
      photos: folder of photographs; the tasks that need no scene are then shown on some of them as well.
      seed: another one draws other scenes and other parameters.
      tasks: to show; names and levels of `data/levels.py`.
      queries: new images of each.

    Returns:
      The path of the page.

    Raises:
      UserError: too few photographs, or the folder cannot be written.
    """
    clock = Clock()
    with clock("the model"):
        model = XPrompt.from_pretrained(MINI)
    with clock("new tasks on new scenes"):
        size = model.config.vq.image_size
        pictures = photographs(photos, size) if photos else []
        records = [
            dataclasses.replace(record, instruction=WORDS)
            for task, level in tasks.items()
            for record in held_pairs(
                level, groups=1, pairs_per_group=1 + queries, size=size, seed=_SEED + seed, photos=pictures, tasks=[task]
            )
        ]
        episodes = make_episodes(records, examples=1, seed=seed)
    with clock("drawing, with controls"):
        outcomes = list(run_pairs(model, episodes, no_example=True, seed=seed, **SAMPLING))
    with clock("the same from files, timed"):
        figures = _timed(model, outcomes, workdir, seed)
        _keep(outcomes, workdir)
    return _write(workdir, model, outcomes, figures, clock, tasks)


def _timed(model: XPrompt, outcomes: Sequence[Outcome], workdir: Path, seed: int) -> dict[str, float]:
    """Compiles the first query's example of each task into a file and draws from it; medians of seconds, programs being warm."""
    seconds: dict[str, list[float]] = {"compile": [], "image": []}
    size = 0
    for task, of_task in _by_task(outcomes).items():
        pair = Example(*of_task[0].example, WORDS)
        path = workdir / "prompts" / f"{task}.xprompt"
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        compiled = model.compile([pair])
        seconds["compile"].append(time.perf_counter() - start)
        compiled.save(path)
        size = path.stat().st_size
        prompt = CompiledPrompt.load(path)
        if not seconds["image"]:
            model.generate(prompt, [of_task[0].episode.query.input], seed=seed, **SAMPLING)
        start = time.perf_counter()
        model.generate(prompt, [of_task[0].episode.query.input], seed=seed, **SAMPLING)
        seconds["image"].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()} | {"bytes": size}


def _keep(outcomes: Sequence[Outcome], workdir: Path) -> None:
    """Writes examples and inputs as files, for whoever wants to go on with them."""
    for task, of_task in _by_task(outcomes).items():
        for side, image in zip(("input", "output"), of_task[0].example, strict=True):
            save_png(image, workdir / "examples" / f"{task}_{side}.png")
        for i, o in enumerate(of_task):
            save_png(o.images["copied"], workdir / "inputs" / f"{task}_{i}.png")


def _by_task(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for o in outcomes:
        found.setdefault(o.episode.query.task, []).append(o)
    return found


def _rows(outcomes: Sequence[Outcome], tasks: Mapping[str, Level]) -> Iterator[ReportRow]:
    for o in outcomes:
        task = o.episode.query.task
        pictures = (
            ("example input", o.example[0]), ("example output", o.example[1]), ("input", o.images["copied"]),
            ("generated", o.images["drawn"]), ("target", o.target), ("from a wrong example", o.images["wrong"]),
            ("without an example", o.images[NO_EXAMPLE]),
        )  # fmt: skip
        scores = tuple((name, f"{psnr_rgb(o.images[arm], o.target):.1f}") for arm, name in ARMS.items())
        scores = ((f"PSNR-RGB in dB: {scores[0][0]}", scores[0][1]), *scores[1:])
        yield ReportRow(task.replace("_", " "), f'"{WORDS}" · {NEWNESS[tasks[task]]}', pictures, scores)


def _write(
    workdir: Path, model: XPrompt, outcomes: Sequence[Outcome], figures: Mapping[str, float], clock: Clock, tasks: Mapping[str, Level]
) -> Path:  # fmt: skip
    by_task = _by_task(outcomes)
    means = {
        task: {arm: float(np.mean([psnr_rgb(o.images[arm], o.target) for o in of_task])) for arm in ARMS}
        for task, of_task in by_task.items()
    }  # fmt: skip
    mean = {arm: float(np.mean([of_task[arm] for of_task in means.values()])) for arm in ARMS}
    parameters = sum(value.size for value in flatten(model.decoder).values())
    facts = [
        ("model", f"{parameters / 1e6:.1f} million parameters, {model.config.num_xp_tokens} XP tokens"),
        ("to compile an example", f"{1000 * figures['compile']:.0f} ms"),
        ("a compiled prompt", f"{figures['bytes'] / 1000:.0f} kB"),
        ("to draw an image", f"{1000 * figures['image']:.0f} ms"),
        ("everything", f"{clock.total():.0f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"),
        ("on", f"{os.cpu_count()} processors, {platform.machine()}"),
    ]
    line = lambda name, scores: (name, *(f"{scores[arm]:.1f}" for arm in ARMS))
    tables = [
        Table(
            f"Mean PSNR-RGB against the target, dB, {len(outcomes)} new images", ("task", *ARMS.values()),
            (*(line(task.replace("_", " "), scores) for task, scores in means.items()), line("mean", mean)),
        ),
        clock.table(),
    ]  # fmt: skip
    lead = (
        "Each row shows one example pair to the small model inside the package. The example becomes "
        f"{model.config.num_xp_tokens} XP tokens, and the mask hides the example itself; the model then does the same to an image it has "
        "never seen. The words never say what to do. Beside the drawing stands what would have been drawn from another task's example, and "
        "from none. The tasks shown are among those that it does well; docs/in_context.md tells of all of them."
    )
    rows = list(_rows(outcomes, tasks))
    first = [rows[outcomes.index(of_task[0])] for of_task in by_task.values()]
    (workdir / "scores.json").write_text(json.dumps({"psnr_rgb": means, "mean": mean, **figures}, indent=2) + "\n")
    contact_sheet(workdir / "demo.png", first, title="X-Prompt: one example, then the same to a new image", scale=2)
    page = write_report(workdir / "index.html", title="X-Prompt demo", lead=lead, facts=facts, rows=rows, curves=(), tables=tables)
    for name, value in facts:
        log.info("%s: %s", name, value)
    log.info("PSNR in dB: %s", ", ".join(f"{name} {mean[arm]:.1f}" for arm, name in ARMS.items()))
    return page
