"""What an adapter is made of: pairs by number, layouts on disk, and a card.

    Dataset = Card + Layouts      a Layout = one way the files may lie, found by a mark = Parts
    Part    = one split           opened, it is `Pairs`: len, [number] -> `sources.Record`; decoded when asked for; picklable

A copy with another number of pairs than its publishers' is refused, because scores on it would not compare.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xprompt_jax.data.phrases import say
from xprompt_jax.data.readers.strings import position
from xprompt_jax.data.sources import Record, held_out
from xprompt_jax.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What a user may choose about any dataset."""

    palettes: tuple[str, ...] = ("turbo",)
    """Of depth: every picture gets one of these, by a hash of its name."""
    classes: Literal["max_separation", "painter"] = "max_separation"
    """Colours of ADE20K's classes."""
    expert: Literal["a", "b", "c", "d", "e"] = "c"
    """Whose retouching of FiveK."""
    password: str = "MagicBrush"
    """Of MagicBrush's test archive; its authors publish it to keep the pictures out of crawls."""
    min_score: float = 6.0
    """Least aesthetic score of LAION (paper, C.4: above 6)."""
    eval_fraction: float = 0.05
    """Held out of training splits that come without a test split, by a hash of the pair's name."""


class Pairs(Sequence[Record]):
    """Pairs by number."""

    @abstractmethod
    def record(self, i: int) -> Record:
        """Pair `i`, from 0."""

    def __getitem__(self, i):
        return self.record(position(i, len(self)))

    def __iter__(self) -> Iterator[Record]:
        # Not by counting up to an IndexError: one out of a decoder would end the data unseen.
        return map(self.record, range(len(self)))

    def split_of(self, i: int) -> str:
        """ "train" or "eval", without decoding the pair where that can be spared."""
        return self.record(i).split

    @property
    def found(self) -> int:
        """What the card counts: pairs, unless the publishers count something else."""
        return len(self)


@dataclass(frozen=True)
class Rows(Pairs):
    """A reader's rows, each made a pair.

    A row's "scene", if it has one, names what must stay in one split: the turns of one edited picture, the frames of one room.
    """

    rows: Sequence[Mapping[str, Any]]
    make: Callable[[Mapping[str, Any]], Record]
    """A function of a module, or a partial of one: lambdas do not travel to other processes."""
    eval_fraction: float = 0.0
    """Held out, by a hash of the scene or the key."""
    counted: int | None = None
    """`found`, where that is not the number of pairs."""

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, i: int) -> Record:
        """Row `i` as a pair."""
        row = self.rows[i]
        return dataclasses.replace(self.make(row), split=self._split(row))

    def split_of(self, i: int) -> str:
        """By the row alone."""
        return self._split(self.rows[i])

    def _split(self, row: Mapping[str, Any]) -> str:
        return held_out(str(row.get("scene", row["key"])), self.eval_fraction)

    @property
    def found(self) -> int:
        """Number of pairs, or what else is counted."""
        return len(self) if self.counted is None else self.counted


class Chosen(Pairs):
    """Some of the pairs: those whose numbers are given, int64 [n]."""

    def __init__(self, pairs: Pairs, numbers: np.ndarray):
        self._pairs, self._numbers = pairs, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def record(self, i: int) -> Record:
        """Pair `i` of the chosen."""
        return self._pairs[self._numbers[i]]

    def split_of(self, i: int) -> str:
        """Of pair `i` of the chosen."""
        return self._pairs.split_of(int(self._numbers[i]))


class Joined(Pairs):
    """Several sequences of pairs, one after the other."""

    def __init__(self, parts: Sequence[Pairs]):
        self._parts, self._ends = tuple(parts), np.cumsum([len(p) for p in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def record(self, i: int) -> Record:
        """Pair `i` of all."""
        part, inside = self._find(i)
        return part.record(inside)

    def split_of(self, i: int) -> str:
        """Of pair `i` of all."""
        part, inside = self._find(i)
        return part.split_of(inside)

    def _find(self, i: int) -> tuple[Pairs, int]:
        part = int(np.searchsorted(self._ends, i, side="right"))
        return self._parts[part], i - (int(self._ends[part - 1]) if part else 0)

    @property
    def found(self) -> int:
        """Of all parts."""
        return sum(part.found for part in self._parts)


@dataclass(frozen=True)
class Evaluated(Pairs):
    """Pairs of a test split: "eval", whatever they say."""

    pairs: Pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def record(self, i: int) -> Record:
        """Pair `i`, held out."""
        return dataclasses.replace(self.pairs[i], split="eval")

    def split_of(self, i: int) -> str:
        """Always "eval"."""
        return "eval"

    @property
    def found(self) -> int:
        """As it is without the mark."""
        return self.pairs.found


@dataclass(frozen=True)
class Named(Pairs):
    """Pairs that say which dataset they come from, unless they do already."""

    pairs: Pairs
    name: str

    def __len__(self) -> int:
        return len(self.pairs)

    def record(self, i: int) -> Record:
        """Pair `i`, with the dataset's name."""
        record = self.pairs[i]
        return record if record.dataset else dataclasses.replace(record, dataset=self.name)

    def split_of(self, i: int) -> str:
        """Of pair `i`."""
        return self.pairs.split_of(i)

    @property
    def found(self) -> int:
        """As it is without the name."""
        return self.pairs.found


@dataclass(frozen=True)
class Part:
    """One split in one layout."""

    split: str
    """Its publishers' name; what begins with "train" is trained on, all else is evaluated."""
    mark: str
    """Glob below the root whose match says that it is there."""
    open: Callable[[Path, Options], Pairs]
    """(root, options) -> all of it."""
    count: int | tuple[int, ...] | None = None
    """How many there must be, or the numbers of several releases; None: nobody knows."""

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers that are right; empty: any is."""
        return self.count if isinstance(self.count, tuple) else () if self.count is None else (self.count,)

    @property
    def expected(self) -> str:
        """The right numbers in words."""
        return " or ".join(f"{count:,}" for count in self.counts) or "any"


@dataclass(frozen=True)
class Layout:
    """One way the files lie."""

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Card:
    """What one must know before using a dataset."""

    title: str
    source: str
    """Where it is to be had."""
    licence: str
    tasks: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Dataset:
    """A dataset: its card, and the ways its files may lie."""

    name: str
    card: Card
    layouts: tuple[Layout, ...]
    folders: tuple[str, ...] = ()
    """What its archives unpack to: the folder above may be given as well."""
    options: tuple[str, ...] = ()
    """Fields of `Options`, but for eval_fraction, that it looks at."""

    def open(self, root: str | Path, split: str = "", *, options: Options | None = None, allow_partial: bool = False) -> Pairs:
        """Opens a copy.

        Args:
          root: its folder, or the folder above.
          split: one of the splits; "" takes all that are there.
          options: see `Options`.
          allow_partial: warn of a wrong number of pairs instead of refusing.

        Raises:
          UserError: none of the layouts, no such split, or a wrong number.
        """
        root, options = Path(root), options or Options()
        for place in (root, *(root / folder for folder in self.folders)):
            present = [(layout, [part for part in layout.parts if any(place.glob(part.mark))]) for layout in self.layouts]
            layout, there = max(present, key=lambda pair: len(pair[1]))  # the first of those that explain most
            if there:
                return self._open(place, layout, there, split, options, allow_partial)
        marks = "; ".join(f"{layout.name}: {' or '.join(part.mark for part in layout.parts)}" for layout in self.layouts)
        problem = "none of its layouts" if root.exists() else "no such folder"
        raise UserError(f"--root {root}: {problem}; {self.name} is recognised by {marks}; it is to be had from {self.card.source}")

    def _open(self, root: Path, layout: Layout, there: Sequence[Part], split: str, options: Options, allow_partial: bool) -> Pairs:
        wanted = [part for part in there if split in ("", part.split)]
        if not wanted:
            raise UserError(f"--split {split}: not in {root}; {self.name} has {', '.join(part.split for part in there)} there")
        if any(not part.split.startswith("train") for part in layout.parts):
            options = dataclasses.replace(options, eval_fraction=0.0)  # it has a test split of its own
        opened = []
        for part in wanted:
            pairs = part.open(root, options)
            if part.counts and pairs.found not in part.counts:
                problem = f"{root}: {self.name} has {pairs.found:,} in {part.split} ({layout.name}), not {part.expected}"
                if not allow_partial:
                    raise UserError(f"{problem}; complete the copy, or accept it with --allow-partial")
                log.warning("%s: partial or another release, accepted", problem)
            log.info("%s %s (%s): %d pairs", self.name, part.split, layout.name, len(pairs))
            opened.append(pairs if part.split.startswith("train") else Evaluated(pairs))
        return Named(opened[0] if len(opened) == 1 else Joined(opened), self.name)


def pair_of(row: Mapping[str, Any], *, task: str, group: str, phrases: str = "", **values: str) -> Record:
    """A row with "input" and "output" as a pair of one task.

    Args:
      phrases: key of `phrases.PHRASES`; "" is the task's name.
      values: what the phrases name.
    """
    return Record(row["input"], row["output"], task=task, group=group, **say(phrases or task, f"{group}/{row['key']}", **values))


def files(root: Path, pattern: str) -> list[Path]:
    """The files that fit a glob, sorted."""
    return sorted(root.glob(pattern))
