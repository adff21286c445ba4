"""The token store: every image turned into codes once, and the tables that refer to them.

    store/
      store.json     format, grid, image size, recipe, fingerprint of the VQGAN, counts
      codes.npy      uint16 [images, rows, columns], memory-mapped: an image is 2 KB
      pairs.jsonl    one pair a line: record numbers of its images, texts, task, group, split
      holdouts.jsonl edits alone: whether they add or remove an object, by our keyword rule and by a judge who was asked
      tokenizers/    the VQGAN that made the codes, and the text tokenizer that goes with it

Images are content-addressed: one that serves as input, output, example and query, forwards and backwards, is encoded and
stored once. Reversing and describing cost no storage at all; the pipeline composes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from tqdm import tqdm

from xprompt_jax.convert.native import save_tokenizers
from xprompt_jax.data.holdouts import EDITS, addition_or_removal
from xprompt_jax.data.images import Recipe, open_image, resize_center_crop, to_pixels
from xprompt_jax.data.sources import Record
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path
from xprompt_jax.model.params import flatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.tokens import Tokenizer

FORMAT = "xprompt-tokens-1"


@dataclasses.dataclass(frozen=True)
class Pair:
    """One line of pairs.jsonl; `input` and `output` are rows of codes.npy."""

    input: int
    output: int
    instruction: str
    reverse_instruction: str
    description: str
    reverse_description: str
    task: str
    group: str
    caption: str
    split: str
    more_inputs: tuple[int, ...] = ()
    holdout: str = ""


@dataclasses.dataclass(frozen=True)
class Store:
    """A token store, opened."""

    codes: np.ndarray
    """uint16 [images, rows, columns]."""
    pairs: tuple[Pair, ...]
    vqgan: str
    """Fingerprint of the VQGAN that made the codes."""

    @classmethod
    def open(cls, folder: str | Path, *, vqgan: VQGAN | None = None) -> Store:
        """Opens a store; with a VQGAN, refuses codes that another one made.

        Raises:
          UserError: no store, an older format, a missing file, or another VQGAN's codes.
        """
        folder = Path(folder)
        try:
            header = json.loads((folder / "store.json").read_text())
            lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").split("\n")[:-1]  # JSON may hold other ends of lines
            codes = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as e:
            raise UserError(f"{folder}: not a complete token store ({e}); make it with `xprompt tokenize`") from None
        if header.get("format") != FORMAT or len(lines) != header["pairs"] or len(codes) != header["images"]:
            raise UserError(f"{folder}: not a token store of format {FORMAT}, or damaged; make it again with `xprompt tokenize`")
        if vqgan is not None and vqgan_fingerprint(vqgan) != header["vqgan"]:
            raise UserError(f"{folder}: made by another image tokenizer ({header['vqgan']}); tokenize again with this model")
        return cls(codes, tuple(_pair(json.loads(line)) for line in lines), header["vqgan"])


def _pair(row: dict[str, Any]) -> Pair:
    return Pair(**{**row, "more_inputs": tuple(row.get("more_inputs", ()))})


def vqgan_fingerprint(vqgan: VQGAN) -> str:
    """16 hex digits of SHA-256 over all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten(vqgan).items()):
        digest.update(name.encode() + np.asarray(value).tobytes())
    return digest.hexdigest()[:16]


def tokenize(
    records: Iterable[Record], vqgan: VQGAN, tokenizer: Tokenizer, out: str | Path,
    *, batch: int = 32, recipe: Recipe = "meta", total: int | None = None, progress: bool = True,
) -> Store:  # fmt: skip
    """Encodes all images of `records` into a store, which appears whole or not at all.

    Args:
      records: pairs; images are resized and centre-cropped to the VQGAN's size.
      vqgan: the image tokenizer.
      tokenizer: the text tokenizer; texts are stored as text, and it only travels along.
      out: folder; an existing store there is replaced.
      batch: images encoded at once.
      recipe: of preprocessing, Meta's or Hugging Face's (data/images.py); sampling must use the same.
      total: number of records, for the progress bar.

    Raises:
      UserError: an image cannot be read, there are no records, or the folder cannot be written.
    """
    size, known = vqgan.config.image_size, dict[bytes, int]()
    encode = jax.jit(lambda model, pixels: model.encode(pixels))
    waiting: list[np.ndarray] = []

    def flush(codes: Codes) -> None:
        if waiting:
            pixels = np.stack(waiting + [waiting[-1]] * (batch - len(waiting)))
            codes.append(np.asarray(encode(vqgan, to_pixels(pixels, recipe)))[: len(waiting)].astype(np.uint16))
            waiting.clear()

    def number(codes: Codes, image: Any, exact: bool = False) -> int:
        pixels = resize_center_crop(open_image(image, recipe), size, recipe, exact=exact)
        key = hashlib.sha256(pixels.tobytes()).digest()
        if key not in known:
            known[key] = len(known)
            waiting.append(pixels)
            if len(waiting) == batch:
                flush(codes)
        return known[key]

    fingerprint = vqgan_fingerprint(vqgan)
    with atomic_path(out) as temporary:
        temporary.mkdir()
        count = 0
        with (
            Codes(temporary / "codes.npy", vqgan.config.grid) as codes,
            (temporary / "pairs.jsonl").open("w", encoding="utf-8") as f,
            (temporary / "holdouts.jsonl").open("w", encoding="utf-8") as judged,
        ):
            for record in tqdm(records, total=total, unit="pair", desc="tokenizing", disable=not progress):
                fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(Pair)}
                images = {
                    "input": number(codes, record.input),
                    "output": number(codes, record.output, record.exact),
                    "more_inputs": tuple(number(codes, image) for image in record.more_inputs),
                }
                f.write(json.dumps(dataclasses.asdict(Pair(**fields | images)), ensure_ascii=False) + "\n")
                if record.task == EDITS:
                    said = {"keyword": addition_or_removal(record.instruction), "judge": record.holdout}
                    judged.write(json.dumps({"pair": count, **said, "instruction": record.instruction}, ensure_ascii=False) + "\n")
                count += 1
            flush(codes)
        if not count:
            raise UserError(f"{out}: nothing to tokenize: the source has no pairs")
        header = {
            "format": FORMAT, "vqgan": fingerprint, "recipe": recipe, "image_size": size, "grid": vqgan.config.grid,
            "images": len(known), "pairs": count,
        }  # fmt: skip
        save_tokenizers(temporary / "tokenizers", vqgan, tokenizer)
        (temporary / "store.json").write_text(json.dumps(header, indent=2))
    return Store.open(out)


def merge(stores: Sequence[str | Path], out: str | Path) -> Store:
    """Puts finished stores together, pairs one after the other; an image that several hold is kept once for each.

    Raises:
      UserError: not stores, not of one image tokenizer and recipe, or the folder cannot be written.
    """
    folders = [Path(folder) for folder in stores]
    opened = [Store.open(folder) for folder in folders]
    headers = [json.loads((folder / "store.json").read_text()) for folder in folders]
    for folder, header in zip(folders, headers, strict=True):
        for field in ("vqgan", "recipe", "grid"):
            if header[field] != headers[0][field]:
                raise UserError(
                    f"{folder}: {field} {header[field]}, but {folders[0]} has {headers[0][field]}; tokenize both with one model"
                )
    with atomic_path(out) as temporary:
        shutil.copytree(folders[0] / "tokenizers", temporary / "tokenizers")
        images = pairs = 0
        with (
            Codes(temporary / "codes.npy", headers[0]["grid"]) as codes,
            (temporary / "pairs.jsonl").open("w", encoding="utf-8") as lines,
            (temporary / "holdouts.jsonl").open("w", encoding="utf-8") as judged,
        ):
            for folder, store in zip(folders, opened, strict=True):
                for first in range(0, len(store.codes), 4096):
                    codes.append(store.codes[first : first + 4096])
                for pair in store.pairs:
                    row = dataclasses.asdict(pair)
                    row |= {side: row[side] + images for side in ("input", "output")}
                    row["more_inputs"] = [image + images for image in pair.more_inputs]
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                if (folder / "holdouts.jsonl").exists():
                    for line in (folder / "holdouts.jsonl").open():
                        row = json.loads(line)
                        judged.write(json.dumps({**row, "pair": row["pair"] + pairs}, ensure_ascii=False) + "\n")
                images, pairs = images + len(store.codes), pairs + len(store.pairs)
        (temporary / "store.json").write_text(json.dumps({**headers[0], "images": images, "pairs": pairs}, indent=2))
    return Store.open(out)


class Codes:
    """codes.npy, written as it grows: uint16 [images, grid, grid]; memory does not grow with it."""

    def __init__(self, path: Path, grid: int):
        self._path, self._grid, self._count = path, grid, 0

    def __enter__(self) -> Codes:
        self._file: BinaryIO = self._path.open("w+b")
        self._head()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.seek(0)
        self._head()  # NumPy leaves room in the header for a first axis that grows
        self._file.close()

    def _head(self) -> None:
        header = {"descr": "<u2", "fortran_order": False, "shape": (self._count, self._grid, self._grid)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, codes: np.ndarray) -> None:
        """Adds images, uint16 [n, grid, grid]."""
        self._file.write(np.ascontiguousarray(codes, "<u2").tobytes())
        self._count += len(codes)
