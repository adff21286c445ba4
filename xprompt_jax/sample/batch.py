"""Folder runs: many inputs, one folder of pictures, one line for each; killed and started again, a run goes on.

    OUT/a.png, OUT/sub/b.png   drawn images, named by their inputs' paths below the input folder
    OUT/samples.jsonl          a line for each image: file, input, task, instruction, seed, index, settings, model
    OUT/errors.jsonl           inputs of the last run that could not be used, and why
    OUT/contact.png            the first inputs beside what was drawn from them
    OUT/.sample.lock           while a run draws: its lock, with the names of the images that are being written

An image is on disk before its line is, so that every line of a killed run tells the truth; images without lines, which such a run may
leave, are known by the lock file. No other file is overwritten. An image depends on its prompt, its seed and its index alone, so a run
in pieces draws the images of a run in one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

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

LOCK = ".sample.lock"
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
        if os.path.isdir(path):
            if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(path)):  # Path.resolve raises where a link leads to itself
                raise UserError(f"--out {out} lies inside --inputs {path}, and the next run would draw from it; choose a folder beside it")
            found += [Request(image.relative_to(path).with_suffix("").as_posix(), image) for image in list_images(path)]
        elif path.suffix.lower() == ".jsonl":
            found += _read_manifest(path)
        else:
            found.append(Request(path.stem, path))
    for request in found:
        if request.input is not None and os.path.realpath(request.input.parent) == os.path.realpath(out):
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
        for field in ("input", "task", "name"):
            if not _is_path(row.get(field, "")):
                raise UserError(f"{where}: {field} {json.dumps(row[field])} cannot be a path; correct it")
        seed_of(row.get("seed", 0), f"{where}: seed")
        image, name = path.parent / row["input"], row.get("name")
        if name is not None and not _is_below(name):
            raise UserError(f"{where}: name {name!r} must be a name or path below --out")
        task = path.parent / row["task"] if "task" in row else None
        found.append(Request(PurePosixPath(name or image.stem).as_posix(), image, task, row.get("instruction"), row.get("seed")))
    if not found:
        raise UserError(f'{path}: empty; write one {{"input": "photo.png"}} a line')
    return found


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and _is_path(name)


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
      UserError: `task` is another model's; `out` holds images of other settings or another model, or files that are not of such runs
        and would be overwritten; another run is drawing there, or it cannot be written.
    """
    if task is not None:
        task.check(model)
    settings = {
        "task": task.digest if task else None, "instruction": instruction, "seed": seed, "num_images": num_images, **sampling,
        "precision": model.precision,
    }  # fmt: skip
    with _locked(out) as lock:
        folder = _Folder(out, model.fingerprint, settings, lock, overwrite=overwrite)
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


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A request, what its lines say of it, and its files below the run's folder, one for each image."""

    request: Request
    told: Mapping[str, Any]
    files: tuple[str, ...]
    first: int = 0
    """Index of the first image."""

    def parts(self, most: int) -> list[_Plan]:
        """Itself in plans of at most `most` images."""
        starts = range(0, len(self.files), most)
        return [dataclasses.replace(self, files=self.files[i : i + most], first=i) for i in starts]


def _batches(plans: Sequence[_Plan], most: int) -> Iterator[list[_Plan]]:
    """At most `most` plans at once, all of one seed."""
    seed_of = lambda plan: plan.told["seed"]
    for _, group in itertools.groupby(sorted(plans, key=seed_of), key=seed_of):
        same_seed = list(group)
        yield from (same_seed[i : i + most] for i in range(0, len(same_seed), most))


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[IO[str]]:
    """The lock file of a folder, held. It goes with the run, unless it tells of images that have no lines yet."""
    path = out / LOCK
    busy = UserError(f"{out}: another run is drawing here; wait for its end or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as e:
        raise UserError(f"{out}: cannot write: {e.strerror}; choose another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however it ends
            if not os.path.samefile(path, file.fileno()):
                raise busy
        except (BlockingIOError, FileNotFoundError):  # the latter where a run that has just ended removed it
            raise busy from None
        except OSError:  # a file system without locks
            pass
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


class _Folder:
    """The images of a folder and the lines that tell of them. Nothing is written before `begin`."""

    def __init__(self, out: Path, model: str, settings: Mapping[str, Any], lock: IO[str], *, overwrite: bool):
        self.out, self._model, self._settings, self._lock = out, model, dict(settings), lock
        self._samples, self._errors = out / "samples.jsonl", out / "errors.jsonl"
        self._new = not self._samples.exists()
        records = [] if self._new else self._read()
        ours = {record["file"] for record in records} | self._noted()
        if overwrite:
            records = []
        for record in records:
            self._compare(record)
        self._records = {record["file"]: record for record in records if _is_whole(out / record["file"])}
        self._files = {_key(record): file for file, record in self._records.items()}
        self._owners: dict[str, Any] = {file: key for key, file in self._files.items()} | {SHEET: None}  # an input may be called contact
        self._drawn = set(self._records)
        self._stale = ours - self._drawn

    def begin(self, plans: Iterable[_Plan]) -> None:
        """Removes what a killed run left without lines or damaged, and with `overwrite` all earlier images.

        Raises:
          UserError: files that are not of such runs would be overwritten.
        """
        names = [file for plan in plans for file in plan.files if file not in self._drawn | self._stale]
        for name in [*names, SHEET, self._errors.name] if self._new else names:
            if os.path.lexists(self.out / name):
                raise UserError(f"{self.out}: holds files that are not of `xprompt sample` ({name}); choose another --out")
        for file in self._stale:
            (self.out / file).unlink(missing_ok=True)
        with atomic_path(self._samples) as temporary:  # without what a killed run left half written
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self._records.values()), encoding="utf-8")
        self._errors.unlink(missing_ok=True)
        self._note([])

    def _noted(self) -> set[str]:
        """Names that a killed run was writing."""
        self._lock.seek(0)
        try:
            return {name for name in json.loads(self._lock.read()) if _is_below(name)}
        except (ValueError, TypeError):  # empty, or cut short before the first of them was written
            return set()

    def _note(self, files: Sequence[str]) -> None:
        """Tells a later run what is being written."""
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(json.dumps(files) if files else "")
        self._lock.flush()
        if files:
            os.fsync(self._lock.fileno())

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
                raise UserError(f"{self.out}: its images were drawn with {name} {json.dumps(old.get(name))}, not {json.dumps(value)}; "
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

    def check_names(self, plan: _Plan) -> None:
        """Makes the folders of its images.

        Raises:
          UserError: the file system takes no name of that length.
        """
        for path in (self.out / file for file in plan.files):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.lstat()
            except OSError as e:  # others are told when the image is written
                if e.errno == errno.ENAMETOOLONG:
                    raise UserError(f"{path}: {e.strerror}; give its input a shorter name, or one in a manifest") from None

    def add(self, plans: Sequence[_Plan], images: Sequence[PIL.Image.Image]) -> None:
        """Writes the images of plans, all of the first first, and then their lines."""
        files = [(plan, index, file) for plan in plans for index, file in enumerate(plan.files, plan.first)]
        new = [entry for entry in files if entry[2] not in self._drawn]
        self._note([file for _, _, file in new])
        for (_, _, file), image in zip(files, images, strict=True):
            save_png(image, self.out / file)
        common = {"settings": self._settings, "model": self._model}
        _append(self._samples, [{"file": file, **plan.told, "index": index, **common} for plan, index, file in new])
        self._drawn.update(file for _, _, file in files)
        self._note([])

    def fail(self, request: Request, error: UserError) -> None:
        """Notes a request that cannot be used."""
        log.warning("left out: %s", error)
        _append(self._errors, [{"input": str(request.input or request.instruction), "error": str(error)}])


def _is_whole(path: Path) -> bool:
    """Whether an image lies there, with all its bytes: after a loss of power it may be empty."""
    try:
        with PIL.Image.open(path) as image:
            image.verify()
    except Exception:  # decoders meet damaged files with nearly any
        return False
    return True


def _key(record: Mapping[str, Any]) -> tuple:
    return tuple(record[name] for name in ("input", "task_sha256", "instruction", "seed", "index"))


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def _write_sheet(out: Path, plans: Sequence[_Plan], size: int) -> None:
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
