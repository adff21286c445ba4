"""Folder runs: many inputs, one folder of pictures, one line for each; killed and started again, a run goes on.

    OUT/a.png, OUT/sub/b.png   drawn images, named by their inputs' paths below the input folder
    OUT/samples.jsonl          a line for each image: file, input, task, instruction, seed, index, settings, model
    OUT/errors.jsonl           inputs of the last run that could not be used, and why
    OUT/contact.png            the first inputs beside what was drawn from them

An image is on disk before its line is, so that every line of a killed run tells the truth. An image depends on its prompt, its seed
and its index alone, so a run in pieces draws the images of a run in one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from tqdm import tqdm

from xprompt_jax.data.images import list_images, open_image, resize_center_crop, save_png
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.report import ReportRow, contact_sheet
from xprompt_jax.files import atomic_path, read_json_lines
from xprompt_jax.sample.arguments import seed_of
from xprompt_jax.sample.compiled import CompiledPrompt

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

log = logging.getLogger(__name__)

SHEET = "contact.png"
SHEET_ROWS = 40
"""Inputs on the contact sheet."""
SHEET_SIDE = 128
"""Pixels of an image's side there."""
PROMPTS = 64
"""Compiled prompts that are kept in memory; one of a 7B model takes some 30 MB."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One input to work on, or one text to draw."""

    name: str
    """Of its images, without suffix; may have folders in it."""
    input: Path | None
    """None draws `instruction`."""
    task: Path | None = None
    """A compiled prompt of its own."""
    instruction: str | None = None
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A compiled prompt and where it comes from."""

    prompt: CompiledPrompt
    name: str
    digest: str
    """16 hex digits over the files it was made of."""

    @classmethod
    def load(cls, path: Path) -> Task:
        """Reads a compiled prompt.

        Raises:
          UserError: as `CompiledPrompt.load`.
        """
        return cls(CompiledPrompt.load(path), str(path), _digest([path]))

    @classmethod
    def of_examples(cls, model: XPrompt, paths: Sequence[Path], instruction: str) -> Task:
        """Compiles pairs of image files: before, after, before, after, ...

        Raises:
          UserError: an image cannot be read.
        """
        from xprompt_jax.sample.sampler import Example

        pairs = [Example(a, b, instruction) for a, b in zip(paths[::2], paths[1::2], strict=True)]
        return cls(model.compile(pairs), ", ".join(f"{p.input} -> {p.output}" for p in pairs), _digest(paths))

    def check(self, model: XPrompt) -> Task:
        """Itself.

        Raises:
          UserError: another model made it; names the file.
        """
        try:
            self.prompt.check(model)
        except UserError as e:
            raise UserError(f"{self.name}: {e}") from None
        return self


def find_requests(inputs: Sequence[Path], out: Path) -> list[Request]:
    """Images, folders of images and manifests -> what is to be drawn, in order.

    A manifest is a .jsonl file with a line {"input": path} for each request, and perhaps "instruction", "task" (a compiled prompt), "seed"
    and "name". Its paths are relative to it. Images are not opened.

    Raises:
      UserError: a folder without images, a line that cannot be used, or `out` among the inputs.
    """
    found: list[Request] = []
    for path in inputs:
        if path.is_dir():
            if out.resolve().is_relative_to(path.resolve()):
                raise UserError(f"--out {out} lies inside --inputs {path}, and the next run would draw from it; choose a folder beside it")
            found += [Request(image.relative_to(path).with_suffix("").as_posix(), image) for image in list_images(path)]
        elif path.suffix.lower() == ".jsonl":
            found += _read_manifest(path)
        else:
            found.append(Request(path.stem, path))
    for request in found:
        if request.input is not None and request.input.parent.resolve() == out.resolve():
            raise UserError(f"--out {out} is the folder of {request.input}, which might be overwritten; choose another folder")
    return found


_MANIFEST: Mapping[str, type] = {"input": str, "instruction": str, "task": str, "seed": int, "name": str}


def _read_manifest(path: Path) -> list[Request]:
    found = []
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        for field, value in row.items():
            if field not in _MANIFEST:
                raise UserError(f"{where}: unknown field {field!r}; fields are {', '.join(_MANIFEST)}")
            if type(value) is not _MANIFEST[field]:
                raise UserError(f"{where}: {field} must be {'a whole number' if field == 'seed' else 'a text'}, not {json.dumps(value)}")
        if "input" not in row:
            raise UserError(f'{where}: no input; write {{"input": "photo.png"}}')
        seed_of(row.get("seed", 0), f"{where}: seed")
        image, name = path.parent / row["input"], row.get("name")
        if name is not None and not _is_below(name):
            raise UserError(f"{where}: name {name!r} must be a name or path below --out")
        task = path.parent / row["task"] if "task" in row else None
        found.append(Request(name or image.stem, image, task, row.get("instruction"), row.get("seed")))
    if not found:
        raise UserError(f'{path}: empty; write one {{"input": "photo.png"}} a line')
    return found


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


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
      UserError: `task` is another model's, `out` holds images of other settings or another model, or cannot be written.
    """
    from xprompt_jax.sample.draw import MAX_BATCH, check_prompt

    if task is not None:
        task.check(model)
    settings = {
        "task": task.digest if task else None, "instruction": instruction, "seed": seed, "num_images": num_images, **sampling,
        "precision": model.precision,
    }  # fmt: skip
    folder = _Folder(out, model.fingerprint, settings, overwrite=overwrite)
    load = functools.lru_cache(maxsize=PROMPTS)(Task.load)

    def task_of(request: Request) -> Task | None:
        return task if request.task is None else load(request.task).check(model)

    plans, failed = {}, 0
    for request in requests:
        try:
            plan = folder.plan(request, task_of(request), instruction, seed, num_images)
            plans[plan.files] = plan  # what is asked for twice is drawn once
        except UserError as e:
            failed += 1
            folder.fail(request, e)
    todo = [plan for plan in plans.values() if not folder.has(plan)]
    kept, drawn = num_images * (len(plans) - len(todo)), 0
    if kept:
        log.info("%s: %d image(s) drawn before, %d to draw", out, kept, num_images * len(todo))
    with tqdm(total=num_images * len(todo), unit="image", desc="drawing", disable=not progress) as bar:
        for batch in _batches(todo, max(1, MAX_BATCH // num_images)):
            ready, codes = [], []
            for plan in batch:
                try:
                    found = [] if plan.request.input is None else [model.encode_images([plan.request.input])[0]]
                    check_prompt(model, plan.told["instruction"], *found, window=sampling["window"])
                    ready.append(plan)
                    codes += found
                except UserError as e:
                    failed += 1
                    folder.fail(plan.request, e)
                    bar.total -= num_images
            if not ready:
                continue
            options = {"seed": ready[0].told["seed"], "num_images": num_images, **sampling}
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
        _write_sheet(out, shown, model.config.vq.image_size)
    return Summary(drawn, kept, failed)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A request, what its lines say of it, and its files below the run's folder, one for each image."""

    request: Request
    told: Mapping[str, Any]
    files: tuple[str, ...]


def _batches(plans: Sequence[_Plan], most: int) -> Iterator[list[_Plan]]:
    """At most `most` plans at once, all of one seed."""
    seed_of = lambda plan: plan.told["seed"]
    for _, group in itertools.groupby(sorted(plans, key=seed_of), key=seed_of):
        same_seed = list(group)
        yield from (same_seed[i : i + most] for i in range(0, len(same_seed), most))


class _Folder:
    """The images of a folder and the lines that tell of them."""

    def __init__(self, out: Path, model: str, settings: Mapping[str, Any], *, overwrite: bool):
        self._out, self._model, self._settings = out, model, dict(settings)
        self._samples, self._errors = out / "samples.jsonl", out / "errors.jsonl"
        records = self._read() if self._samples.exists() else []
        if overwrite:
            for record in records:
                (out / record["file"]).unlink(missing_ok=True)
            records = []
        for record in records:
            self._compare(record)
        drawn = {record["file"]: record for record in records if (out / record["file"]).is_file()}
        self._files = {_key(record): file for file, record in drawn.items()}
        self._owners: dict[str, Any] = {file: key for key, file in self._files.items()} | {SHEET: None}  # an input may be called contact
        self._drawn = set(drawn)
        with atomic_path(self._samples) as temporary:  # without what a killed run left half written
            temporary.write_text("".join(json.dumps(record) + "\n" for record in drawn.values()), encoding="utf-8")
        self._errors.unlink(missing_ok=True)

    def _read(self) -> list[dict[str, Any]]:
        records = []
        lines = self._samples.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines[:-1], 1):  # what has no end of line was cut short
            try:
                record = json.loads(line)
                hash(_key(record))  # all fields are there, and none is a list
                usable = _is_below(record["file"]) and isinstance(record["settings"], dict) and "model" in record
            except (ValueError, KeyError, TypeError):
                usable = False
            if not usable:
                raise UserError(f"{self._samples}, line {number}: not a line of `xprompt sample`; choose another --out")
            records.append(record)
        return records

    def _compare(self, record: Mapping[str, Any]) -> None:
        """Refuses to mix images of different settings in one folder."""
        old = {**record["settings"], "model": record["model"]}
        for name, value in {**self._settings, "model": self._model}.items():
            if old.get(name) != value:
                raise UserError(f"{self._out}: its images were drawn with {name} {json.dumps(old.get(name))}, not {json.dumps(value)}; "
                                "choose another --out, or give --overwrite to draw them again")  # fmt: skip

    def plan(self, request: Request, task: Task | None, instruction: str | None, seed: int, num_images: int) -> _Plan:
        """Settles what a request's images depend on, and their names; what was drawn before keeps its names."""
        if request.input is not None and task is None:
            raise UserError(f"{request.input}: no task says what to do to it; give one to the run or to the request")
        text = request.instruction if request.instruction is not None else instruction
        told = {
            "input": os.path.abspath(request.input) if request.input else None, "task": task.name if task else None,
            "task_sha256": task.digest if task else None, "instruction": task.prompt.instruction if task and text is None else text,
            "seed": seed if request.seed is None else request.seed,
        }  # fmt: skip
        keys = [_key({**told, "index": index}) for index in range(num_images)]
        for name in itertools.chain([request.name], (f"{request.name}-{again}" for again in itertools.count(2))):
            parts = [f"-{index}" if num_images > 1 else "" for index in range(num_images)]
            files = tuple(self._files.get(key, f"{name}{part}.png") for key, part in zip(keys, parts, strict=True))
            if all(self._owners.get(file, key) == key for file, key in zip(files, keys, strict=True)):
                break
        self._owners.update(zip(files, keys, strict=True))
        return _Plan(request, told, files)

    def has(self, plan: _Plan) -> bool:
        """Whether all its images are there."""
        return self._drawn.issuperset(plan.files)

    def add(self, plans: Sequence[_Plan], images: Sequence[PIL.Image.Image]) -> None:
        """Writes the images of plans, all of the first first, and then their lines."""
        files = [(plan, index, file) for plan in plans for index, file in enumerate(plan.files)]
        for (_, _, file), image in zip(files, images, strict=True):
            save_png(image, self._out / file)
        common = {"settings": self._settings, "model": self._model}
        new = [entry for entry in files if entry[2] not in self._drawn]
        _append(self._samples, [{"file": file, **plan.told, "index": index, **common} for plan, index, file in new])
        self._drawn.update(file for _, _, file in files)

    def fail(self, request: Request, error: UserError) -> None:
        """Notes a request that cannot be used."""
        log.warning("left out: %s", error)
        _append(self._errors, [{"input": str(request.input or request.instruction), "error": str(error)}])


def _key(record: Mapping[str, Any]) -> tuple:
    return tuple(record[name] for name in ("input", "task_sha256", "instruction", "seed", "index"))


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _write_sheet(out: Path, plans: Sequence[_Plan], size: int) -> None:
    """contact.png: each input, cropped as the model meets it, beside its images."""
    side, rows = min(size, SHEET_SIDE), []
    for plan in plans[:SHEET_ROWS]:
        shown = []
        if plan.request.input is not None:
            shown.append(("input", resize_center_crop(open_image(plan.request.input), side)))
        for index, file in enumerate(plan.files):
            drawn = PIL.Image.open(out / file).convert("RGB").resize((side, side), PIL.Image.Resampling.LANCZOS)
            shown.append((f"drawn {index}" if len(plan.files) > 1 else "drawn", np.asarray(drawn)))
        rows.append(ReportRow(f"{plan.request.name} · {plan.told['instruction']}", "", tuple(shown)))
    title = f"{out.name}: {len(plans)} input(s)" + (f", the first {SHEET_ROWS}" if len(plans) > SHEET_ROWS else "")
    contact_sheet(out / SHEET, rows, title=title, scale=max(1, SHEET_SIDE // side))
