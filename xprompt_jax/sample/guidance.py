"""Classifier-free guidance as a weighted sum of branches, from the emptiest prompt to the full one.

    branch      sees                                  scale of the step from the branch above it
    nothing     bos
    image       the input image                       image
    example     the XP tokens and the input image     task
    full        the same and the instruction          text

    logits = nothing + image (image - nothing) + task (example - image) + text (full - example)

All scales 1 is the full branch alone, one row. Chameleon's published formula is `Guidance(image=1.2, text=3.0)` without
XP; a scale on the example alone ("task guidance") is `Guidance(task=2.0)`. Branches of weight zero are never computed.
"""

from __future__ import annotations

import dataclasses

BRANCHES = ("nothing", "image", "example", "full")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Scale of each step; 1 means no guidance for it."""

    task: float = 1.0
    text: float = 1.0
    image: float = 1.0

    def weights(self) -> dict[str, float]:
        """Weight of every branch that matters; they sum to 1."""
        steps = [1.0, self.image, self.task, self.text, 0.0]
        weights = {name: steps[i] - steps[i + 1] for i, name in enumerate(BRANCHES)}
        return {name: w for name, w in weights.items() if w != 0.0}

    @classmethod
    def of(cls, value: float | Guidance) -> Guidance:
        """A plain number is a scale on the example."""
        return value if isinstance(value, Guidance) else cls(task=float(value))
