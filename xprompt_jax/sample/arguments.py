"""What a person hands over: taken as it is meant, or refused in one line that names it."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import PIL.Image

from xprompt_jax.config import ModelConfig
from xprompt_jax.errors import UserError
from xprompt_jax.tokens import Vocabulary

MAX_SEED = 2**32 - 1
"""A seed is a word of 32 bits: JAX would cut a longer one, and two seeds would draw one image."""


def _told(value: Any) -> str:
    return " ".join(repr(value).split())[:60]


def number(name: str, value: Any) -> float:
    """A finite number, of Python, NumPy or JAX.

    Raises:
      UserError: it is none.
    """
    try:
        found = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{name} must be a finite number, not {_told(value)}")
    return found


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number from `low` to `high`.

    Raises:
      UserError: it is none, or lies outside.
    """
    try:
        found = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number, not {_told(value)}") from None
    if found < low or (high is not None and found > high):
        raise UserError(f"{name} {found} must be at least {low}" + (f" and at most {high}" if high is not None else ""))
    return found


def seed_of(value: Any, name: str = "seed") -> int:
    """A seed.

    Raises:
      UserError: it is no whole number of 32 bits.
    """
    return whole(name, value, 0, MAX_SEED)


def check_text(name: str, value: Any) -> None:
    """Refuses what is no text.

    Raises:
      UserError: it is none.
    """
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text, not {_told(value)}")


def check_list(values: Any, name: str, what: str) -> None:
    """Refuses nothing, and a single value where a list of them is meant.

    Raises:
      UserError: with the cure.
    """
    one = (
        isinstance(values, np.ndarray)
        and values.dtype.kind in "biuf"
        and (values.ndim < 3 or (values.ndim == 3 and values.dtype == np.uint8 and values.shape[2] in (3, 4)))
    )
    if values is not None and (one or isinstance(values, str | PIL.Image.Image) or not hasattr(values, "__len__")):
        raise UserError(f"{name} takes a list; put the {what} into [ ]")
    if values is None or not len(values):
        raise UserError(f"{name} needs at least one {what}")


def check_tokenizer(vocab: Vocabulary, config: ModelConfig) -> None:
    """Refuses a tokenizer that is not the model's.

    Raises:
      UserError: it has more words, or other image words.
    """
    if vocab.size > config.vocab_size:
        raise UserError(f"the tokenizer has {vocab.size} words, the model only {config.vocab_size}; "
                        "use the text_tokenizer.json that belongs to the weights")  # fmt: skip
    if vocab.num_codes != config.vq.num_codes:
        raise UserError(f"the tokenizer has {vocab.num_codes} image words, the VQGAN {config.vq.num_codes} codes; "
                        "use files that belong together")  # fmt: skip
