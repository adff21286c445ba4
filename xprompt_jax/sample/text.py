"""Writing text: one token at a time over the whole vocabulary, per-row stop, in chunks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from xprompt_jax.model.cache import Cache
from xprompt_jax.model.chameleon import Chameleon, extend, project_logits
from xprompt_jax.sample.logits import Sampling, choose, gumbel, penalise_repeats


@functools.partial(jax.jit, static_argnames=("steps", "sampling", "repetition_penalty"), donate_argnames=("cache",))
def decode_text(
    model: Chameleon, cache: Cache, token: jax.Array, start: jax.Array, seen: jax.Array, done: jax.Array, allowed: jax.Array,
    eos: jax.Array, keys: jax.Array, *, steps: int, sampling: Sampling, repetition_penalty: float,
) -> tuple[Cache, jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Writes `steps` more tokens.

    Args:
      model: decoder with its layers apart.
      cache: B rows; holds everything before `token`.
      token: int32 [B], the newest token of each row, not in the cache yet.
      start: int32, how many tokens were written before (numbers the noise).
      seen: bool [B, V], tokens written so far.
      done: bool [B], rows that have ended; they go on with eos.
      allowed: bool [V], words that text may use, eos among them.
      keys: [B].

    Returns:
      cache, token, seen, done, and the tokens written, int32 [B, steps].
    """
    head = model.head[...]

    def step(carry, i):
        cache, token, seen, done = carry
        x = model.embed[...].astype(cache.k[0].dtype)[token[:, None]]
        h, cache = extend(model.blocks, x, cache, jnp.where(done, 0, 1), model.config.rope_theta)
        logits = project_logits(model.final(h), head)[:, 0]
        logits = jnp.where(allowed, penalise_repeats(logits, seen, repetition_penalty), -jnp.inf)
        noise = gumbel(keys, jnp.full((token.shape[0], 1), start + i), logits.shape[-1])[:, 0]
        token = jnp.where(done, eos, choose(logits, noise, sampling))
        seen = seen | (jnp.arange(seen.shape[1]) == token[:, None])
        return (cache, token, seen, done | (token == eos)), token

    (cache, token, seen, done), written = jax.lax.scan(step, (cache, token, seen, done), jnp.arange(steps))
    return cache, token, seen, done, written.T
