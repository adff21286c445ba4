"""Retrieval of examples by instruction (RAIE, paper section 3.3): text features and exact nearest neighbours.

The paper uses CLIP B/32 text features and says the distance can be replaced. The encoder here needs no weights: it hashes
words and letter triples, so that instructions that share words come close. Neighbours are exact, in slices of the keys.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


class HashedNgramEncoder:
    """Text -> unit vectors by feature hashing of words, word pairs and letter triples; no weights, stable everywhere."""

    def __init__(self, dim: int = 512):
        self.dim = dim

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim], rows of length 1 (0 for a text without letters or digits)."""
        out = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            for feature, weight in self._features(text):
                digest = hashlib.blake2b(feature.encode(), digest_size=8).digest()
                number = int.from_bytes(digest, "big")
                out[row, number % self.dim] += weight if number >> 63 else -weight  # signs keep collisions unbiased
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)

    @staticmethod
    def _features(text: str):
        words = re.findall(r"\w+", text.lower())
        for word in words:
            yield f"w {word}", 1.0
            padded = f"^{word}$"
            for i in range(len(padded) - 2):
                yield f"t {padded[i : i + 3]}", 0.3
        for pair in itertools.pairwise(words):
            yield "p " + " ".join(pair), 0.7


def neighbours(
    queries: np.ndarray, keys: np.ndarray, k: int, *, query_groups: np.ndarray | None = None, key_groups: np.ndarray | None = None,
    chunk: int = 65536,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The k nearest keys of each query by cosine, exactly.

    Args:
      queries: float32 [q, d], unit rows.
      keys: float32 [n, d], unit rows.
      query_groups, key_groups: int [q], [n]; a key of the query's own group is never returned (its own row, its session).
      chunk: keys looked at at once; bounds memory at q x chunk floats.

    Returns:
      indices int [q, k] and cosines float32 [q, k], best first; ties go to the lowest index. Where fewer than k keys may
      be returned, the index is -1 and the cosine -inf.
    """
    if query_groups is None or key_groups is None:
        query_groups, key_groups = np.full(len(queries), -1), np.zeros(len(keys), int)
    best = jnp.full((len(queries), k), -jnp.inf)
    index = jnp.full((len(queries), k), -1)
    for start in range(0, len(keys), chunk):
        part = keys[start : start + chunk]
        pad = min(chunk, len(keys)) - len(part)  # one shape, one compilation
        scored = np.pad(part, ((0, pad), (0, 0)))
        valid = np.arange(len(scored)) < len(part)
        groups = np.pad(key_groups[start : start + chunk], (0, pad))
        best, index = _merge(best, index, queries, query_groups, scored, groups, valid, start, k)
    return np.asarray(index), np.asarray(best)


@functools.partial(jax.jit, static_argnames="k")
def _merge(best, index, queries, query_groups, keys, key_groups, valid, start, k):
    scores = jnp.einsum("qd,nd->qn", queries, keys, precision="highest")
    scores = jnp.where(valid & (query_groups[:, None] != key_groups), scores, -jnp.inf)
    top, at = jax.lax.top_k(scores, min(k, keys.shape[0]))
    # The running best stands first, so an equal score from a later slice does not displace it.
    scores = jnp.concatenate([best, top], axis=1)
    indices = jnp.concatenate([index, jnp.where(jnp.isneginf(top), -1, at + start)], axis=1)
    best, chosen = jax.lax.top_k(scores, k)
    return best, jnp.take_along_axis(indices, chosen, axis=1)
