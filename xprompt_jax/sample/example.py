"""What a person shows the model."""

from __future__ import annotations

import dataclasses
from typing import Any

from xprompt_jax.errors import UserError
from xprompt_jax.sample.arguments import check_text

ImageLike = Any  # a PIL image, a path, a uint8 array [height, width, 3], or codes of the model's VQGAN, int32 [grid, grid]


@dataclasses.dataclass(frozen=True)
class Example:
    """One demonstration: what goes in, what comes out, and (optionally) what was asked for.

    Raises:
      UserError: it has no input or no output, or its instruction is no text.
    """

    input: ImageLike
    output: ImageLike = None
    instruction: str = ""

    def __post_init__(self):
        if self.input is None or self.output is None:
            missing = "output" if self.output is None else "input"
            raise UserError(f"an example has no {missing}: give the image before and the image after, Example(input, output)")
        check_text("an example's instruction", self.instruction)
