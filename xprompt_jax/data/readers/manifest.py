"""JSON objects: one a line, or in one array."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from xprompt_jax.data.readers.strings import position
from xprompt_jax.errors import UserError

Row = Mapping[str, Any]
_SPACE = re.compile(r"\s*")


class Manifest(Sequence[Row]):
    """The objects of a JSONL file, by number; empty lines do not count. A file that is one JSON array is read too.

    Rows are what stands there, and "key": the file's name and the line, or the number in the array.

    Raises:
      UserError: the file cannot be read, or is no whole array; when a row is asked for: it is no JSON object.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._is_array = file.read(64).lstrip().startswith(b"[")
                file.seek(0)
                spans = _items(self.path, file.read()) if self._is_array else _lines(file)
        except OSError as e:
            raise UserError(f"{self.path}: cannot read: {e.strerror}") from None
        self.lines = spans[:, 0]
        """Line in the file on which every row begins, from 1."""
        self._spans = spans[:, 1:]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, i):
        i = position(i, len(self))
        start, end = self._spans[i].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: cannot read: not a text file") from None
        except (json.JSONDecodeError, RecursionError) as e:
            reason = getattr(e, "msg", "nested too deep")
            raise UserError(f"{self.path}, line {self.lines[i]}: not JSON ({reason}); write one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{self.path}, line {self.lines[i]}: not an object; write one JSON object a line")
        return {"key": f"{self.path.name}:{i + 1 if self._is_array else self.lines[i]}", **row}


def _lines(file: IO[bytes]) -> np.ndarray:
    """Line number, first byte and end of every line that is not empty: int64 [rows, 3]."""
    spans, offset = array("q"), 0
    for number, line in enumerate(file, 1):
        if line.strip():
            spans.extend((number, offset, offset + len(line)))
        offset += len(line)
    return np.array(spans, np.int64).reshape(-1, 3)


def _items(path: Path, data: bytes) -> np.ndarray:
    """The same of every item of a JSON array; it passes through memory once."""
    spans, decoder = array("q"), json.JSONDecoder()
    try:
        text = data.decode()
        line, offset, told = 1, 0, 0  # of the character `told`
        at = _SPACE.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
        while text[at] != "]":
            _, end = decoder.raw_decode(text, at)
            line, offset = line + text.count("\n", told, at), offset + len(text[told:at].encode())
            size = len(text[at:end].encode())
            spans.extend((line, offset, offset + size))
            line, offset, told = line + text.count("\n", at, end), offset + size, end
            at = _SPACE.match(text, end).end()  # type: ignore[union-attr]
            if text[at] == ",":
                at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
            elif text[at] != "]":
                raise ValueError(f"no comma on line {line}")
    except (ValueError, IndexError, RecursionError) as e:
        raise UserError(f"{path}: not a whole JSON array ({e}); write one object a line") from None
    return np.array(spans, np.int64).reshape(-1, 3)
