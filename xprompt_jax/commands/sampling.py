"""Flags of every command that draws images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from xprompt_jax.errors import UserError


@dataclass(kw_only=True)
class PrecisionFlags:
    """What a model that draws keeps in fewer bits; see `XPrompt.from_pretrained`."""

    weights: Literal["float", "int8"] = "float"
    """int8 keeps the decoder's matrices in a byte a number: half the memory of bfloat16, for a little of the quality."""
    cache: Literal["float", "int8"] = "float"
    """int8 does the same with the keys and values of what is being drawn: it counts where many images are drawn at once."""

    def precision(self) -> dict[str, Any]:
        """The flags as arguments of `XPrompt.from_pretrained`."""
        return {"weights": self.weights, "cache": self.cache}


@dataclass(kw_only=True)
class SamplingFlags:
    """How image codes are drawn; see `XPrompt.generate`."""

    defaults: Literal["plain", "chameleon", "anole", "lumina", "lumina-dense", "lumina2"] = "plain"
    """What stands where guidance, temperature, top-k or top-p are not given: nothing narrowed, or what a family's authors publish."""
    guidance: float | None = None
    """Scale on the example (or, where there is none, on the text); 1 is off."""
    temperature: float | None = None
    """0 takes the most likely token; for images that is usually dull."""
    top_k: int | None = None
    """Draw among the k most likely tokens; 0 is all."""
    top_p: float | None = None
    """Draw among the most likely tokens that hold this much probability."""
    decoding: Literal["jacobi", "speculative", "sequential"] = "jacobi"
    """Several tokens at once with the same images as one by one; fewer passes, other images of the same distribution; or one by one."""
    window: int = 16
    """Tokens at once. 16 to 32 suit a few images, 4 to 8 a full batch of 16."""

    def sampling(self) -> dict[str, Any]:
        """The flags as arguments of `XPrompt.generate` and `text_to_image`, with the numbers that `defaults` stands for.

        Raises:
          UserError: a number out of its range.
        """
        if self.window < 1:
            raise UserError("--window must be at least 1")
        from xprompt_jax.sample.defaults import defaults, override
        from xprompt_jax.sample.guidance import Guidance

        Guidance.of(1.0 if self.guidance is None else self.guidance)
        drawn = override(defaults(self.defaults).image, self.temperature, self.top_k, self.top_p)
        return {
            "defaults": self.defaults, "guidance": self.guidance, "temperature": drawn.temperature, "top_k": drawn.top_k,
            "top_p": drawn.top_p or 1.0, "decoding": self.decoding, "window": self.window,
        }  # fmt: skip
