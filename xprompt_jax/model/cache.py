"""The static key-value cache: one buffer per layer and side, rows of different lengths.

    row 0:  SINK  XP XP XP XP   TD TD TD TD TD TD  .  .  .  .      length 11
    row 1:  SINK  TD TD TD      .  .  .  .  .  .   .  .  .  .      length 4

A row is contiguous: what is valid is 0 .. length-1, so a row needs one number, not a mask. Writing W tokens puts their
keys at length .. length+W-1; a token that is not kept (padding of a shorter prompt, a rejected draft) is dropped by not
advancing the length, and the next write covers it. The buffers must therefore be W longer than what is ever kept:
`dynamic_update_slice` clamps its start, and a window written past the end would silently shift left.

Layers have buffers of their own because scanning over a stacked cache copies all of it in every step (facts:
inference.md 5). Heads come before slots, so that what a head reads of a row is one block of memory: the matrix products of attention then
take the buffer as it lies, and nothing of it is copied in a step.

Buffers of int8 hold half of bfloat16's bytes, with a scale for each token and head (quantize.py); a token is rounded when it is written.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from xprompt_jax.config import ModelConfig
from xprompt_jax.model.quantize import Int8, quantize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys (rotated) and values of every layer."""

    k: tuple[jax.Array | Int8, ...]
    """N buffers [B, G, T, K]."""
    v: tuple[jax.Array | Int8, ...]
    """N buffers [B, G, T, K]."""
    length: jax.Array
    """int32 [B], filled slots of each row."""
    position: jax.Array
    """int32 [B], rotary position of each row's next token."""


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype) -> Cache:
    """A cache of B rows of T slots, nothing in it yet; dtype int8 makes buffers of `Int8`."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)

    def buffer() -> jax.Array | Int8:
        values = jnp.zeros(shape, dtype)
        return Int8(values, jnp.zeros((*shape[:-1], 1))) if values.dtype == jnp.int8 else values

    buffers = lambda: tuple(buffer() for _ in range(config.num_layers))
    return Cache(buffers(), buffers(), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))


def write(buffer: jax.Array | Int8, new: jax.Array, start: jax.Array) -> jax.Array | Int8:
    """Puts new [B, W, G, K] into buffer [B, G, T, K] at start[b] of each row; start + W must not exceed T."""
    put = lambda row, value, at: jax.lax.dynamic_update_slice_in_dim(row, value, at, axis=1)
    new = new.swapaxes(1, 2)
    value = quantize(new, -1) if isinstance(buffer, Int8) else new.astype(buffer.dtype)
    return jax.tree.map(lambda rows, values: jax.vmap(put)(rows, values, start), buffer, value)
