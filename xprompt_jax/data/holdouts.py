"""Tasks that training never sees, so that they can be asked as novel ones (paper, section 4.4).

A holdout takes away one direction of pairs: the one that would teach the task. What is left backwards stays, as the paper's wording has it
("remove the training of generating derained image"), unless the strict switch takes it too.

    derain          rainy to clean                                               backwards (add rain) stays
    low_light       dark to bright, and FiveK's retouching                       backwards stays
    depth_spectrum  image to depth in the palettes of `palettes.HELD_OUT`        backwards stays
    add_remove      edits that add or remove an object, in both directions: one is the other backwards

Which edits add or remove is answered by a judge (`xprompt annotate --kind holdout`; the paper asked LLaMA-3-8B-Instruct), and the answer
stands in the pair's `holdout`; where nobody was asked, by our keyword rule on the instruction. `xprompt tokenize` records both beside the
pairs, in the store's holdouts.jsonl.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from xprompt_jax.config import Holdout
from xprompt_jax.data.palettes import HELD_OUT

if TYPE_CHECKING:
    from xprompt_jax.data.table import Categories, Pairs

TASKS: dict[Holdout, frozenset[str]] = {
    "derain": frozenset({"derain"}),
    "low_light": frozenset({"low_light", "retouch"}),
    "depth_spectrum": frozenset(f"depth/{palette}" for palette in HELD_OUT),
    "add_remove": frozenset({"add_object", "remove_object"}),
}
"""Holdout -> the sub-tasks whose forward direction it takes."""
EDITS = "edit"
"""The task whose instructions are judged one by one."""

_POLITE = r"(?:please|now|and|then|also|can you|could you|you could|let's|we should|i want to|i'd like to|have it)\b[, ]*"
_ADD = r"add|adds|adding|insert|put|place|include|give|hang|plant|attach|draw|let there be|there should be|introduce|bring in"
_REMOVE = r"remove|removes|removing|delete|erase|eliminate|get rid of|take away|take out|take off|cut out|clear away"
# The verb at the start decides: "make the man hold flowers" is left to a judge.
_FIRST = re.compile(rf"^\W*(?:{_POLITE})*(?:(?P<add>{_ADD})|(?P<remove>{_REMOVE}))\b", re.IGNORECASE)
_LOOKS = (
    r"colou?rs?|contrast|brightness|saturation|blur|noise|grain|filter|effects?|vignette|sepia|style|texture|light|lighting|sharpness|"
    r"exposure|haze"
)
_NOT_AN_OBJECT = re.compile(rf"\b(?:{_LOOKS})\W*$", re.IGNORECASE)


class Judged(Protocol):
    """What a holdout looks at: `sources.Record` or `table.Pair`."""

    @property
    def task(self) -> str:
        """The sub-task."""

    @property
    def instruction(self) -> str:
        """Forwards."""

    @property
    def holdout(self) -> str:
        """A judge's answer: "yes", "no" or ""."""


def addition_or_removal(instruction: str) -> Literal["add", "remove", ""]:
    """Our keyword rule: whether an editing instruction adds an object to the picture or removes one.

    It looks at the verb that the instruction starts with, and passes over what is no object (colour, light, effects).
    """
    match = _FIRST.search(instruction)
    if match is None or _NOT_AN_OBJECT.search(instruction):
        return ""
    return "add" if match["add"] else "remove"


def held_directions(pair: Judged, holdouts: Collection[Holdout], *, strict: bool = False) -> tuple[bool, bool]:
    """Whether (forwards, backwards) of a pair must not be trained.

    Args:
      holdouts: the tasks to keep novel.
      strict: what is held forwards is held backwards too.
    """
    if "add_remove" in holdouts and (pair.task in TASKS["add_remove"] or (pair.task == EDITS and adds_or_removes(pair))):
        return True, True
    forward = any(pair.task in TASKS[name] for name in holdouts)
    return forward, forward and strict


def held(pairs: Pairs, holdouts: Collection[Holdout], *, strict: bool = False) -> np.ndarray:
    """`held_directions` of a whole table of pairs: bool [pairs, 2].

    Instructions are read of those edits alone that no judge was asked about.
    """
    forward = _among(pairs.task, {task for name in holdouts for task in TASKS[name]})
    both = np.zeros(len(pairs), bool)
    if "add_remove" in holdouts:
        edits = _among(pairs.task, {EDITS})
        both = _among(pairs.task, TASKS["add_remove"]) | (edits & _among(pairs.holdout, {"yes"}))
        for i in np.flatnonzero(edits & _among(pairs.holdout, {""})):
            both[i] = bool(addition_or_removal(pairs.text("instruction", int(i))))
    return np.stack([forward | both, (forward & strict) | both], 1)


def _among(column: Categories, names: Collection[str]) -> np.ndarray:
    """Which pairs have one of these names in a column: bool [pairs]."""
    return np.array([name in names for name in column.names], bool)[column.codes]


def adds_or_removes(pair: Judged) -> bool:
    """The judge's answer on an edit, or our rule's where nobody was asked."""
    return pair.holdout == "yes" or (not pair.holdout and bool(addition_or_removal(pair.instruction)))
