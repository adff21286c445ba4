"""Tars of samples (WebDataset): files of one name but for the extension belong together."""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.data.readers.strings import Strings, position
from xprompt_jax.errors import UserError

Row = Mapping[str, Any]


class Tar(Sequence[Row]):
    """Samples of several uncompressed tars, read at random through an index of offsets that one pass over the headers makes.

    Args:
      files: paths.
      columns: column -> the extensions it may have, without the first dot; a sample has at most one of them.
      required: columns without which a sample is left out (img2dataset leaves texts whose link was dead).

    Rows, in the order of the tars: {"key": name without extension, column: bytes, or None where the sample has none}.

    Raises:
      UserError: no file, or one that is compressed, damaged or cut short.
    """

    def __init__(self, files: Iterable[str | Path], columns: Mapping[str, tuple[str, ...]], *, required: Sequence[str] = ()):
        self.files, self.columns = tuple(Path(f) for f in files), tuple(columns)
        if not self.files:
            raise UserError("no .tar files; give the folder that holds them")
        column_of = {extension: number for number, (_, group) in enumerate(columns.items()) for extension in group}
        needed = [self.columns.index(name) for name in required]
        keys: list[str] = []
        shards, spans = array("i"), array("q")
        for number, file in enumerate(self.files):
            for key, span in _samples(file, column_of, len(columns)).items():
                if all(span[2 * n] >= 0 for n in needed):
                    keys.append(key)
                    shards.append(number)
                    spans.extend(span)
        self._keys, self._shards = Strings(keys), np.array(shards, np.int32)
        self._spans = np.array(spans, np.int64).reshape(-1, len(columns), 2)  # offset, or -1, and size

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i):
        i = position(i, len(self))
        return {"key": self._keys[i]} | {name: self.read(i, name) for name in self.columns}

    def read(self, i: int, column: str) -> bytes | None:
        """One file of sample `i`; None where it has none."""
        offset, size = self._spans[i, self.columns.index(column)].tolist()
        if offset < 0:
            return None
        with self.files[self._shards[i]].open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _samples(path: Path, column_of: Mapping[str, int], columns: int) -> dict[str, list[int]]:
    """Key -> offset and size of each column, flat."""
    found: dict[str, list[int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                column = column_of.get(extension.lower())
                if column is None or not member.isfile():
                    continue
                span = found.setdefault(f"{folder}/{stem}".lstrip("/"), [-1, 0] * columns)
                span[2 * column : 2 * column + 2] = member.offset_data, member.size
    except (OSError, tarfile.TarError) as e:
        raise UserError(f"{path}: not a whole, uncompressed tar ({e}); download or unpack it again") from None
    return found
