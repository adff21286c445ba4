"""Classifier-free guidance as a weighted sum of branches, from the emptiest prompt to the full one.

    branch      sees                                  scale of the step from the branch above it
    nothing     bos
    image       the input image                       image
    example     the XP tokens and the input image     task
    full        the same and the instruction          text

    logits = nothing + image (image - nothing) + task (example - image) + text (full - example)

All scales 1 is the full branch alone, one row. Branches of weight zero are never computed: one scale takes two rows, or
three where both neighbours stay. Where a row has no image and no example to lose, the branches above "full" are one.

    ours, on the example     Guidance(task=t)            full + (t - 1)(example - image)
    Chameleon, Anole         Guidance(image=i, text=t)   nothing + i (image - nothing) + t (full - image), facts: chameleon.md 4.1
    Lumina-mGPT              Guidance(text=s)            u + s (full - u), u = what is there without the text

Lumina's u sees the new image alone, without bos; ours keeps bos, which every row of X-Prompt training has.
"""

from __future__ import annotations

import dataclasses

from xprompt_jax.errors import UserError
from xprompt_jax.sample.arguments import number

BRANCHES = ("nothing", "image", "example", "full")
MAX_SCALE = 1e4
"""Of either sign; far beyond any use, and far from where float32 overflows."""


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Scale of each step; 1 means no guidance for it."""

    task: float = 1.0
    text: float = 1.0
    image: float = 1.0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            scale = number(f"guidance on the {name} (1 is off)", value)
            if abs(scale) > MAX_SCALE:
                raise UserError(f"guidance on the {name} (1 is off) must be from {-MAX_SCALE:g} to {MAX_SCALE:g}, not {scale:g}")
            object.__setattr__(self, name, scale)

    def weights(self) -> dict[str, float]:
        """Weight of every branch that matters; they sum to 1."""
        steps = [1.0, self.image, self.task, self.text, 0.0]
        weights = {name: steps[i] - steps[i + 1] for i, name in enumerate(BRANCHES)}
        return {name: w for name, w in weights.items() if w != 0.0}

    @classmethod
    def of(cls, value: float | Guidance, step: str = "task") -> Guidance:
        """A plain number is a scale of one step: on the example, if no other is named."""
        return value if isinstance(value, Guidance) else cls(**{step: value})
