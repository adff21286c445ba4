"""Codes of images in ArrayRecord files: any image by its number, read where and when it is asked for.

    images-00000-of-00003.array_record     images 0 .. 65535
    images-00001-of-00003.array_record     images 65536 .. 131071
    ...                                    one record = one image = uint16 [crops, rows, columns], little-endian, nothing else

Every record is a group of its own and not compressed, so that one image costs one small read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.data.readers.strings import position
from xprompt_jax.errors import UserError

IMAGES_PER_SHARD = 65_536
"""Of the largest VQGAN's codes this is 128 MiB for each crop."""


class Codes(Sequence[np.ndarray]):
    """The codes of all images of a store.

    Files are opened when they are first read, in every process anew: the object travels to other processes.

    Args:
      folder: of the shards.
      shards: name and number of images of each file.
      crops: stored of every image.
      grid: rows and columns of an image's codes.
    """

    def __init__(self, folder: Path, shards: Sequence[tuple[str, int]], crops: int, grid: int):
        self._folder, self._shards = folder, tuple(shards)
        self._ends = np.cumsum([count for _, count in shards], dtype=np.int64)
        self.num_crops, self._grid = crops, grid
        self._readers: dict[int, Any] = {}
        self._process = 0

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(images, rows, columns)."""
        return len(self), self._grid, self._grid

    def __getitem__(self, i):
        return self.crops(i)[0]

    def crops(self, i: int) -> np.ndarray:
        """uint16 [crops, rows, columns] of image `i`; crop 0 is the centre. Read-only.

        Raises:
          UserError: the file is damaged or gone.
        """
        i = position(i, len(self))
        shard = int(np.searchsorted(self._ends, i, side="right"))
        inside = i - (int(self._ends[shard - 1]) if shard else 0)
        (record,) = self._read(shard, inside, inside + 1)  # ten times as fast as a list of one
        return np.frombuffer(record, "<u2").reshape(self.num_crops, self._grid, self._grid)

    def records(self, numbers: np.ndarray) -> Iterator[bytes]:
        """Raw records of many images at once, for copying; raises like `crops`.

        Args:
          numbers: int [n], ascending.
        """
        shards = np.searchsorted(self._ends, numbers, side="right")
        for shard in np.unique(shards):
            first = int(self._ends[shard - 1]) if shard else 0
            yield from self._read(int(shard), (numbers[shards == shard] - first).tolist())

    def _read(self, shard: int, *which: int | list[int]) -> Sequence[bytes]:
        name = self._folder / self._shards[shard][0]
        try:
            records = self._reader(shard).read(*which)
        except Exception as e:  # the library tells damage by any exception
            raise UserError(f"{name}: damaged ({_first_line(e)}); copy it again, or make the store again with `xprompt tokenize`") from None
        if any(len(record) != 2 * self.num_crops * self._grid**2 for record in records):
            raise UserError(f"{name}: records of another size than the store's; make the store again with `xprompt tokenize`")
        return records

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        if self._process != os.getpid():  # a fork has its parent's readers, but not their threads
            self._readers, self._process = {}, os.getpid()
        if shard not in self._readers:
            # Read-ahead is for reading in order; here it would read megabytes for each image.
            self._readers[shard] = ArrayRecordReader(str(self._folder / self._shards[shard][0]), options="readahead_buffer_size:0")
        return self._readers[shard]

    def __getstate__(self) -> Mapping[str, Any]:
        return {**self.__dict__, "_readers": {}, "_process": 0}


class ShardWriter:
    """Writes a store's images in order.

    Args:
      folder: where the files go.
      images: how many there will be; it is in the files' names.
    """

    def __init__(self, folder: Path, images: int):
        self._folder, self._files = folder, -(-images // IMAGES_PER_SHARD)
        self._writer: Any = None
        self.shards: list[tuple[str, int]] = []
        """Name and number of images of each file so far."""

    def write(self, record: bytes) -> None:
        """Adds one image: the bytes of uint16 [crops, rows, columns], little-endian."""
        from array_record.python.array_record_module import ArrayRecordWriter

        if not self.shards or self.shards[-1][1] == IMAGES_PER_SHARD:
            self.close()
            name = f"images-{len(self.shards):05d}-of-{self._files:05d}.array_record"
            self._writer = ArrayRecordWriter(str(self._folder / name), "group_size:1,uncompressed")
            self.shards.append((name, 0))
        self._writer.write(record)
        name, count = self.shards[-1]
        self.shards[-1] = name, count + 1

    def close(self) -> None:
        """Completes the file at hand."""
        if self._writer is not None:
            try:
                self._writer.close()
            except RuntimeError as e:  # how it tells a full disk
                raise OSError(_first_line(e)) from None
            self._writer = None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
