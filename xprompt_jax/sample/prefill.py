"""Filling the cache before decoding: the SINK, the XP tokens of compiled examples, the task's prompt.

    [ SINK | XP_1 .. XP_E | prompt ...... | answer ................ | W ]

Rows may differ in the number of examples and in the length of the prompt; each row stays contiguous (model/cache.py).

Long prompts go in by pieces, each attending to what is in the cache: the scores of all rows and heads would otherwise be prompt x cache
at once, 16 GB for 48 rows of a 7B model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xprompt_jax.config import ModelConfig
from xprompt_jax.errors import UserError
from xprompt_jax.model.cache import Cache, empty_cache, write
from xprompt_jax.model.chameleon import Chameleon, extend
from xprompt_jax.model.layers import rotary
from xprompt_jax.prompt import todo_start
from xprompt_jax.sample.compiled import CompiledPrompt

PROMPT_STEP = 64
"""Prompts are padded to a multiple of this, so that few programs are compiled."""

PIECE = 256
"""Most tokens of a prompt that are computed at once, in every row."""

MAX_TOKENS = 16384
"""Most tokens of a row, prompt and answer: three times the longest context that the family's papers name (5120)."""


def round_up(length: int, step: int) -> int:
    """The next multiple of `step`, at least one of them."""
    return max(step, -(-length // step) * step)


def check_room(prompt: int, room: int) -> None:
    """Refuses a prompt of so many tokens that those to come do not fit behind it.

    Raises:
      UserError: both are more than MAX_TOKENS.
    """
    if prompt + room > MAX_TOKENS:
        raise UserError(f"a prompt of {prompt} tokens and {room} to come do not fit {MAX_TOKENS}: shorten the text, give fewer images, "
                        "or ask for less")  # fmt: skip


def prefill(
    model: Chameleon, config: ModelConfig, contexts: Sequence[CompiledPrompt | None], prompts: Sequence[np.ndarray], bos: int,
    *, room: int, dtype, cache_dtype=None, piece: int = PIECE,
) -> Cache:  # fmt: skip
    """A cache that holds SINK, XP and prompt of every row.

    Args:
      model: decoder with its layers apart.
      contexts: per row, its compiled examples, or None.
      prompts: per row, int32 [n] task tokens; may be empty.
      room: slots to keep free behind the longest row.
      dtype: of the computation.
      cache_dtype: of the cache; None is the computation's.
      piece: most tokens at once; it changes what memory is needed, and nothing of what comes out but rounding.

    Raises:
      UserError: a prompt and what is to come after it are longer than MAX_TOKENS.
    """
    longest = max(len(p) for p in prompts)
    check_room(longest, room)
    batch, most = len(prompts), max((c.num_examples if c else 0) for c in contexts)
    width = round_up(longest, PROMPT_STEP)
    xp = next((c.k.shape[2] for c in contexts if c), 0)
    shape = (config.num_layers, batch, most * xp, config.num_kv_heads, config.head_dim)
    k, v = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    positions = np.zeros((batch, most * xp), np.int32)
    start = np.ones(batch, np.int32)
    for row, context in enumerate(contexts):
        if context is None:
            continue
        for e in range(context.num_examples):
            at = slice(e * xp, (e + 1) * xp)
            k[:, row, at], v[:, row, at] = context.k[e], context.v[e]
            positions[row, at] = 1 + context.lengths[e] + np.arange(xp)
        start[row] = todo_start(context.lengths.tolist(), xp)
    tokens = np.zeros((batch, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    filled = np.array([c.num_examples * xp if c else 0 for c in contexts], np.int32)
    return _prefill(
        model, k, v, positions, filled, start, tokens, np.array([len(p) for p in prompts], np.int32), np.int32(bos),
        slots=1 + most * xp + width + room, piece=piece, dtype=jnp.dtype(dtype), cache_dtype=jnp.dtype(cache_dtype or dtype), config=config,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("slots", "piece", "dtype", "cache_dtype", "config"))
def _prefill(model, k, v, positions, filled, start, tokens, counts, bos, *, slots, piece, dtype, cache_dtype, config) -> Cache:
    batch, width = tokens.shape
    embed = model.embed[...].astype(dtype)
    cache = empty_cache(config, batch, slots, cache_dtype)
    sink = jnp.broadcast_to(embed[bos], (batch, 1, config.dim))
    _, cache = extend(model.blocks, sink, cache, jnp.ones(batch, jnp.int32), config.rope_theta)
    ones = jnp.ones(batch, jnp.int32)
    ks = tuple(write(b, rotary(k[n].astype(dtype), positions, config.rope_theta), ones) for n, b in enumerate(cache.k))
    vs = tuple(write(b, v[n], ones) for n, b in enumerate(cache.v))
    cache = Cache(ks, vs, cache.length + filled, start)

    def put_in(cache: Cache, some: tuple[jax.Array, jax.Array]) -> tuple[Cache, None]:
        tokens, first = some
        kept = jnp.clip(counts - first, 0, tokens.shape[1])
        return extend(model.blocks, embed[tokens], cache, kept, config.rope_theta)[1], None

    whole = width // piece * piece
    if whole:
        pieces = tokens[:, :whole].reshape(batch, -1, piece).swapaxes(0, 1)
        cache, _ = jax.lax.scan(put_in, cache, (pieces, jnp.arange(0, whole, piece)))
    if whole < width:
        cache, _ = put_in(cache, (tokens[:, whole:], jnp.int32(whole)))
    return cache
