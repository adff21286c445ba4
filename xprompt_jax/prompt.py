"""A sample becomes slots: ids, roles, groups, positions and loss weights in a static shape.

A row of a bucket with E examples of at most C tokens, S XP tokens each, and a task of at most T tokens:

    slot   0      1 ............................ 1+EC ................... 1+E(C+S) ................ L
           SINK | IE_1 pad | IE_2 pad | .. | IE_E pad | XP_1 | .. | XP_E | TD ............... pad |
           bos    instruction, input,                   S each             instruction, input, sep,
                  sep, output                                              answer, eos

Who sees whom (the contract; rows are queries, columns keys; always causal and within one row's document):

    q \\ k | SINK | IE         | XP                 | TD
    IE    | yes  | own group  | no                 | no
    XP    | yes  | own group  | own group, causal  | no
    TD    | yes  | never      | all groups         | causal

Positions (rotary): each example is numbered as if it stood alone, SINK 0, IE 1..n, XP n+1..n+S; the task goes on after
the longest example. So an example's keys and values do not depend on its neighbours: a compiled example is portable, and
n of them can be put side by side in any order. With one example this is plain contiguous numbering.

Over-long text or examples are refused, never cut through: half an image is not a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from xprompt_jax.config import BucketConfig
from xprompt_jax.errors import UserError
from xprompt_jax.tokens import Layout, Tokenizer

DESCRIBE_QUESTION = "Describe the difference between the input image and the output image."
"""Task text of a difference description; the pair stands in IE, so the answer comes through XP alone."""


class Role(IntEnum):
    """What a token is to the attention mask."""

    SINK = 0
    IE = 1
    XP = 2
    TD = 3
    PAD = 4


@dataclass(frozen=True)
class SlotShape:
    """The static shape of a row: E examples of C slots, S XP slots each, T task slots."""

    examples: int
    context: int
    xp: int
    todo: int

    def __post_init__(self):
        if self.examples and not self.xp:
            raise UserError("a row with examples needs XP tokens to carry them: set model.num_xp_tokens above 0")

    @property
    def context_end(self) -> int:
        """First slot after all example slots."""
        return 1 + self.examples * self.context

    @property
    def xp_end(self) -> int:
        """First task slot."""
        return self.context_end + self.examples * self.xp

    @property
    def length(self) -> int:
        """All slots of a row (L)."""
        return self.xp_end + self.todo

    @classmethod
    def of(cls, bucket: BucketConfig, num_xp: int, mode: str = "xprompt") -> SlotShape:
        """The shape of a bucket's rows under an ablation mode.

        xprompt: as configured. causal: the example is part of the task, nothing is hidden and there is no XP (the
        paper's baseline). none: the example is left out.
        """
        if mode == "xprompt":
            return cls(bucket.examples, bucket.context, num_xp if bucket.examples else 0, bucket.todo)
        extra = bucket.examples * bucket.context if mode == "causal" else 0
        return cls(0, 0, 0, extra + bucket.todo)


@dataclass(frozen=True)
class Sample:
    """One training or inference sample in tokens, before it has a shape."""

    examples: tuple[np.ndarray, ...]
    """IE tokens of each example, int32 [n]; an empty array is an example that says nothing (for guidance)."""
    prompt: np.ndarray
    """Task tokens that are given, int32."""
    answer: np.ndarray
    """Task tokens to be produced, int32; empty at inference."""


@dataclass(frozen=True)
class Slots:
    """One row (no batch axis). `weights[i]` is the loss weight of predicting `ids[i]`."""

    ids: np.ndarray
    """int32 [L]; XP and PAD slots hold the pad id, which is ignored."""
    roles: np.ndarray
    """int32 [L], values of Role."""
    groups: np.ndarray
    """int32 [L], the example a token belongs to, from 0; 0 for SINK, TD and PAD."""
    positions: np.ndarray
    """int32 [L], rotary positions; 0 on PAD."""
    weights: np.ndarray
    """float32 [L]; zero on SINK, IE, XP and PAD."""
    example_lengths: np.ndarray
    """int32 [E], tokens of each example."""


class Prompter:
    """Turns instructions and image codes into `Sample`s, with one tokenizer and one layout."""

    def __init__(self, tokenizer: Tokenizer, layout: Layout):
        self.tokenizer, self.layout, self.vocab = tokenizer, layout, tokenizer.vocab

    def example(self, instruction: str, input_codes: np.ndarray, output_codes: np.ndarray) -> np.ndarray:
        """IE tokens: instruction, input image, sep, output image."""
        return self._join(instruction, input_codes, [self.vocab.sep], output_codes)

    def task(self, instruction: str, input_codes: np.ndarray) -> np.ndarray:
        """TD tokens before an image answer: instruction, input image, sep."""
        return self._join(instruction, input_codes, [self.vocab.sep])

    def text_task(self, text: str) -> np.ndarray:
        """TD tokens before any answer to a text alone (text to image, a question about the example): text, sep."""
        return self._join(text, [self.vocab.sep])

    def image_answer(self, codes: np.ndarray) -> np.ndarray:
        """An image and eos."""
        return self._join(codes, [self.vocab.eos])

    def text_answer(self, text: str) -> np.ndarray:
        """A text and eos."""
        return self._join(text, [self.vocab.eos])

    def _join(self, *parts: str | list[int] | np.ndarray) -> np.ndarray:
        encode = lambda part: self.tokenizer.encode(part) if isinstance(part, str) else part
        ids = [self.layout.encode(part) if isinstance(part, np.ndarray) else np.array(encode(part), np.int32) for part in parts]
        return np.concatenate(ids)


def fill(sample: Sample, shape: SlotShape, *, bos: int, pad: int, mode: str = "xprompt", loss: str = "answer") -> Slots:
    """Puts a sample into slots.

    Args:
      sample: tokens; under mode `causal` the examples move to the front of the task, under `none` they are left out.
      shape: the row's shape, made for the same mode.
      bos: id of the SINK token.
      pad: id on XP and PAD slots.
      loss: "answer" puts weight on the answer alone, "todo" on every task token.

    Raises:
      UserError: more examples than the shape holds, or an example or the task longer than its slots.
    """
    prompt, examples = sample.prompt, sample.examples
    if mode == "causal":
        prompt, examples = np.concatenate([*examples, prompt]), ()
    elif mode == "none":
        examples = ()
    if len(examples) != shape.examples:
        raise UserError(f"the sample has {len(examples)} examples, the bucket holds {shape.examples}; choose another bucket")
    lengths = [len(e) for e in examples]
    if max(lengths, default=0) > shape.context:
        raise UserError(f"an example of {max(lengths)} tokens does not fit {shape.context} slots; shorten its instruction, "
                        "use smaller images, or raise the bucket's `context`")  # fmt: skip
    todo = np.concatenate([prompt, sample.answer])
    if len(todo) > shape.todo:
        raise UserError(f"a task of {len(todo)} tokens does not fit {shape.todo} slots; shorten its instruction, use smaller "
                        "images, or raise the bucket's `todo`")  # fmt: skip

    ids = np.full(shape.length, pad, np.int32)
    roles = np.full(shape.length, Role.PAD, np.int32)
    groups, positions = np.zeros(shape.length, np.int32), np.zeros(shape.length, np.int32)
    weights = np.zeros(shape.length, np.float32)

    ids[0], roles[0] = bos, Role.SINK
    for e, (tokens, n) in enumerate(zip(examples, lengths, strict=True)):
        ie = slice(1 + e * shape.context, 1 + e * shape.context + n)
        ids[ie], roles[ie], groups[ie], positions[ie] = tokens, Role.IE, e, np.arange(1, n + 1)
        xp = slice(shape.context_end + e * shape.xp, shape.context_end + (e + 1) * shape.xp)
        roles[xp], groups[xp], positions[xp] = Role.XP, e, np.arange(n + 1, n + 1 + shape.xp)
    td = slice(shape.xp_end, shape.xp_end + len(todo))
    start = todo_start(lengths, shape.xp)
    ids[td], roles[td], positions[td] = todo, Role.TD, np.arange(start, start + len(todo))
    if loss == "answer":
        weights[shape.xp_end + len(prompt) : td.stop] = 1.0
    else:
        weights[td] = 1.0
    return Slots(ids, roles, groups, positions, weights, np.array(lengths, np.int32))


def todo_start(example_lengths: Sequence[int], num_xp: int) -> int:
    """Rotary position of the first task token: after the longest example and its XP tokens; 1 without examples."""
    return 1 + max((int(n) + num_xp for n in example_lengths), default=0)


def most_targets(bucket: BucketConfig, shape: SlotShape, loss: str) -> int:
    """A, the most tokens of a bucket's row that carry loss: its `answer`, or under the loss "todo" every task slot."""
    return shape.todo if loss == "todo" else bucket.answer


def stack(rows: Sequence[Slots], max_targets: int) -> dict[str, np.ndarray]:
    """A batch of rows of one shape, as the training step takes it.

    Args:
      rows: B rows.
      max_targets: A, the most tokens of a row that carry loss.

    Returns:
      ids, positions: int32 [B, L]; example_lengths: int32 [B, E]; targets: int32 [B, A], the slots of the tokens to
      predict, padded with slot 0 (the SINK, whose weight is 0); weights: float32 [B, A], zero on that padding.

    Raises:
      UserError: a row has more loss tokens than `max_targets`.
    """
    targets = np.zeros((len(rows), max_targets), np.int32)
    weights = np.zeros((len(rows), max_targets), np.float32)
    for row, slots in enumerate(rows):
        (where,) = np.nonzero(slots.weights)
        if len(where) > max_targets:
            raise UserError(f"a row has {len(where)} loss tokens, the bucket's `answer` allows {max_targets}; raise it")
        targets[row, : len(where)] = where
        weights[row, : len(where)] = slots.weights[where]
    return {
        "ids": np.stack([r.ids for r in rows]),
        "positions": np.stack([r.positions for r in rows]),
        "example_lengths": np.stack([r.example_lengths for r in rows]),
        "targets": targets,
        "weights": weights,
    }
