"""Exact nearest neighbours by cosine, in slices of keys, on whatever device there is.

queries [q, d] --at most QUERIES_AT_ONCE--> products with `chunk` keys --> best k of the slice --> best k so far
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

QUERIES_AT_ONCE = 1024


def neighbours(
    queries: np.ndarray, keys: np.ndarray, k: int, *, query_groups: np.ndarray | None = None, key_groups: np.ndarray | None = None,
    chunk: int = 65536,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The k nearest keys of each query by cosine, exactly.

    Args:
      queries: float32 [q, d], unit rows.
      keys: float32 [n, d], unit rows.
      query_groups, key_groups: int [q], [n]; a key of the query's own group is never returned (its own row, its session).
      chunk: keys looked at at once; bounds memory at QUERIES_AT_ONCE x chunk floats, beside the keys themselves.

    Returns:
      indices int32 [q, k] and cosines float32 [q, k], best first; ties go to the lowest index. Where fewer than k keys may
      be returned, the index is -1 and the cosine -inf.
    """
    if query_groups is None or key_groups is None:
        query_groups, key_groups = np.full(len(queries), -1), np.zeros(len(keys), int)
    chunk, at_once = min(chunk, len(keys)), min(QUERIES_AT_ONCE, len(queries))  # one shape each, one compilation
    # On the device once, for all queries.
    parts = [
        (jnp.asarray(_padded(keys[start : start + chunk], chunk)), jnp.asarray(_padded(key_groups[start : start + chunk], chunk)),
         np.arange(chunk) < len(keys) - start, start)
        for start in range(0, len(keys), chunk)
    ]  # fmt: skip
    found, cosines = np.empty((len(queries), k), np.int32), np.empty((len(queries), k), np.float32)
    for first in range(0, len(queries), at_once):
        rows = slice(first, min(first + at_once, len(queries)))
        asked, groups = (jnp.asarray(_padded(values[rows], at_once)) for values in (queries, query_groups))
        best, index = jnp.full((at_once, k), -jnp.inf), jnp.full((at_once, k), -1)
        for part, part_groups, valid, start in parts:
            best, index = _merge(best, index, asked, groups, part, part_groups, valid, start, k)
        found[rows], cosines[rows] = (np.asarray(values)[: rows.stop - first] for values in (index, best))
    return found, cosines


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.pad(values, [(0, length - len(values))] + [(0, 0)] * (values.ndim - 1))


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
