"""Compiled prompts: what is left of an example after its XP tokens were encoded, as a small portable file.

The task sees the example only through the XP tokens, so their keys and values in every layer are the example. Keys are
kept normed but not rotated, with the position they belong to. A file is safetensors with a JSON header: no pickle, and
anything that does not match the model is refused with the reason.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xprompt_jax.errors import UserError
from xprompt_jax.files import read_tensors, write_tensors

FORMAT = "xprompt-compiled-1"


@dataclasses.dataclass(frozen=True)
class CompiledPrompt:
    """E encoded examples of one model."""

    k: np.ndarray
    """[E, N, S, G, K], keys after QK-norm, before rotary."""
    v: np.ndarray
    """[E, N, S, G, K]."""
    lengths: np.ndarray
    """int32 [E], tokens of each example: its XP tokens stand at positions length+1 .. length+S."""
    fingerprint: str
    """Of the model that made it."""
    instruction: str = ""
    """The examples' instruction; used for the task when none is given."""
    thumbnails: tuple[str, ...] = ()
    """PNG pictures of the examples, base64, input and output side by side; for people."""

    @property
    def num_examples(self) -> int:
        """E."""
        return self.k.shape[0]

    @classmethod
    def join(cls, prompts: Sequence[CompiledPrompt]) -> CompiledPrompt:
        """Several compiled prompts of one model as one, with all their examples.

        Raises:
          UserError: they come from different models.
        """
        if len({p.fingerprint for p in prompts}) != 1:
            raise UserError("compiled prompts of different models cannot be joined; compile all with one model")
        return cls(
            np.concatenate([p.k for p in prompts]), np.concatenate([p.v for p in prompts]),
            np.concatenate([p.lengths for p in prompts]), prompts[0].fingerprint, prompts[0].instruction,
            tuple(t for p in prompts for t in p.thumbnails),
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        header = {"fingerprint": self.fingerprint, "instruction": self.instruction, "thumbnails": json.dumps(self.thumbnails)}
        write_tensors(path, FORMAT, {"k": self.k, "v": self.v, "lengths": self.lengths}, header)

    @classmethod
    def load(cls, path: str | Path) -> CompiledPrompt:
        """Reads the file.

        Raises:
          UserError: it is missing, damaged, or not a compiled prompt.
        """
        tensors, header = read_tensors(path, FORMAT, "compiled prompt", "xprompt compile")
        return cls(
            **tensors, fingerprint=header["fingerprint"], instruction=header["instruction"],
            thumbnails=tuple(json.loads(header["thumbnails"])),
        )  # fmt: skip

    def check(self, fingerprint: str) -> None:
        """Refuses a model that did not make this prompt."""
        if self.fingerprint != fingerprint:
            raise UserError(f"this compiled prompt belongs to model {self.fingerprint}, not to {fingerprint}; compile it again")
