"""Pictures edited by instruction: UltraEdit, MagicBrush, InstructPix2Pix (paper, Table 6)."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.data.datasets.base import Card, Chosen, Dataset, Layout, Options, Pairs, Part, Rows, files
from xprompt_jax.data.holdouts import addition_or_removal
from xprompt_jax.data.phrases import difference
from xprompt_jax.data.readers import Parquet, Strings
from xprompt_jax.data.readers.strings import position
from xprompt_jax.data.sources import Record
from xprompt_jax.errors import UserError


def _edit(row: Mapping[str, Any], *, group: str, columns: tuple[str, str, str], captions: tuple[str, str] | None = None) -> Record:
    """A row whose columns are (input, output, instruction); captions of the two images make a description."""
    before, after, instruction = (row[name] for name in columns)
    words: dict[str, Any] = {}
    if captions and all(row[name] for name in captions):
        words = difference(*(f"shows {_inside(row[name])}" for name in captions))
    return Record(before, after, str(instruction).strip(), task="edit", group=group, **words)


def _inside(caption: str) -> str:
    """A caption as part of a sentence."""
    return str(caption).strip().rstrip(".")


def _parquet(
    pattern: str, columns: Sequence[str], make: Callable[[Mapping[str, Any]], Record], scene: str = ""
) -> Callable[[Path, Options], Pairs]:
    def open_part(root: Path, options: Options) -> Pairs:
        rows: Sequence[Mapping[str, Any]] = Parquet(files(root, pattern), columns)
        return Rows(_Scenes(rows, scene) if scene else rows, make, options.eval_fraction)

    return open_part


class _Scenes(Sequence[Mapping[str, Any]]):
    """Rows with one of their columns as the scene."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], column: str):
        self._rows, self._column = rows, column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i):
        row = self._rows[i]
        return {**row, "scene": str(row[self._column])}


_ULTRA = ("source_image", "edited_image", "edit_prompt")
_ULTRA_TEXTS = ("source_caption", "target_caption")


def _ultra(pattern: str) -> Callable[[Path, Options], Pairs]:
    make = functools.partial(_edit, group="ultraedit", columns=_ULTRA, captions=_ULTRA_TEXTS)
    return _parquet(pattern, (*_ULTRA, *_ULTRA_TEXTS), make)


ULTRAEDIT = Dataset("ultraedit", Card(
    "UltraEdit: free-form edits of generated pictures", "https://huggingface.co/datasets/BleachNick/UltraEdit_500k", "CC BY 4.0", ("edit",),
    "described by its own captions; reverse instructions come from `xprompt annotate`",
), (
    Layout("UltraEdit_500k", (Part("train", "data/FreeForm-*.parquet", _ultra("data/FreeForm-*.parquet"), 500_000),)),
    Layout("the whole set", (Part("train", "data/FreeForm_*.parquet", _ultra("data/FreeForm_*.parquet")),)),
    Layout("UltraEdit_Region_Based_100k", (Part("train", "data/RegionBase-*.parquet", _ultra("data/RegionBase-*.parquet"), 108_179),)),
), ("UltraEdit_500k", "UltraEdit", "UltraEdit_Region_Based_100k"))  # fmt: skip

# MagicBrush.

_MAGIC = ("source_img", "target_img", "instruction")
_magic = functools.partial(_edit, group="magicbrush", columns=_MAGIC)


class _MagicTest(Sequence[Mapping[str, Any]]):
    """MagicBrush's test turns, from its folder or from the archive with a password.

    The turns stand in edit_turns.json: {"input", "output", "instruction"} with file names <image>-input.png and <image>-output<turn>.png.
    Global captions, if they lie beside, describe both images.
    """

    def __init__(self, place: Path, password: str):
        self._place, self._password = place, password.encode()
        self._archive: zipfile.ZipFile | None = None
        names = self._names()
        turns = next((n for n in names if n.rpartition("/")[2] == "edit_turns.json"), None)
        if turns is None:
            raise UserError(f"{place}: no edit_turns.json in it; give MagicBrush's test archive or its unpacked folder")
        self._folder = turns.rpartition("/")[0]
        captions = next((n for n in names if re.fullmatch(r"global_(captions|descriptions)\.json", n.rpartition("/")[2])), None)
        self._captions = json.loads(self._read(captions)) if captions else {}
        self._turns = json.loads(self._read(turns))

    def _names(self) -> list[str]:
        if self._place.is_dir():
            return [path.name for path in self._place.glob("*.json")]
        return self._zip().namelist()

    def _zip(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self._place)
            except (OSError, zipfile.BadZipFile) as e:
                raise UserError(f"{self._place}: not a whole zip archive ({e}); download it again") from None
        return self._archive

    def _read(self, name: str) -> bytes:
        try:
            return (self._place / name).read_bytes() if self._place.is_dir() else self._zip().read(name, self._password)
        except (OSError, KeyError):
            raise UserError(f"{self._place}: no {name} in it; complete the copy") from None
        except (RuntimeError, zipfile.BadZipFile) as e:
            raise UserError(f"{self._place}: cannot unpack {name} ({e}); give the right --password") from None

    def __len__(self) -> int:
        return len(self._turns)

    def __getitem__(self, i):
        turn = self._turns[position(i, len(self))]
        image = turn["input"].split("-")[0]
        captions = self._captions.get(image, {})
        path = "/".join(part for part in (self._folder, "images", image) if part)
        return {
            "key": turn["output"], "scene": image, "source_img": self._read(f"{path}/{turn['input']}"),
            "target_img": self._read(f"{path}/{turn['output']}"), "instruction": turn["instruction"],
            "before": captions.get(turn["input"], ""), "after": captions.get(turn["output"], ""),
        }  # fmt: skip

    def __getstate__(self):
        return {**self.__dict__, "_archive": None}


def _magic_test(root: Path, options: Options) -> Pairs:
    folder = root / "test"
    place = folder if folder.is_dir() else files(root, "*.zip")[0]
    return Rows(
        _MagicTest(place, options.password), functools.partial(_edit, group="magicbrush", columns=_MAGIC, captions=("before", "after"))
    )


_MAGIC_TRAIN = tuple(
    Part(split, f"data/{split}-*.parquet", _parquet(f"data/{split}-*.parquet", ("img_id", *_MAGIC), _magic, "img_id"), count)
    for split, count in (("train", 8807), ("dev", 528))
)
MAGICBRUSH = Dataset("magicbrush", Card(
    "MagicBrush: edits of photographs by hand, in turns", "https://huggingface.co/datasets/osunlp/MagicBrush", "CC BY 4.0", ("edit",),
    "the test split is an archive with a password, linked at https://github.com/OSU-NLP-Group/MagicBrush: lay it, or its folder test/, "
    "beside data/; do not redistribute it",
), (
    Layout("parquet, test unpacked", (*_MAGIC_TRAIN, Part("test", "test/edit_turns.json", _magic_test, 1053))),
    Layout("parquet, test as archive", (*_MAGIC_TRAIN, Part("test", "*.zip", _magic_test, 1053))),
), ("MagicBrush",), ("password",))  # fmt: skip

# InstructPix2Pix.


class _Seeds(Sequence[Mapping[str, Any]]):
    """Pairs of clip-filtered-dataset: a folder for each prompt, with pairs by seed. seeds.json lists both, [[folder, [seed, ...]], ...]."""

    def __init__(self, root: Path, share: tuple[float, float]):
        self._root = root
        try:
            listed = json.loads((root / "seeds.json").read_text())
        except (OSError, ValueError) as e:
            raise UserError(f"{root / 'seeds.json'}: not readable ({e}); download it again") from None
        first, last = (int(len(listed) * part) for part in share)
        self.prompts = last - first
        self._names = Strings(f"{folder}/{seed}" for folder, seeds in listed[first:last] for seed in seeds)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i):
        name = self._names[position(i, len(self))]
        folder, _, seed = name.rpartition("/")
        try:
            prompt = json.loads((self._root / folder / "prompt.json").read_text())
            words = {"edit": prompt["edit"], "caption": prompt["input"], "edited": prompt["output"]}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{self._root / folder / 'prompt.json'}: no prompt with input, edit and output ({e}); complete the copy"
            ) from None
        images = {side: self._root / folder / f"{seed}_{number}.jpg" for number, side in enumerate(("before", "after"))}
        return {"key": name, "scene": folder, **images, **words}


def _seeds(*share: float) -> Callable[[Path, Options], Pairs]:
    make = functools.partial(_edit, group="instructpix2pix", columns=("before", "after", "edit"), captions=("caption", "edited"))

    def open_part(root: Path, options: Options) -> Pairs:
        rows = _Seeds(root, (share[0], share[1]))
        return Rows(rows, make, counted=rows.prompts)

    return open_part


def _share(first: float, last: float) -> tuple[int, ...]:
    """Prompts of a split, for the filtered and for the random release."""
    return tuple(int(total * last) - int(total * first) for total in (313_010, 451_990))


def table_4(pairs: Pairs, count: int = 100) -> tuple[Pairs, list[tuple[int, str, str]]]:
    """Object additions and removals as in Table 4: the first `count` instructions of each in the order of their hash, one pair of each.

    The paper's hand-picked ids are not public; these are told by the keyword rule (`holdouts.addition_or_removal`).

    Returns:
      the pairs, and (number, "add" or "remove", instruction) of each, to publish beside a score.
    """
    found: dict[str, tuple[str, int, str, str]] = {}
    for i in range(len(pairs)):
        instruction = pairs[i].instruction
        kind = addition_or_removal(instruction)
        if kind and instruction not in found:
            found[instruction] = hashlib.sha256(instruction.encode()).hexdigest(), i, kind, instruction
    chosen = [row for kind in ("add", "remove") for row in sorted(r for r in found.values() if r[2] == kind)[:count]]
    return Chosen(pairs, np.array([i for _, i, _, _ in chosen], np.int64)), [(i, kind, text) for _, i, kind, text in chosen]


_IP2P_COLUMNS = ("original_image", "edited_image", "edit_prompt")
_IP2P_TEXTS = ("original_prompt", "edited_prompt")
INSTRUCTPIX2PIX = Dataset("instructpix2pix", Card(
    "InstructPix2Pix: edits of generated pictures", "https://github.com/timothybrooks/instruct-pix2pix",
    "research; images by Stable Diffusion",
    ("edit",), "split 90/5/5 by position in seeds.json; prompts are counted; Table 4's additions and removals come from its test split",
), (
    Layout("folders with seeds.json", (
        Part("train", "seeds.json", _seeds(0, 0.9), _share(0, 0.9)), Part("val", "seeds.json", _seeds(0.9, 0.95), _share(0.9, 0.95)),
        Part("test", "seeds.json", _seeds(0.95, 1), _share(0.95, 1)),
    )),
    Layout("parquet", (Part("train", "data/train-*.parquet", _parquet(
        "data/train-*.parquet", (*_IP2P_COLUMNS, *_IP2P_TEXTS),
        functools.partial(_edit, group="instructpix2pix", columns=_IP2P_COLUMNS, captions=_IP2P_TEXTS)), 313_010),)),
), ("clip-filtered-dataset",))  # fmt: skip

DATASETS = (ULTRAEDIT, MAGICBRUSH, INSTRUCTPIX2PIX)
