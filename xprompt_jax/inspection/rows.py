"""A batch, read back: roles, words, pictures and what is learned.

Nothing here looks at the sample that a row was made from. Roles follow from the bucket's shape and `example_lengths`, the end of the task
from `positions`, the loss from `targets` and `weights`, words and pictures from `ids`: what the trainer gets, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from xprompt_jax.errors import UserError
from xprompt_jax.prompt import Prompter, Role, SlotShape

Kind = Literal["text", "image", "special", "xp", "pad"]


@dataclass(frozen=True)
class Part:
    """A run of slots of one role and one group that say one thing."""

    kind: Kind
    role: Role
    group: int
    start: int
    """First slot."""
    stop: int
    """Slot after the last."""
    positions: tuple[int, int]
    """Rotary positions of the first and the last."""
    loss: int
    """How many of its tokens carry loss."""
    text: str = ""
    """Words, or names of special tokens."""
    codes: np.ndarray | None = None
    """int32 [rows, columns] of an image."""


@dataclass(frozen=True)
class ReadRow:
    """One row of a batch; arrays have an entry for each of its L slots."""

    ids: np.ndarray
    """int32."""
    roles: np.ndarray
    """int32, values of Role."""
    groups: np.ndarray
    """int32, the example a slot belongs to."""
    positions: np.ndarray
    """int32."""
    segments: np.ndarray
    """int32: 1, the row's one document; 0 on padding."""
    weights: np.ndarray
    """float32, of predicting the slot's token."""
    parts: tuple[Part, ...]
    """All slots, in order."""


def read_row(batch: Mapping[str, np.ndarray], number: int, shape: SlotShape, prompter: Prompter, grid: tuple[int, int]) -> ReadRow:
    """Row `number` of a batch as `prompt.stack` makes it.

    Args:
      shape: of the batch's bucket, under the run's mode.
      prompter: tokenizer and layout of the run.
      grid: (rows, columns) of codes of an image.

    Raises:
      UserError: the batch has another number of slots.
    """
    ids, positions = batch["ids"][number], batch["positions"][number]
    if len(ids) != shape.length:
        raise UserError(f"the batch has rows of {len(ids)} slots, the bucket of {shape.length}")
    roles, groups = roles_of(positions, batch["example_lengths"][number], shape)
    weights = np.zeros(shape.length, np.float32)
    np.add.at(weights, batch["targets"][number], batch["weights"][number])
    segments = (roles != Role.PAD).astype(np.int32)
    parts = []
    edges = np.flatnonzero((np.diff(roles) != 0) | (np.diff(groups) != 0)) + 1
    for start, stop in zip([0, *edges], [*edges, shape.length], strict=True):
        for kind, first, end, text, codes in _say(ids, int(start), int(stop), Role(roles[start]), weights > 0, prompter, grid):
            at = int(positions[first]), int(positions[end - 1])
            loss = int((weights[first:end] > 0).sum())
            parts.append(Part(kind, Role(roles[start]), int(groups[start]), first, end, at, loss, text, codes))
    return ReadRow(ids, roles, groups, positions, segments, weights, tuple(parts))


def roles_of(positions: np.ndarray, example_lengths: np.ndarray, shape: SlotShape) -> tuple[np.ndarray, np.ndarray]:
    """What the attention takes each slot for (`model.attention.split_attention`).

    Args:
      positions: int32 [L], 0 on padding.
      example_lengths: int32 [E].

    Returns:
      Roles and groups, int32 [L].
    """
    roles, groups = np.full(shape.length, Role.PAD, np.int32), np.zeros(shape.length, np.int32)
    roles[0] = Role.SINK
    for e, length in enumerate(example_lengths):
        ie = slice(1 + e * shape.context, 1 + e * shape.context + int(length))
        xp = slice(shape.context_end + e * shape.xp, shape.context_end + (e + 1) * shape.xp)
        roles[ie], roles[xp] = Role.IE, Role.XP
        groups[ie] = groups[xp] = e
    roles[shape.xp_end :][positions[shape.xp_end :] > 0] = Role.TD
    return roles, groups


_Said = tuple[Kind, int, int, str, np.ndarray | None]


def _say(
    ids: np.ndarray, start: int, stop: int, role: Role, learned: np.ndarray, prompter: Prompter, grid: tuple[int, int]
) -> Iterator[_Said]:
    """What slots `start` to `stop`, of one role, say: (kind, first, end, text, codes)."""
    if role in (Role.XP, Role.PAD):
        yield "xp" if role == Role.XP else "pad", start, stop, "", None
        return
    vocab, mask = prompter.vocab, prompter.vocab.text_mask
    size = prompter.layout.num_tokens(*grid)
    is_text = lambda i: bool(mask[ids[i]]) and ids[i] != vocab.eos
    while start < stop:
        if ids[start] == vocab.boi and start + size <= stop and (codes := _image(ids[start : start + size], prompter, grid)) is not None:
            yield "image", start, start + size, "", codes
            start += size
            continue
        end, text = start + 1, is_text(start)
        while end < stop and is_text(end) == text and learned[end] == learned[start] and ids[end] != vocab.boi:
            end += 1
        if text:
            yield "text", start, end, prompter.tokenizer.decode(ids[start:end]), None
        else:
            yield "special", start, end, " ".join(_name(int(i), prompter) for i in ids[start:end]), None
        start = end


def _image(ids: np.ndarray, prompter: Prompter, grid: tuple[int, int]) -> np.ndarray | None:
    try:
        return prompter.layout.decode(ids, *grid)
    except UserError:
        return None  # broken: its tokens are shown by name


def _name(token: int, prompter: Prompter) -> str:
    vocab = prompter.vocab
    if vocab.image_start <= token < vocab.image_start + vocab.num_codes:
        return f"code {token - vocab.image_start}"
    known = {getattr(vocab, name): name for name in ("bos", "pad", "eos", "boi", "eoi", "sep")}
    return known.get(token) or f"id {token}"
