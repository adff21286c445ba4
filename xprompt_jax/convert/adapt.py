"""What a foreign checkpoint lacks, made on the way in: XP embeddings, an image head that can be trained, another type."""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal

import jax
import ml_dtypes
import numpy as np

from xprompt_jax.convert.weights import VQGAN_PREFIX, Source
from xprompt_jax.errors import UserError
from xprompt_jax.tokens import IMAGE_START

log = logging.getLogger(__name__)

ImageHead = Literal["auto", "keep", "zero", "he"]

_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_STATISTIC_ROWS = 4096  # embedding rows looked at at once


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What may change on the way; the defaults change nothing but heads that cannot draw."""

    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Of the decoder's weights; the VQGAN keeps its own."""
    image_head: ImageHead = "auto"
    """Head rows of the image codes: keep; zero; he (normal, std sqrt(2 / D)); auto keeps those of models that were trained to
    draw (ours, Lumina-mGPT's, and Hugging Face folders with a VQGAN decoder) and zeroes the released ones, which cannot."""
    seed: int = 0
    """Of new XP embeddings and of `he`."""


class Adapted:
    """A source with the missing made and the useless replaced: XP embeddings, image head, type. Itself a `Source`."""

    has_xp = True

    def __init__(self, source: Source, options: Adaptation):
        self.kind, self.config, self.tokenizer = source.kind, source.config, source.tokenizer
        self.draws, self.files = source.draws, source.files
        self._source, self._options = source, options
        self.image_head = ("keep" if source.draws else "zero") if options.image_head == "auto" else options.image_head
        if options.image_head == "auto" and not source.draws:
            log.warning("the image head of a released Chameleon cannot draw: its rows are set to zero; train it (or --image-head keep)")
        self._statistics: tuple[np.ndarray, float] | None = None
        self._image_dtype = source.read(f"{VQGAN_PREFIX}quantize.embedding.weight").dtype
        self._word_dtype = source.read("norm").dtype if options.dtype == "keep" else _DTYPES[options.dtype]

    def dtype(self, name: str) -> np.dtype:
        """Of the tensor as it will be written."""
        return self._image_dtype if name.startswith(VQGAN_PREFIX) else self._word_dtype

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it will be written."""
        value = self._new_xp() if name == "xp" and not self._source.has_xp else self._source.read(name)
        if name == "embed" and not self._source.has_xp:
            self._statistics = _statistics(value)
        if name == "head" and self.image_head != "keep":
            value = self._new_head(value)
        if name.startswith(VQGAN_PREFIX) or self._options.dtype == "keep":
            return value
        return self._cast(name, value)

    def _cast(self, name: str, value: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = value.astype(_DTYPES[self._options.dtype])
        if self._options.dtype == "float16" and not np.isfinite(cast).all() and np.isfinite(value).all():
            raise UserError(f"{name}: has numbers beyond 65504, the largest of float16; convert to bfloat16 or float32")
        return cast

    def _new_head(self, head: np.ndarray) -> np.ndarray:
        head, columns = head.copy(), slice(IMAGE_START, IMAGE_START + self.config.vq.num_codes)
        if self.image_head == "zero":
            head[:, columns] = 0
        else:
            std = (2 / len(head)) ** 0.5
            head[:, columns] = (std * np.random.default_rng(self._options.seed).standard_normal(head[:, columns].shape)).astype(head.dtype)
        return head

    def _new_xp(self) -> np.ndarray:
        """Rows around the mean word embedding, as `model.xp.init_xp` draws them, without the table in memory twice."""
        mean, std = self._statistics or _statistics(self._source.read("embed"))
        shape = (self.config.num_xp_tokens, len(mean))
        noise = np.asarray(jax.random.normal(jax.random.key(self._options.seed), shape))
        return (mean + std * noise).astype(self._source.read("norm").dtype)


def _statistics(embed: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean row (float32 [D]) and standard deviation over all entries of an embedding [V, D]."""
    total, squares = np.zeros(embed.shape[1]), 0.0
    for start in range(0, len(embed), _STATISTIC_ROWS):
        rows = embed[start : start + _STATISTIC_ROWS].astype(np.float32)
        total += rows.sum(axis=0, dtype=np.float64)
        squares += float(np.square(rows).sum(dtype=np.float64))
    mean = total.sum() / embed.size
    return (total / len(embed)).astype(np.float32), float(np.sqrt(max(squares / embed.size - mean**2, 0.0)))
