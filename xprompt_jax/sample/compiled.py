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
from typing import TYPE_CHECKING

import numpy as np

from xprompt_jax.errors import UserError
from xprompt_jax.files import read_tensors, write_tensors
from xprompt_jax.sample.arguments import check_list

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

FORMAT = "xprompt-compiled-2"
_WHOLE = {"whole": "1"}
"""In the header of files whose tensors were written as they are: before, those of several examples lost their order."""


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
    """Of the model that made it: its configuration, weights and tokenizer."""
    tokenizer: str
    """Fingerprint of its text tokenizer alone, so that a refusal can name the reason."""
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
          UserError: there is none, or they come from different models.
        """
        check_list(prompts, "join", "compiled prompt")
        if not all(isinstance(p, CompiledPrompt) for p in prompts):
            raise UserError("join takes a list of compiled prompts; XPrompt.compile makes them of examples")
        if len({p.fingerprint for p in prompts}) != 1:
            raise UserError("compiled prompts of different models cannot be joined; compile all with one model")
        return cls(
            np.concatenate([p.k for p in prompts]), np.concatenate([p.v for p in prompts]),
            np.concatenate([p.lengths for p in prompts]), prompts[0].fingerprint, prompts[0].tokenizer, prompts[0].instruction,
            tuple(t for p in prompts for t in p.thumbnails),
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        header = {
            "fingerprint": self.fingerprint, "tokenizer": self.tokenizer, **_told_of(self.k), "instruction": self.instruction,
            "thumbnails": json.dumps(self.thumbnails), **_WHOLE,
        }  # fmt: skip
        write_tensors(path, FORMAT, {"k": self.k, "v": self.v, "lengths": self.lengths}, header)

    @classmethod
    def load(cls, path: str | Path) -> CompiledPrompt:
        """Reads the file.

        Raises:
          UserError: it is missing, damaged, or not a compiled prompt.
        """
        tensors, header = read_tensors(path, FORMAT, "compiled prompt", "xprompt compile")
        if tensors.get("lengths", np.zeros(0)).size > 1 and not _WHOLE.items() <= header.items():
            raise UserError(
                f"{path}: of several examples, and written before they were kept in order; make it again with `xprompt compile`"
            )
        try:
            k, v, lengths = (tensors[name] for name in ("k", "v", "lengths"))
            fits = k.ndim == 5 and v.shape == k.shape and lengths.shape == k.shape[:1] and _told_of(k).items() <= header.items()
            fits = fits and bool(np.isfinite(k).all() and np.isfinite(v).all())
            found = cls(
                k, v, lengths, header["fingerprint"], header["tokenizer"], header["instruction"], tuple(json.loads(header["thumbnails"]))
            )
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise UserError(f"{path}: damaged: its tensors are not those that its header tells of; make it again with `xprompt compile`")
        return found

    def check(self, model: XPrompt) -> None:
        """Refuses a model that did not make this prompt.

        Raises:
          UserError: with the reason.
        """
        slots, own = self.k.shape[2], model.config.num_xp_tokens
        if self.tokenizer != model.tokenizer.fingerprint:
            reason = f"was made with the text tokenizer {self.tokenizer}, the model has {model.tokenizer.fingerprint}"
        elif slots != own:
            reason = f"has {slots} XP tokens an example, the model {own}"
        elif self.fingerprint != model.fingerprint:
            reason = f"belongs to model {self.fingerprint}, not to {model.fingerprint}"
        else:
            return
        raise UserError(f"this compiled prompt {reason}; compile it again")


def _told_of(k: np.ndarray) -> dict[str, str]:
    return {"xp_tokens": str(k.shape[2]), "dtype": str(k.dtype)}
