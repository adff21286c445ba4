"""What a person points us at, as a stream of records: one reader for each physical form of data on disk.

A record is a pair of images with its words. `group` says which pairs can be examples for each other (the same task with
the same parameters); `split` is "train" or "eval". Readers yield paths, not pixels, so that a bad file is met and named
when it is opened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.data.images import list_images, open_image, resize_center_crop
from xprompt_jax.data.readers.folders import partner
from xprompt_jax.data.readers.manifest import Manifest
from xprompt_jax.data.readers.strings import position
from xprompt_jax.data.spellings import ours
from xprompt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Record:
    """A pair of images and what can be said of it."""

    input: Any
    """Whatever `images.open_image` takes."""
    output: Any
    instruction: str
    reverse_instruction: str = ""
    """Empty: the pair is not trained backwards."""
    description: str = ""
    """The difference in words; empty: the pair is not described."""
    reverse_description: str = ""
    task: str = ""
    group: str = ""
    caption: str = ""
    """Of the input image; empty: it is not drawn from text."""
    split: str = "train"
    more_inputs: tuple[Any, ...] = ()
    """Further input images of a task that takes several (try-on, composition); such pairs have no example and are not reversed."""
    exact: bool = False
    """The output's colours stand for numbers: it is resized by the nearest pixel, never mixed."""
    holdout: str = ""
    """Whether the instruction adds or removes an object, as a judge answered: "yes", "no", or "" if nobody was asked."""
    dataset: str = ""
    """Name of the dataset it came from, or ""."""


def held_out(key: str, fraction: float) -> str:
    """ "eval" for a stable `fraction` of all keys, else "train": decided by a hash, so adding data moves nothing."""
    value = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
    return "eval" if value < fraction else "train"


def paired_folders(
    inputs: str | Path, outputs: str | Path, *, task: str, instruction: str, reverse_instruction: str = "",
    rename: tuple[str, str] | None = None, eval_fraction: float = 0.0,
) -> Iterator[Record]:  # fmt: skip
    """Two folders whose files belong together by name.

    Args:
      inputs, outputs: folders; relative paths without extension are matched.
      rename: (pattern, replacement), a regular expression that turns an input's stem into its output's.

    Raises:
      UserError: a folder is missing or empty, an input has no partner, or several that may be meant.
    """
    inputs, outputs = Path(inputs), Path(outputs)
    partners: dict[str, list[str]] = {}
    for path in list_images(outputs):
        partners.setdefault(path.relative_to(outputs).with_suffix("").as_posix(), []).append(path.suffix)
    for path in list_images(inputs):
        stem = path.relative_to(inputs).with_suffix("").as_posix()
        wanted = re.sub(*rename, stem) if rename else stem
        if wanted not in partners:
            raise UserError(f"{path}: no {wanted}.* in {outputs}; complete the folder, or give the renaming rule")
        output = outputs / (wanted + partner(path.suffix, partners[wanted], outputs / wanted))
        yield Record(
            path, output, instruction, reverse_instruction, task=task, group=task,
            split=held_out(f"{task}/{stem}", eval_fraction),
        )  # fmt: skip


class ManifestRecords(Sequence[Record]):
    """What `manifest` reads, by number."""

    def __init__(self, path: str | Path, *, eval_fraction: float = 0.0):
        self._rows, self._eval_fraction = Manifest(path), eval_fraction

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i):
        i = position(i, len(self))
        return manifest_record(self._rows[i], self._rows.path, int(self._rows.lines[i]), self._eval_fraction)


def manifest(path: str | Path, *, eval_fraction: float = 0.0) -> Iterator[Record]:
    """A JSONL file, one pair a line: {"input": ..., "output": ..., "instruction": ...}, and any other field of `Record`.

    OmniGen's and Lumina's rows are read too (data/spellings.py), and one array in place of lines. Paths are relative to the file.

    Raises:
      UserError: naming the file and line of what cannot be used.
    """
    yield from ManifestRecords(path, eval_fraction=eval_fraction)


def manifest_record(row: Mapping[str, Any], path: Path, number: int, eval_fraction: float = 0.0) -> Record:
    """One row of a manifest; raises like `manifest`."""
    try:
        row = ours({name: value for name, value in row.items() if name != "key"})
    except ValueError as e:
        raise UserError(f"{path}, line {number}: {e}; docs/data.md shows the forms that are read") from None
    row = {name: value for name, value in row.items() if value is not None}  # null says nothing
    names = {f.name for f in dataclasses.fields(Record)}
    more = row.get("more_inputs", [])
    if problem := _problem(row, names):
        raise UserError(f"{path}, line {number}: {problem}; fields are {', '.join(sorted(names))}")
    row.setdefault("split", held_out(row["input"], eval_fraction))  # by its name as written: wherever the manifest lies, the same rows
    row["input"], row["output"] = path.parent / row["input"], path.parent / row["output"]
    row["more_inputs"] = tuple(path.parent / name for name in more)
    row.setdefault("group", row.get("task", ""))
    return Record(**row)


def _problem(row: Mapping[str, Any], names: set[str]) -> str:
    """Why a row cannot be a record, "" if it can."""
    for name in ("input", "output", "instruction"):
        if not isinstance(row.get(name), str):
            return f"no text field {name!r}"
    if unknown := sorted(row.keys() - names):
        return f"unknown field {unknown[0]!r}"
    more = row.get("more_inputs", [])
    if not (isinstance(more, list) and all(isinstance(name, str) for name in more)):
        return "'more_inputs' is no list of paths"
    for field in dataclasses.fields(Record):
        kind, value = type(field.default), row.get(field.name)
        if kind in (str, bool) and field.name in row and not isinstance(value, kind):
            return f"{field.name!r} must be {'a text' if kind is str else 'true or false'}, not {value!r:.60}"
    for name, allowed in (("split", ("train", "eval")), ("holdout", ("", "yes", "no"))):
        if row.get(name, allowed[0]) not in allowed:
            return f"{name!r} is {row[name]!r:.60}; it can be {' or '.join(map(repr, allowed))}"
    for name in (row["input"], row["output"], *more):
        try:
            possible = b"\0" not in name.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # half a letter
            possible = False
        if not possible:
            return f"{name!r:.60} can be no file's name"
    return ""


def photographs(folder: str | Path, size: int) -> list[np.ndarray]:
    """All images of a folder as uint8 [size, size, 3] centre crops, for tasks that are made on the fly."""
    return [resize_center_crop(open_image(path), size) for path in list_images(folder)]


def world_pairs(
    *, groups: int, pairs_per_group: int, size: int, seed: int = 0, tasks: Sequence[str] | None = None,
    photos: Sequence[np.ndarray] = (), photo_fraction: float = 0.3, eval_fraction: float = 0.1, zoom: float = 1.0,
    plain: bool = False,
) -> Iterator[Record]:  # fmt: skip
    """Pairs made from rendered scenes and photographs. Every group is one task with parameters of its own.

    Args:
      groups: number of (task, parameters) draws; tasks take turns.
      pairs_per_group: pairs that share them, each on a source image of its own.
      size: pixels.
      tasks: names out of `data.tasks.TASKS`; None takes all.
      photos: uint8 crops; tasks that need no scene use them for `photo_fraction` of their groups.
      eval_fraction: of groups held out: their parameters, scenes and photographs are never trained on.
      zoom: of the camera; see `scene_sources`.
      plain: scenes without patterns.

    Raises:
      UserError: an unknown task.
    """
    from xprompt_jax.data.tasks import TASKS, make_pairs, photo_source, scene_sources

    names = sorted(TASKS) if tasks is None else list(tasks)
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise UserError(f"task {unknown[0]!r} is unknown; tasks are {', '.join(sorted(TASKS))}")
    # Every fifth photograph is kept for held-out groups.
    pools = {"train": [p for i, p in enumerate(photos) if i % 5], "eval": list(photos[::5])}
    for group in range(groups):
        rng = np.random.default_rng([seed, group])
        name = names[group % len(names)]
        task = TASKS[name]
        split = "eval" if group >= groups - round(eval_fraction * groups) else "train"
        if len(pools[split]) >= pairs_per_group and not task.needs_scene and rng.random() < photo_fraction:
            chosen = rng.choice(len(pools[split]), pairs_per_group, replace=False)
            sources = [photo_source(pools[split][i]) for i in chosen]
        else:
            sources = scene_sources(int(rng.integers(2**31)), pairs_per_group, size, zoom=zoom, plain=plain)
        parameters = task.sample_parameters(rng)
        for pair in make_pairs(name, parameters, sources, int(rng.integers(2**31))):
            back = pair.reversed()
            yield Record(
                pair.input, pair.output, pair.instruction, back.instruction, pair.description, back.description, name,
                f"{name}/{seed}/{group}", pair.caption, split,
            )  # fmt: skip
