"""Rejection sampling with coupling: the drafting rule of speculative Jacobi decoding, and why it is exact.

    draft ~ q      accepted with probability min(1, p(draft) / q(draft))
    otherwise      a draw from the residual, max(p - q, 0) normed

Whatever q was, the result is distributed as p, and it equals the draft as often as any rule can make it (maximal coupling).
Applied at every position of a window and not only at the first rejection, it keeps the drafts still while p moves little,
so later passes accept more. What a position now holds was drawn from the newest p, accepted or not: **p is its law from
here on**. Keeping the old q for an accepted draft would bias the images (facts: inference.md 1.3, 1.4).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def couple(p: jax.Array, q: jax.Array, draft: jax.Array, keys: jax.Array) -> jax.Array:
    """Turns drafts with law q into samples with law p, changing as few as possible.

    Args:
      p, q: float32 [..., V], each sums to 1. A draft that was not drawn at all has a one-hot q.
      draft: int32 [...], drawn from q.
      keys: [...], independent of everything the draft depends on.

    Returns:
      int32 [...], drawn from p.
    """

    def one(p, q, draft, key):
        noise = jax.random.uniform(key, (p.shape[0] + 1,), minval=jnp.finfo(jnp.float32).tiny)
        accepted = noise[0] * q[draft] < p[draft]
        residual = jnp.maximum(p - q, 0)
        residual = jnp.where(jnp.any(residual > 0), residual, p)  # p = q: rounding alone can lead here
        redrawn = jnp.argmax(jnp.log(residual) - jnp.log(-jnp.log(noise[1:])))
        return jnp.where(accepted, draft, redrawn).astype(jnp.int32)

    for _ in draft.shape:
        one = jax.vmap(one)
    return one(p, q, draft, keys)
