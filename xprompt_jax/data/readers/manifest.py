"""JSON objects, one a line."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.data.readers.strings import position
from xprompt_jax.errors import UserError

Row = Mapping[str, Any]


class Manifest(Sequence[Row]):
    """The objects of a JSONL file, by number; empty lines do not count.

    Rows are what stands there, and "key": the file's name and the line.

    Raises:
      UserError: the file cannot be read; when a row is asked for: its line is no JSON object.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        starts, lines, offset = array("q"), array("q"), 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        starts.append(offset)
                        lines.append(number)
                    offset += len(line)
        except OSError as e:
            raise UserError(f"{self.path}: cannot read: {e.strerror}") from None
        self._starts = np.array(starts, np.int64)
        self.lines = np.array(lines, np.int64)
        """Line number in the file of every row, from 1."""

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i):
        i = position(i, len(self))
        with self.path.open("rb") as file:
            file.seek(int(self._starts[i]))
            line = file.readline()
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: cannot read: not a text file") from None
        except (json.JSONDecodeError, RecursionError) as e:
            reason = getattr(e, "msg", "nested too deep")
            raise UserError(f"{self.path}, line {self.lines[i]}: not JSON ({reason}); write one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{self.path}, line {self.lines[i]}: not an object; write one JSON object a line")
        return {"key": f"{self.path.name}:{self.lines[i]}", **row}
