"""Pairs seen in a mirror: pictures, words, and what the colours of normals mean."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from xprompt_jax.data.datasets.base import Pairs
from xprompt_jax.data.images import open_image
from xprompt_jax.data.palettes import mirror_normals
from xprompt_jax.data.sources import Record

_SIDES = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise"}
_SIDE = re.compile(r"\b(left|right|clockwise|counterclockwise)(?=\b|most|ward)", re.IGNORECASE)


def mirror_words(text: str) -> str:
    """The text with left and right exchanged."""

    def other(match: re.Match) -> str:
        word = _SIDES[match[0].lower()]
        return word.capitalize() if match[0][0].isupper() else word

    return _SIDE.sub(other, text)


def mirror(record: Record) -> Record:
    """A pair left to right: its images, its words, and the x of its normals. The group stays: it is the same task."""
    turn = lambda image: np.ascontiguousarray(np.asarray(open_image(image))[:, ::-1])
    normals = lambda image: mirror_normals(np.asarray(open_image(image)))
    words = ("instruction", "reverse_instruction", "description", "reverse_description", "caption")
    changed: dict[str, Any] = {name: mirror_words(getattr(record, name)) for name in words}
    alone = record.output is record.input  # a picture without a pair stays one
    changed["input"] = normals(record.input) if record.task == "control_normal" else turn(record.input)
    changed["output"] = changed["input"] if alone else normals(record.output) if record.task == "normals" else turn(record.output)
    return dataclasses.replace(record, more_inputs=tuple(turn(image) for image in record.more_inputs), **changed)


class Mirrored(Pairs):
    """Pairs, and after them those of them that are for training once more, mirrored; of the others there is only the original."""

    def __init__(self, pairs: Pairs):
        self._pairs = pairs
        self._turned = np.array([i for i in range(len(pairs)) if pairs.split_of(i) == "train"], np.int64)

    def __len__(self) -> int:
        return len(self._pairs) + len(self._turned)

    def record(self, i: int) -> Record:
        """Pair `i`; the mirrored ones come last."""
        return self._pairs[i] if i < len(self._pairs) else mirror(self._pairs[self._turned[i - len(self._pairs)]])
