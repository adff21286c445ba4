"""GenEval's decisions (arXiv 2310.11513): what a detector found in an image, and a prompt's metadata -> right or wrong.

The detector stands outside: Mask2Former for boxes and CLIP for colours, in PyTorch. Everything after it is here, with the official
defaults (facts: data_eval.md 2.2):

    keep      confidence above 0.3 (counting 0.9), the 16 most confident of a class; overlapping boxes all stay
    include   the `count` most confident boxes of a class must be there, in the colour asked for
    position  the box's centre beside the target's, less a tenth of both sizes, must be mostly in the direction asked for
    exclude   fewer than `count` boxes of the class
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xprompt_jax.errors import UserError

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
"""Boxes of a class that count."""
MAX_OVERLAP = 1.0
"""Intersection / union above which the less confident of two boxes is dropped; 1 drops none."""
POSITION_MARGIN = 0.1
"""Of both objects' sizes, by which their centres' distance is shortened."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Detection:
    """An object in an image."""

    box: Box
    confidence: float
    color: str | None = None
    """One of COLORS; None where nobody looked."""


def keep(detections: Sequence[Detection], tag: str, *, max_overlap: float = MAX_OVERLAP) -> list[Detection]:
    """The boxes of one class that count for a prompt of this tag, the most confident first."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    # Of equals the later one comes first, as in a sorted list read backwards.
    ordered = sorted(detections, key=lambda d: d.confidence)[::-1]
    ordered = [d for d in ordered if d.confidence > threshold][:MAX_OBJECTS]
    kept: list[Detection] = []
    for detection in ordered:
        if max_overlap == 1 or all(overlap(k.box, detection.box) < max_overlap for k in kept):
            kept.append(detection)
    return kept


def overlap(a: Box, b: Box) -> float:
    """Intersection / union of two boxes whose last pixels belong to them."""
    area = lambda left, top, right, bottom: max(right - left + 1, 0) * max(bottom - top + 1, 0)
    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def relations(a: Box, b: Box) -> set[str]:
    """Where `a` is, seen from `b`: none, one or two of RELATIONS. y grows downwards."""
    offset, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (a[low] + a[high] - b[low] - b[high]) / 2
        margin = POSITION_MARGIN * (abs(a[high] - a[low]) + abs(b[high] - b[low]))
        offset.append(distance)
        shortened.append(math.copysign(max(abs(distance) - margin, 0.0), distance))
    if max(map(abs, shortened)) < 1e-3:
        return set()
    x, y = (s / math.hypot(*offset) for s in shortened)
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in found.items() if holds}


def judge(metadata: Mapping[str, Any], objects: Mapping[str, Sequence[Detection]]) -> tuple[bool, list[str]]:
    """Whether an image shows what its prompt says.

    Args:
      metadata: a line of evaluation_metadata.jsonl: tag, include, perhaps exclude.
      objects: class -> what the detector found, unfiltered.

    Returns:
      (correct, reasons why not).

    Raises:
      UserError: a colour is asked for, and a detection has none.
    """
    kept = {name: keep(found, metadata["tag"]) for name, found in objects.items()}
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        problem, found = _check(clause, kept.get(clause["class"], []), matched)
        reasons += [problem] if problem else []
        matched.append(None if problem else found)
    for clause in metadata.get("exclude", ()):
        if (count := len(kept.get(clause["class"], []))) >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return not reasons, reasons


def _check(
    clause: Mapping[str, Any], kept: Sequence[Detection], matched: Sequence[list[Detection] | None]
) -> tuple[str, list[Detection]]:  # fmt: skip
    """(What is wrong, or nothing; the objects that the clause speaks of)."""
    name, count = clause["class"], clause["count"]
    found = list(kept[:count])
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}", found
    if color := clause.get("color"):
        colors = [d.color for d in found]
        if None in colors:
            raise UserError(f'a detection of {name!r} has no "color", which this prompt asks for; give one of {", ".join(COLORS)}')
        if colors.count(color) < count:
            return f"expected {color} {name}>={count}, found {', '.join(map(str, colors))}", found
    if "position" in clause:
        relation, target = clause["position"]
        others = matched[target]
        if others is None:
            return f"no target for {name} to be {relation}", found
        for a in found:
            for b in others:
                if relation not in (seen := relations(a.box, b.box)):
                    return f"expected {name} {relation} target, found {' and '.join(sorted(seen)) or 'neither'} target", found
    return "", found
