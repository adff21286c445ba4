"""Parquet files, images as Hugging Face stores them: a struct of bytes and a file name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from xprompt_jax.data.readers.strings import position
from xprompt_jax.errors import UserError

Row = Mapping[str, Any]


class Parquet(Sequence[Row]):
    """Rows of several parquet files, in their order.

    One row group is in memory at a time, its wanted columns alone: reading in order is quick, reading at random costs a row group each.

    Args:
      files: paths.
      columns: the columns to read, each under its own name.

    Rows: {"key": "<file>:<number in it>", column: value, ...}; an image struct becomes its bytes, or its path where it has none.

    Raises:
      UserError: no file, an unreadable one, or a column is missing.
    """

    def __init__(self, files: Iterable[str | Path], columns: Sequence[str]):
        self.files, self.columns = tuple(Path(f) for f in files), tuple(columns)
        if not self.files:
            raise UserError("no parquet files; give the folder that holds them")
        sizes: list[int] = []
        groups: list[tuple[int, int]] = []
        first: list[int] = []
        for number, file in enumerate(self.files):
            opened = self._open(file)
            missing = [c for c in self.columns if c not in opened.schema_arrow.names]
            if missing:
                have = ", ".join(opened.schema_arrow.names)
                raise UserError(f"{file}: no column {missing[0]!r}, but {have}; another dataset, or an older snapshot of it")
            first.append(sum(sizes))
            for group in range(opened.num_row_groups):
                groups.append((number, group))
                sizes.append(opened.metadata.row_group(group).num_rows)
        self._first = np.array(first, np.int64)  # row number of each file's first row
        self._groups, self._ends = np.array(groups, np.int32).reshape(-1, 2), np.cumsum(sizes, dtype=np.int64)
        self._cached: tuple[int, Any] = (-1, None)

    @staticmethod
    def _open(file: Path) -> pyarrow.parquet.ParquetFile:
        try:
            return pyarrow.parquet.ParquetFile(file)
        except (OSError, pyarrow.ArrowException) as e:
            raise UserError(f"{file}: not a readable parquet file ({str(e).splitlines()[0]}); download it again") from None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i):
        i = position(i, len(self))
        group = int(np.searchsorted(self._ends, i, side="right"))
        if self._cached[0] != group:
            self._cached = group, self._read(group)
        before = int(self._ends[group - 1]) if group else 0
        file = int(self._groups[group, 0])
        row = {name: self._cached[1][name][i - before].as_py() for name in self.columns}
        key = f"{self.files[file].name}:{i - self._first[file]}"
        return {"key": key} | {name: self._image(value, file) for name, value in row.items()}

    def _read(self, group: int):
        file, number = self._groups[group]
        try:
            return self._open(self.files[file]).read_row_group(int(number), columns=list(self.columns))
        except (OSError, pyarrow.ArrowException) as e:
            raise UserError(f"{self.files[file]}: damaged ({str(e).splitlines()[0]}); download it again") from None

    def _image(self, value, file: int):
        if not isinstance(value, dict) or not value.keys() >= {"bytes", "path"}:
            return value
        return value["bytes"] or self.files[file].parent / (value["path"] or "")

    def __getstate__(self):
        return {**self.__dict__, "_cached": (-1, None)}
