"""The token store: every image turned into codes once, and the table of pairs that refer to them.

    store/
      store.json          format, VQGAN, text tokenizer, recipe, crops, sizes, counts, and the files with their lengths
      images-*-of-*.array_record   codes of the images, uint16 [crops, rows, columns] each (data/shards.py)
      addresses.npy       uint8 [images, 32]: what each image is: a hash of its centre, then of its other crops
      pairs.arrow         one row a pair: numbers of its images, texts and their lengths, task, group, split, ...; mapped (data/table.py)
      holdouts.jsonl      edits alone: whether they add or remove an object, by our keyword rule and by a judge who was asked
      skipped.jsonl       what could not be read
      tokenizers/         the VQGAN that made the codes, and the text tokenizer that counted the texts

Images are content-addressed: one that serves as input, output, example and query, forwards and backwards, is encoded and
stored once. Reversing and describing cost no storage at all; the pipeline composes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from xprompt_jax.data.holdouts import EDITS, addition_or_removal
from xprompt_jax.data.images import Recipe
from xprompt_jax.data.shards import Codes, ShardWriter
from xprompt_jax.data.table import CATEGORIES, NAMED, PLAIN, ROWS, Pairs
from xprompt_jax.errors import UserError

if TYPE_CHECKING:
    from xprompt_jax.model.vqgan import VQGAN

FORMAT = "xprompt-tokens-2"
ADDRESS_BYTES = 32


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How images became codes and texts were counted. Stores that differ in it are never mixed."""

    vqgan: str
    """Fingerprint of the VQGAN."""
    tokenizer: str
    """Fingerprint of the text tokenizer."""
    recipe: Recipe
    """Preprocessing (data/images.py)."""
    crops: int
    """Of every image; the first is the centre."""
    image_size: int
    """Pixels of a side."""
    grid: int
    """Codes of a side."""


@dataclasses.dataclass(frozen=True)
class Store:
    """A token store, opened. It travels to other processes."""

    folder: Path
    codes: Codes
    pairs: Pairs
    encoding: Encoding

    @property
    def vqgan(self) -> str:
        """Fingerprint of the VQGAN that made the codes."""
        return self.encoding.vqgan

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the text tokenizer that counted the texts' tokens."""
        return self.encoding.tokenizer

    @classmethod
    def open(cls, folder: str | Path, *, vqgan: VQGAN | None = None) -> Store:
        """Opens a store; with a VQGAN, refuses codes that another one made.

        Raises:
          UserError: no store, an older format, a file that is missing or cut short, or another VQGAN's codes.
        """
        folder = Path(folder)
        header = read_header(folder)
        for name, length in header["bytes"].items():
            try:
                there = (folder / name).stat().st_size
            except OSError as e:
                raise UserError(f"{folder / name}: {e.strerror}; copy the store again, or make it with `xprompt tokenize`") from None
            if there != length:
                raise UserError(f"{folder / name}: {there} bytes, not {length}: cut short or changed; copy the store again")
        encoding = Encoding(**{f.name: header[f.name] for f in dataclasses.fields(Encoding)})
        if vqgan is not None and vqgan_fingerprint(vqgan) != encoding.vqgan:
            raise UserError(f"{folder}: made by another image tokenizer ({encoding.vqgan}); tokenize again with this model")
        codes = Codes(folder, [(s["file"], s["images"]) for s in header["shards"]], encoding.crops, encoding.grid)
        return cls(folder, codes, Pairs(folder / "pairs.arrow"), encoding)

    def addresses(self) -> np.ndarray:
        """uint8 [images, 32]: equal ones are the same pictures in the same crops."""
        return np.load(self.folder / "addresses.npy", allow_pickle=False)

    def pictures(self) -> np.ndarray:
        """int32 [images]: equal for images that are one picture, in whatever crops it is stored."""
        centres = np.ascontiguousarray(self.addresses()[:, : ADDRESS_BYTES // 2]).view(f"V{ADDRESS_BYTES // 2}")[:, 0]
        return np.unique(centres, return_inverse=True)[1].astype(np.int32)


def read_header(folder: Path) -> dict[str, Any]:
    """store.json.

    Raises:
      UserError: it is missing, damaged or of another format.
    """
    try:
        header = json.loads((folder / "store.json").read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: not a complete token store ({e}); make it with `xprompt tokenize`") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise UserError(f"{folder}: not a token store of format {FORMAT}, but {found}; make it again with `xprompt tokenize`")
    return header


def vqgan_fingerprint(vqgan: VQGAN) -> str:
    """16 hex digits of SHA-256 over all weights."""
    from xprompt_jax.model.params import flatten

    digest = hashlib.sha256()
    for name, value in sorted(flatten(vqgan).items()):
        digest.update(name.encode() + np.asarray(value).tobytes())
    return digest.hexdigest()[:16]


class StoreWriter:
    """Writes the files of a store into an empty folder, all but tokenizers/.

    Args:
      folder: a folder that exists.
      encoding: of all images.
      images: how many there will be.
      names: of each of `CATEGORIES`, what its numbers mean.
    """

    def __init__(self, folder: Path, encoding: Encoding, *, images: int, names: Mapping[str, Sequence[str]]):
        self._folder, self._encoding = folder, encoding
        self._shards = ShardWriter(folder, images)
        self._addresses = (folder / "addresses.npy").open("wb")
        shape = {"descr": "|u1", "fortran_order": False, "shape": (images, ADDRESS_BYTES)}
        np.lib.format.write_array_header_1_0(self._addresses, shape)
        self._images = 0
        self._names = {name: pa.array(list(names[name]), pa.string()) for name in CATEGORIES}
        self._file = pa.ipc.new_file(str(folder / "pairs.arrow"), NAMED)
        self._judged = (folder / "holdouts.jsonl").open("w", encoding="utf-8")
        self._skipped = (folder / "skipped.jsonl").open("w", encoding="utf-8", errors="backslashreplace")
        self._edits = list(names["task"]).index(EDITS) if EDITS in names["task"] else -1
        self._waiting: list[pa.RecordBatch] = []
        self._pairs = self._num_skipped = 0

    def add_image(self, record: bytes, address: bytes) -> None:
        """Adds one image: the bytes of uint16 [crops, rows, columns], and its address of 32 bytes."""
        self._shards.write(record)
        self._addresses.write(address)
        self._images += 1

    def add_pairs(self, columns: Mapping[str, Any]) -> None:
        """Adds pairs, in any portions.

        Args:
          columns: a sequence or array for each column of pairs.arrow; of categories, int32 numbers into `names`.
        """
        batch = pa.RecordBatch.from_arrays([_array(columns[f.name], f.type) for f in PLAIN], schema=PLAIN)
        self._waiting.append(batch)
        while sum(batch.num_rows for batch in self._waiting) >= ROWS:
            self._write(ROWS)

    def _write(self, rows: int) -> None:
        table = pa.Table.from_batches(self._waiting)
        (batch,) = table.slice(0, rows).combine_chunks().to_batches()
        self._waiting = table.slice(rows).to_batches()
        named = [
            pa.DictionaryArray.from_arrays(batch.column(name), self._names[name]) if name in CATEGORIES else batch.column(name)
            for name in PLAIN.names
        ]
        self._file.write_batch(pa.RecordBatch.from_arrays(named, schema=NAMED))
        for i in np.flatnonzero(batch.column("task").to_numpy() == self._edits):
            instruction = batch.column("instruction")[i].as_py()
            judge = self._names["holdout"][batch.column("holdout")[i].as_py()].as_py()
            said = {"keyword": addition_or_removal(instruction), "judge": judge, "instruction": instruction}
            self._judged.write(json.dumps({"pair": self._pairs + int(i), **said}, ensure_ascii=False) + "\n")
        self._pairs += rows

    def add_skipped(self, row: Mapping[str, Any]) -> None:
        """Adds what is to be said of a pair that could not be read."""
        self._skipped.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._num_skipped += 1

    def finish(self) -> None:
        """Completes the files and writes store.json, without which there is no store."""
        if rest := sum(batch.num_rows for batch in self._waiting):
            self._write(rest)
        self._file.close()
        for part in (self._judged, self._skipped, self._addresses, self._shards):
            part.close()
        names = ["pairs.arrow", "addresses.npy", *(name for name, _ in self._shards.shards)]
        with (self._folder / "pairs.arrow").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        header = {
            "format": FORMAT, **dataclasses.asdict(self._encoding), "images": self._images, "pairs": self._pairs,
            "skipped": self._num_skipped,
            "shards": [{"file": name, "images": count} for name, count in self._shards.shards],
            "bytes": {name: (self._folder / name).stat().st_size for name in names}, "pairs_sha256": digest,
        }  # fmt: skip
        (self._folder / "store.json").write_text(json.dumps(header, indent=2))


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, kind)
