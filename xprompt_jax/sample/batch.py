"""Folder runs: many inputs, one folder of pictures, one line for each (folder.py); killed and started again, a run goes on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from tqdm import tqdm

from xprompt_jax.data.images import open_image, resize_center_crop
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.report import ReportRow, contact_sheet
from xprompt_jax.sample.folder import SHEET, Folder, Plan, locked
from xprompt_jax.sample.requests import Request, Task

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

log = logging.getLogger(__name__)

SHEET_ROWS = 40
"""Inputs on the contact sheet."""
SHEET_SIDE = 128
"""Pixels of an image's side there."""
PROMPTS = 64
"""Compiled prompts that are kept in memory; one of a 7B model takes some 30 MB."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What became of a run."""

    drawn: int
    """Images drawn now."""
    kept: int
    """Images of earlier runs."""
    failed: int
    """Requests that could not be used."""


def draw_folder(
    model: XPrompt, requests: Sequence[Request], out: Path, *, task: Task | None = None, instruction: str | None = None, seed: int = 0,
    num_images: int = 1, sampling: Mapping[str, Any], overwrite: bool = False, progress: bool = True,
) -> Summary:  # fmt: skip
    """Draws what `out` does not hold yet, a batch at a time, and goes on after inputs that cannot be used.

    Args:
      requests: all with inputs, or all texts.
      task: for requests that name none.
      instruction: for requests that have none; None takes the task's.
      seed: for requests that have none.
      num_images: images for each request.
      sampling: guidance, temperature, top_k, top_p, decoding and window of `XPrompt.generate`.
      overwrite: forget what `out` holds and draw it again.

    Raises:
      UserError: `task` is another model's; `out` holds images of other settings or another model, or files that are not of such runs
        and would be overwritten; another run is drawing there, or it cannot be written.
    """
    if task is not None:
        task.check(model)
    settings = {
        "task": task.digest if task else None, "instruction": instruction, "seed": seed, "num_images": num_images, **sampling,
        "precision": model.precision,
    }  # fmt: skip
    with locked(out) as lock:
        folder = Folder(out, model.fingerprint, settings, lock, overwrite=overwrite)
        return _draw_all(model, requests, folder, task, instruction, seed, num_images, sampling, progress)


def _draw_all(model, requests, folder, task, instruction, seed, num_images, sampling, progress) -> Summary:
    from xprompt_jax.sample.draw import MAX_BATCH, check_prompt

    load = functools.lru_cache(maxsize=PROMPTS)(Task.load)

    def task_of(request: Request) -> Task | None:
        return task if request.task is None else load(request.task).check(model)

    plans, failures, bad = {}, [], set()
    for request in requests:
        try:
            plan = folder.plan(request, task_of(request), instruction, seed, num_images)
            plans[plan.files] = plan  # what is asked for twice is drawn once
        except UserError as e:
            failures.append((request, e))
    folder.begin(plans.values())
    for request, error in failures:
        folder.fail(request, error)
    # Many images of one request in parts, so that a run that is killed keeps those that are drawn.
    parts = [part for plan in plans.values() for part in plan.parts(MAX_BATCH)]
    todo = [part for part in parts if not folder.has(part)]
    count, drawn = sum(len(part.files) for part in todo), 0
    if kept := num_images * len(plans) - count:
        log.info("%s: %d image(s) drawn before, %d to draw", folder.out, kept, count)
    with tqdm(total=count, unit="image", desc="drawing", disable=not progress) as bar:
        for batch in _batches(todo, max(1, MAX_BATCH // num_images)):
            ready, codes = [], []
            for plan in batch:
                try:
                    found = [] if plan.request.input is None else [model.encode_images([plan.request.input])[0]]
                    check_prompt(model, plan.told["instruction"], *found, window=sampling["window"])
                    folder.check_names(plan)
                    ready.append(plan)
                    codes += found
                except UserError as e:
                    if plan.request not in bad:
                        folder.fail(plan.request, e)
                    bad.add(plan.request)
                    bar.total -= len(plan.files)
            if not ready:
                continue
            options = {"seed": ready[0].told["seed"], "num_images": len(ready[0].files), "first_image": ready[0].first, **sampling}
            texts = [plan.told["instruction"] for plan in ready]
            if codes:
                tasks = filter(None, (task_of(plan.request) for plan in ready))
                prompts = [dataclasses.replace(task.prompt, instruction=text) for task, text in zip(tasks, texts, strict=True)]
                images = model.generate(prompts, codes, **options)
            else:
                images = model.text_to_image(texts, **options)
            folder.add(ready, images)
            drawn += len(images)
            bar.update(len(images))
    if shown := [plan for plan in plans.values() if folder.has(plan)]:
        _write_sheet(folder.out, shown, model.config.vq.image_size)
    return Summary(drawn, kept, len(failures) + len(bad))


def _batches(plans: Sequence[Plan], most: int) -> Iterator[list[Plan]]:
    """At most `most` plans at once, all of one seed."""
    seed_of = lambda plan: plan.told["seed"]
    for _, group in itertools.groupby(sorted(plans, key=seed_of), key=seed_of):
        same_seed = list(group)
        yield from (same_seed[i : i + most] for i in range(0, len(same_seed), most))


def _write_sheet(out: Path, plans: Sequence[Plan], size: int) -> None:
    """contact.png: each input, cropped as the model meets it, beside its images; without inputs that are gone since they were drawn."""
    side, rows = min(size, SHEET_SIDE), []
    for plan in plans[:SHEET_ROWS]:
        shown = []
        try:
            if plan.request.input is not None:
                shown.append(("input", resize_center_crop(open_image(plan.request.input), side)))
            for index, file in enumerate(plan.files):
                drawn = open_image(out / file).resize((side, side), PIL.Image.Resampling.LANCZOS)
                shown.append((f"drawn {index}" if len(plan.files) > 1 else "drawn", np.asarray(drawn)))
        except UserError:
            continue
        rows.append(ReportRow(f"{plan.request.name} · {plan.told['instruction']}", "", tuple(shown)))
    title = f"{out.name}: {len(plans)} input(s)" + (f", the first {SHEET_ROWS}" if len(plans) > SHEET_ROWS else "")
    contact_sheet(out / SHEET, rows, title=title, scale=max(1, SHEET_SIDE // side))
