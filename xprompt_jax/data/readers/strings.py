"""Many strings in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class Strings(Sequence[str]):
    """Strings as one block of bytes: 8 bytes each beside their letters, where a list of str takes 60."""

    def __init__(self, strings: Iterable[str]):
        block, ends = bytearray(), [0]
        for string in strings:
            block += string.encode("utf-8", "surrogateescape")
            ends.append(len(block))
        self._block = np.frombuffer(bytes(block), np.uint8)
        self._ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i):
        i = position(i, len(self))
        return self._block[self._ends[i] : self._ends[i + 1]].tobytes().decode("utf-8", "surrogateescape")


def position(i: int, length: int) -> int:
    """A sequence's own number of item `i`, which may count from the end.

    Raises:
      IndexError: there is no such item.
    """
    i = int(i)
    if not -length <= i < length:
        raise IndexError(f"item {i} of {length}")
    return i % length
