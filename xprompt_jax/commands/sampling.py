"""Flags of every command that draws images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(kw_only=True)
class SamplingFlags:
    """How image codes are drawn; see `XPrompt.generate`."""

    guidance: float = 1.0
    """Scale on the example (or, where there is none, on the text); 1 is off."""
    temperature: float = 1.0
    """0 takes the most likely token; for images that is usually dull."""
    top_k: int = 0
    """Draw among the k most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the most likely tokens that hold this much probability."""
    decoding: Literal["jacobi", "sequential"] = "jacobi"
    """Several tokens at once, or one by one; both give the same images."""

    def sampling(self) -> dict[str, Any]:
        """The flags as arguments of `XPrompt.generate` and `text_to_image`."""
        names = ("guidance", "temperature", "top_k", "top_p", "decoding")
        return {name: getattr(self, name) for name in names}
