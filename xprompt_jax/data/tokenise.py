"""The token store: every image turned into codes once, and the tables that refer to them.

    store/
      store.json     format, grid, image size, recipe, fingerprint of the VQGAN, counts
      codes.npy      uint16 [images, rows, columns], memory-mapped: an image is 2 KB
      pairs.jsonl    one pair a line: record numbers of its two images, texts, task, group, split
      tokenizers/    the VQGAN that made the codes, and the text tokenizer that goes with it

Images are content-addressed: one that serves as input, output, example and query, forwards and backwards, is encoded and
stored once. Reversing and describing cost no storage at all; the pipeline composes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from xprompt_jax.convert.native import save_tokenizers
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
            lines = (folder / "pairs.jsonl").read_text().splitlines()
            codes = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as e:
            raise UserError(f"{folder}: not a complete token store ({e}); make it with `xprompt tokenize`") from None
        if header.get("format") != FORMAT or len(lines) != header["pairs"] or len(codes) != header["images"]:
            raise UserError(f"{folder}: not a token store of format {FORMAT}, or damaged; make it again with `xprompt tokenize`")
        if vqgan is not None and vqgan_fingerprint(vqgan) != header["vqgan"]:
            raise UserError(f"{folder}: made by another image tokenizer ({header['vqgan']}); tokenize again with this model")
        return cls(codes, tuple(Pair(**json.loads(line)) for line in lines), header["vqgan"])


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
    size, known, numbers = vqgan.config.image_size, {}, iter(range(2**62))
    encode = jax.jit(lambda model, pixels: model.encode(pixels))
    codes: list[np.ndarray] = []
    waiting: list[np.ndarray] = []

    def flush() -> None:
        if waiting:
            pixels = np.stack(waiting + [waiting[-1]] * (batch - len(waiting)))
            codes.extend(np.asarray(encode(vqgan, to_pixels(pixels, recipe)))[: len(waiting)].astype(np.uint16))
            waiting.clear()

    def number(image) -> int:
        pixels = resize_center_crop(open_image(image, recipe), size, recipe)
        key = hashlib.sha256(pixels.tobytes()).digest()
        if key not in known:
            known[key] = next(numbers)
            waiting.append(pixels)
            if len(waiting) == batch:
                flush()
        return known[key]

    def pairs() -> Iterator[Pair]:
        for record in tqdm(records, total=total, unit="pair", desc="tokenizing", disable=not progress):
            fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(Pair)}
            yield Pair(**fields | {"input": number(record.input), "output": number(record.output)})

    fingerprint = vqgan_fingerprint(vqgan)
    with atomic_path(out) as temporary:
        temporary.mkdir()
        count = 0
        with (temporary / "pairs.jsonl").open("w") as f:
            for count, pair in enumerate(pairs(), 1):  # noqa: B007
                f.write(json.dumps(dataclasses.asdict(pair), ensure_ascii=False) + "\n")
        flush()
        if not count:
            raise UserError(f"{out}: nothing to tokenize: the source has no pairs")
        np.save(temporary / "codes.npy", np.stack(codes), allow_pickle=False)
        header = {
            "format": FORMAT, "vqgan": fingerprint, "recipe": recipe, "image_size": size, "grid": vqgan.config.grid,
            "images": len(codes), "pairs": count,
        }  # fmt: skip
        save_tokenizers(temporary / "tokenizers", vqgan, tokenizer)
        (temporary / "store.json").write_text(json.dumps(header, indent=2))
    return Store.open(out)
