"""The images of a folder run on disk, and the lines that tell of them.

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
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import PIL.Image

from xprompt_jax.data.images import save_png
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path
from xprompt_jax.sample.requests import Request, Task, is_below

log = logging.getLogger(__name__)

LOCK = ".sample.lock"
SHEET = "contact.png"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request, what its lines say of it, and its files below the run's folder, one for each image."""

    request: Request
    told: Mapping[str, Any]
    files: tuple[str, ...]
    first: int = 0
    """Index of the first image."""

    def parts(self, most: int) -> list[Plan]:
        """Itself in plans of at most `most` images."""
        starts = range(0, len(self.files), most)
        return [dataclasses.replace(self, files=self.files[i : i + most], first=i) for i in starts]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[IO[str]]:
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


class Folder:
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

    def begin(self, plans: Iterable[Plan]) -> None:
        """Removes what a killed run left without lines or damaged, and with `overwrite` all earlier images.

        Raises:
          UserError: files that are not of such runs would be overwritten.
        """
        ours = self._drawn | self._stale
        names = [file for plan in plans for file in plan.files if file not in ours]
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
            return {name for name in json.loads(self._lock.read()) if is_below(name)}
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
                usable = is_below(record["file"]) and isinstance(record["settings"], dict) and "model" in record
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

    def plan(self, request: Request, task: Task | None, instruction: str | None, seed: int, num_images: int) -> Plan:
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
        return Plan(request, told, files)

    def has(self, plan: Plan) -> bool:
        """Whether all its images are there."""
        return self._drawn.issuperset(plan.files)

    def check_names(self, plan: Plan) -> None:
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

    def add(self, plans: Sequence[Plan], images: Sequence[PIL.Image.Image]) -> None:
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
