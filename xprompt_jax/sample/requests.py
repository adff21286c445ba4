"""What a folder run is asked for: images, folders of images and manifests, each with a task."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from xprompt_jax.data.images import list_images
from xprompt_jax.errors import UserError
from xprompt_jax.files import read_json_lines
from xprompt_jax.sample.arguments import seed_of
from xprompt_jax.sample.compiled import CompiledPrompt

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt


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
        if name is not None and not is_below(name):
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


def is_below(name: str) -> bool:
    """Whether a file of this name would lie in the folder that it is taken from."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and _is_path(name)


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
