"""From records to a token store: every image encoded once, by a job that may be stopped at any time and cut into parts.

    records ─▶ decoded, cropped by threads ─▶ address known? ─no─▶ batch ─▶ VQGAN ─▶ codes
                                                   └─yes─▶ its number                └─▶ OUT.partial ─▶ OUT

A job writes OUT.partial, a journal that only grows; the same command goes on where the last one stopped and ends with the
same bytes. Images are numbered as they first appear and encoded in batches of consecutive numbers, so that nothing depends
on where a stop fell. Parts of contiguous records (`shard`), joined in order, are the store of one whole job.

Of every image the centre is stored, and with `crops` further windows, the same of all images of a pair (data/crops.py).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pyarrow as pa
from tqdm import tqdm

from xprompt_jax.convert.native import save_tokenizers
from xprompt_jax.data.crops import MAX_CROPS, crop_windows, cut
from xprompt_jax.data.images import Recipe, open_image, resize_center_crop, to_pixels
from xprompt_jax.data.journal import Journal, forget
from xprompt_jax.data.sources import Record
from xprompt_jax.data.store import ADDRESS_BYTES, Encoding, Store, StoreWriter, vqgan_fingerprint
from xprompt_jax.data.table import CATEGORIES, ROWS, TEXTS, TokenCounter
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path, check_place, read_json_lines
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.tokens import Tokenizer

log = logging.getLogger(__name__)

_DECODERS = min(16, os.cpu_count() or 1)
"""Threads that decode images ahead of the VQGAN."""

_STORE = ("store.json",), "a token store"

T = TypeVar("T")
U = TypeVar("U")


def tokenize(
    records: Iterable[Record], vqgan: VQGAN, tokenizer: Tokenizer, out: str | Path,
    *, batch: int = 32, recipe: Recipe = "meta", crops: int = 1, shard: tuple[int, int] = (0, 1), max_corrupt: float = 0.01,
    job: Mapping[str, Any] | None = None, total: int | None = None, progress: bool = True,
) -> Store:  # fmt: skip
    """Encodes all images of `records` into a store, which appears whole or not at all.

    A job that ended early left OUT.partial; the same call goes on from there if it says what its job is.

    Args:
      records: pairs. A sequence is read by number; anything else is read from its start again after a stop.
      vqgan: the image tokenizer.
      tokenizer: the text tokenizer; texts are stored as text, and it counts their tokens.
      out: folder; an existing store there is replaced.
      batch: images encoded at once.
      recipe: of preprocessing, Meta's or Hugging Face's (data/images.py); sampling must use the same.
      crops: of every image, 1 to 4: the centre, and windows that all images of a pair share.
      shard: (i, n): the i-th of n parts of a sequence, from 0; joined in order by `merge`, they are the whole.
      max_corrupt: how many pairs may be unreadable: below 1 a fraction of all, else a number. They are left out and listed in
        skipped.jsonl. Where nobody knows how many records there are, the fraction is of those read so far.
      job: what the records come from, in JSON's types: a stopped job goes on only if it is the same. None: nobody can tell, so that
        what a stopped job left is thrown away.
      total: number of records, where they have no length.

    Raises:
      UserError: there are no records, too many cannot be read, OUT.partial is of another job, or a place cannot be written.
    """
    out = check_place(out, *_STORE)
    if not 1 <= crops <= MAX_CROPS:
        raise UserError(f"--crops {crops}: must be 1 to {MAX_CROPS}")
    encoding = Encoding(vqgan_fingerprint(vqgan), tokenizer.fingerprint, recipe, crops, vqgan.config.image_size, vqgan.config.grid)
    index, parts = shard
    first = 0
    if isinstance(records, Sequence):
        first, last = (len(records) * i // parts for i in (index, index + 1))
        total = last - first
    elif parts > 1:
        raise UserError("--shard works on pairs that can be counted; leave it out")
    identity = {**dataclasses.asdict(encoding), "shard": f"{index}/{parts}", "records": total, **(job or {})}
    read, partial = _Reader(encoding, TokenCounter(tokenizer)), out.with_name(out.name + ".partial")
    if job is None:
        forget(partial)

    with Journal(partial, identity) as journal:
        start = time.monotonic()
        encoder = _Encoder(journal, vqgan, batch, encoding)
        before = journal.images
        bar = tqdm(total=total, initial=journal.done, unit="pair", desc="tokenizing", disable=not progress)
        rate = lambda: (journal.images - before) / max(time.monotonic() - start, 1e-9)
        with bar:
            for number, found in _ahead(read, _numbered(records, first, total, journal.done)):
                if isinstance(found, _Corrupt):
                    seen = total if total is not None else number + 1
                    if encoder.skipped + 1 > (max_corrupt * seen if max_corrupt < 1 else max_corrupt):
                        encoder.pause()
                        raise UserError(
                            f"{found.reason}; {encoder.skipped + 1} of {seen} pairs cannot be read, more than "
                            f"--max-corrupt {max_corrupt:g}; repair them or raise it, the same command then goes on"
                        )
                encoder.add(number, number - first + 1, found)
                bar.update()
                bar.set_postfix_str(f"{rate():.1f} images/s", refresh=False)
            encoder.finish()
        if not journal.images:
            raise UserError(f"{out}: nothing to tokenize: the source has no pairs" + (" that can be read" if encoder.skipped else ""))
        images, skipped, speed = journal.images, encoder.skipped, rate()
        with journal.finished(out) as folder:
            pairs = _write_store(journal, folder, encoding)
            save_tokenizers(folder / "tokenizers", vqgan, tokenizer)
    log.info("%s: %d images, %d pairs, %d skipped, %.1f images/s", out, images, pairs, skipped, speed)
    return Store.open(out)


@dataclasses.dataclass(frozen=True)
class _Found:
    """A record, read."""

    row: dict[str, Any]
    """What pairs.jsonl says of it, but for its images."""
    images: list[tuple[bytes, np.ndarray]]
    """Of input, output and further inputs, the address and the pixels, uint8 [crops, size, size, 3]."""


@dataclasses.dataclass(frozen=True)
class _Corrupt:
    """A record that cannot be read."""

    dataset: str
    image: str
    """Which one: input, output, or the number of a further input; empty: the record itself."""
    file: str
    reason: str


def _numbered(records: Iterable[Record], first: int, total: int | None, done: int) -> Iterator[tuple[int, Record | UserError]]:
    """Records with their numbers, from the first that is not done."""
    if not isinstance(records, Sequence):
        yield from islice(enumerate(records), done, None)
        return
    for number in range(first + done, first + (total or 0)):
        try:
            yield number, records[number]
        except UserError as e:
            yield number, e


def _ahead(function: Callable[[T], U], numbered: Iterable[tuple[int, T]]) -> Iterator[tuple[int, U]]:
    """The function's results in order; threads work ahead of them."""
    pool = ThreadPoolExecutor(_DECODERS)
    waiting: deque[tuple[int, Future[U]]] = deque()
    try:
        for number, item in numbered:
            waiting.append((number, pool.submit(function, item)))
            if len(waiting) > 2 * _DECODERS:
                number, future = waiting.popleft()
                yield number, future.result()
        for number, future in waiting:
            yield number, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Reader:
    """From a record to pixels, addresses and words."""

    def __init__(self, encoding: Encoding, count: TokenCounter):
        self._encoding, self._count = encoding, count
        self._salt = f"{encoding.vqgan} {encoding.recipe} {encoding.crops} ".encode()

    def __call__(self, record: Record | UserError) -> _Found | _Corrupt:
        if isinstance(record, UserError):
            return _Corrupt("", "", "", str(record))
        words = {name: getattr(record, name) for name in (*CATEGORIES, *TEXTS)}
        for name, text in words.items():
            try:
                text.encode()
            except (AttributeError, UnicodeEncodeError):
                return _Corrupt(record.dataset, "", "", f"{name} is no text: {text!r}")
        images: list[tuple[bytes, np.ndarray]] = []
        windows: list[tuple[float, float, float]] = []
        more = {f"input {i}": image for i, image in enumerate(record.more_inputs, 2)}
        for name, image in {"input": record.input, "output": record.output, **more}.items():
            if name == "output" and image is record.input and not record.exact:
                images.append(images[0])
                continue
            try:
                opened = open_image(image, self._encoding.recipe)
                if name == "input":
                    windows = crop_windows(opened, self._encoding.crops)
                pixels = self._cut(opened, windows, exact=record.exact and name == "output")
            except UserError as e:
                file = str(image) if isinstance(image, str | os.PathLike) else ""
                return _Corrupt(record.dataset, name, file, str(e))
            images.append((self._address(pixels), pixels))
        tokens = self._count([words[name] for name in TEXTS]).tolist()
        return _Found({**words, "tokens": tokens}, images)

    def _address(self, pixels: np.ndarray) -> bytes:
        half = lambda part: hashlib.sha256(self._salt + part.tobytes()).digest()[: ADDRESS_BYTES // 2]
        return half(pixels[0]) + half(pixels[1:])

    def _cut(self, image: PIL.Image.Image, windows: Sequence[tuple[float, float, float]], exact: bool) -> np.ndarray:
        size = self._encoding.image_size
        centre = resize_center_crop(image, size, self._encoding.recipe, exact=exact)
        return np.stack([centre, *(cut(image, window, size, exact=exact) for window in windows)])


@functools.partial(jax.jit, static_argnames="recipe")  # one compilation for all jobs of a process
def _encode(vqgan: VQGAN, levels: jax.Array, recipe: Recipe) -> jax.Array:
    """uint8 [B, h, w, 3], which travel to the device as bytes, to codes, uint16 [B, rows, columns]."""
    pixels = jnp.asarray(to_pixels(np.arange(256, dtype=np.uint8), recipe))
    return vqgan.encode(pixels[levels]).astype(jnp.uint16)


class _Encoder:
    """Numbers images, encodes new ones in batches of consecutive numbers, and journals records when all their images are encoded."""

    def __init__(self, journal: Journal, vqgan: VQGAN, batch: int, encoding: Encoding):
        self._journal, self._vqgan, self._batch, self._crops = journal, vqgan, batch, encoding.crops
        self._recipe = encoding.recipe
        self._known = {address: i for i, address in enumerate(journal.addresses())}
        self._waiting: list[tuple[bytes, np.ndarray]] = []
        self._running: tuple[list[bytes], list[jax.Array]] | None = None
        self._queue: deque[tuple[int, int, str, dict[str, Any]]] = deque()
        self.skipped = journal.skipped

    def add(self, number: int, done: int, found: _Found | _Corrupt) -> None:
        """Takes record `number`, with which `done` are done; records come in order."""
        if isinstance(found, _Corrupt):
            self.skipped += 1
            self._queue.append((done, -1, "skipped", {"pair": number, **dataclasses.asdict(found)}))
        else:
            first, second, *more = (self._number(address, pixels) for address, pixels in found.images)
            row = {"input": first, "output": second, "more_inputs": more, **found.row}
            self._queue.append((done, max(first, second, *more), "pairs", row))
        self._settle()

    def _number(self, address: bytes, pixels: np.ndarray) -> int:
        if address not in self._known:
            self._known[address] = len(self._known)
            self._waiting.append((address, pixels))
            if len(self._waiting) == self._batch:
                self._start()
        return self._known[address]

    def _start(self) -> None:
        """Sends a batch to the device; while it works there, the last one is fetched and the next one gathers."""
        addresses = [address for address, _ in self._waiting]
        pixels = np.stack([pixels for _, pixels in self._waiting] + [self._waiting[-1][1]] * (self._batch - len(self._waiting)))
        started = addresses, [_encode(self._vqgan, pixels[:, crop], self._recipe) for crop in range(self._crops)]
        self._waiting = []
        self._collect()
        self._running = started

    def _collect(self) -> None:
        if self._running is not None:
            addresses, crops = self._running
            self._running = None
            self._journal.add_images(np.stack([np.asarray(codes) for codes in crops], 1)[: len(addresses)], addresses)
            self._settle()

    def _settle(self) -> None:
        while self._queue and self._queue[0][1] < self._journal.images:
            done, _, kind, row = self._queue.popleft()
            self._journal.add_row(kind, row, done)
        self._journal.commit_now_and_then()

    def pause(self) -> None:
        """Journals what is encoded; the batch that is not full is left to the next start, which makes the same one."""
        self._collect()
        self._journal.commit()

    def finish(self) -> None:
        """Encodes and journals what is left."""
        if self._waiting:
            self._start()
        self._collect()
        self._settle()
        self._journal.commit()


def _write_store(journal: Journal, folder: Path, encoding: Encoding) -> int:
    """The journal as a store's files, tokenizers/ apart; returns the number of pairs."""
    found: dict[str, dict[str, int]] = {name: {} for name in CATEGORIES}
    count = 0
    for row in journal.rows("pairs"):
        count += 1
        for name, numbers in found.items():
            numbers.setdefault(row[name], len(numbers))
    writer = StoreWriter(folder, encoding, images=journal.images, names={name: list(numbers) for name, numbers in found.items()})
    for record, address in zip(journal.codes(), journal.addresses(), strict=True):
        writer.add_image(record, address)
    rows = journal.rows("pairs")
    while part := list(islice(rows, ROWS)):
        columns = {name: [row[name] for row in part] for name in ("input", "output", "more_inputs", *TEXTS)}
        columns |= {name: [numbers[row[name]] for row in part] for name, numbers in found.items()}
        columns |= {f"{name}_tokens": [row["tokens"][i] for row in part] for i, name in enumerate(TEXTS)}
        writer.add_pairs(columns)
    for row in journal.rows("skipped"):
        writer.add_skipped(row)
    writer.finish()
    return count


def merge(stores: Sequence[str | Path], out: str | Path) -> Store:
    """Puts finished stores together, pairs one after the other; an image that several hold is kept once.

    Raises:
      UserError: not stores, not of one encoding (image tokenizer, text tokenizer, recipe, crops), or the folder cannot be written.
    """
    out, folders = Path(out), [Path(folder) for folder in stores]
    opened = [Store.open(folder) for folder in folders]
    encoding = opened[0].encoding
    for store in opened:
        for field, value in dataclasses.asdict(store.encoding).items():
            if value != getattr(encoding, field):
                raise UserError(
                    f"{store.folder}: {field} {value}, but {folders[0]} has {getattr(encoding, field)}; "
                    "tokenize both with one model, one --recipe and one --crops"
                )
    out = check_place(out, *_STORE)
    known: dict[bytes, int] = {}
    numbers, new = [], []
    for store in opened:
        before, addresses = len(known), store.addresses()
        numbers.append(np.array([known.setdefault(address.tobytes(), len(known)) for address in addresses], np.int32))
        values, places = np.unique(numbers[-1], return_index=True)
        new.append(places[values >= before])
    names = {name: list(dict.fromkeys(n for store in opened for n in getattr(store.pairs, name).names)) for name in CATEGORIES}
    with atomic_path(out) as temporary:
        temporary.mkdir()
        writer = StoreWriter(temporary, encoding, images=len(known), names=names)
        for store, numbered, mine in zip(opened, numbers, new, strict=True):
            addresses = store.addresses()
            for first in range(0, len(mine), 4096):
                part = mine[first : first + 4096]
                for i, record in zip(part, store.codes.records(part), strict=True):
                    writer.add_image(record, addresses[i].tobytes())
            categories = {}
            for name in CATEGORIES:
                place = {n: i for i, n in enumerate(names[name])}
                categories[name] = np.array([place[n] for n in getattr(store.pairs, name).names], np.int32)
            for columns in store.pairs.plain_batches():
                writer.add_pairs(columns | _renumbered(columns, numbered, categories))
            for _, row in read_json_lines(store.folder / "skipped.jsonl"):
                writer.add_skipped(row)
        writer.finish()
        shutil.copytree(folders[0] / "tokenizers", temporary / "tokenizers")
    return Store.open(out)


def _renumbered(columns: Mapping[str, Any], images: np.ndarray, categories: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The columns that are numbers of something, given the new number of each old one."""
    more = columns["more_inputs"]
    found: dict[str, Any] = {name: images[columns[name].to_numpy()] for name in ("input", "output")}
    found["more_inputs"] = pa.ListArray.from_arrays(more.offsets, pa.array(images[more.values.to_numpy()], pa.int32()))
    return found | {name: new[columns[name]] for name, new in categories.items()}
