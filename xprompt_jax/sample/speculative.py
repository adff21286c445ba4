"""Drawing images: lossless parallel decoding by fixed noise, of which one-by-one decoding is the window of 1.

The noise of every position is fixed by the seed, so the image is a deterministic function of the prompt, and it can be
found by Jacobi iteration: guess all tokens, compute a window of W at once, keep what agrees.

    guess     boi  17  4  9 | 9  9  9  9     committed | drafts
                         ^ pos
    window               9    9  9  9        fed at positions pos .. pos+W-1
    proposal                  9  3  8  1     argmax(logits + noise) for positions pos+1 .. pos+W
    agrees                    y  n           the first proposal is always right, since its whole prefix is committed;
                                             a later one is right while all drafts before it were
    commit                    9  3           and 8, 1 stay as drafts for the next pass

Exactly the tokens of one-by-one decoding come out, in fewer passes (facts: inference.md 1.3, 1.5). In float32 on one
device that is to the last bit of every token; in bfloat16 a near tie may fall differently when W changes the matrix shapes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from xprompt_jax.model.cache import Cache
from xprompt_jax.model.chameleon import Chameleon, extend, project_logits
from xprompt_jax.sample.logits import Sampling, choose, gumbel
from xprompt_jax.tokens import CODE


@functools.partial(jax.jit, static_argnames=("window", "sampling"), donate_argnames=("cache", "guess"))
def decode_image(
    model: Chameleon, image_head: jax.Array, image_start: jax.Array, cache: Cache, guess: jax.Array, pos: jax.Array,
    template: jax.Array, until: jax.Array, keys: jax.Array, branch_weights: jax.Array, *, window: int, sampling: Sampling,
) -> tuple[Cache, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Draws image tokens until every row has reached token `until`.

    Args:
      model: decoder with its layers apart.
      image_head: [D, codes], the head's columns of the image codes; no other token can be drawn.
      image_start: id of code 0.
      cache: R * B rows, branch-major; holds everything before token `pos` of the image.
      guess: int32 [B, n + W]; tokens 0 .. pos are final, the rest are drafts.
      pos: int32 [B], last final token of each row.
      template: int32 [n + W], forced ids, and CODE where a code is drawn (beyond n: anything but CODE).
      until: int32, the last token to produce.
      keys: [B], one per image.
      branch_weights: float32 [R], guidance.
      window: W, tokens computed per pass.

    Returns:
      cache, guess, pos, and the number of passes.
    """
    branches, batch = branch_weights.shape[0], guess.shape[0]
    index = jnp.arange(window)

    def cut(row: jax.Array, at: jax.Array, size: int) -> jax.Array:
        return jax.vmap(lambda r, a: jax.lax.dynamic_slice_in_dim(r, a, size))(row, at)

    def one_pass(state):
        cache, guess, pos, passes = state
        fed = cut(guess, pos, window)
        x = model.embed[...].astype(image_head.dtype)[jnp.tile(fed, (branches, 1))]
        h, cache = extend(model.blocks, x, cache, jnp.zeros(branches * batch, jnp.int32), model.config.rope_theta)
        logits = project_logits(model.final(h), image_head).reshape(branches, batch, window, -1)
        logits = jnp.einsum("r,rbwv->bwv", branch_weights, logits)

        target = pos[:, None] + 1 + index
        drawn = choose(logits, gumbel(keys, target, logits.shape[-1]), sampling) + image_start
        forced = template[jnp.minimum(target, template.shape[0] - 1)]
        proposal = jnp.where(forced == CODE, drawn, forced)

        agrees = jnp.cumprod(fed[:, 1:] == proposal[:, :-1], axis=1)
        kept = jnp.minimum(1 + jnp.sum(agrees, axis=1), jnp.maximum(until - pos, 0)).astype(jnp.int32)
        active = (kept > 0)[:, None]
        guess = jax.vmap(lambda g, p, a: jax.lax.dynamic_update_slice_in_dim(g, p, a, 0))(
            guess, jnp.where(active, proposal, cut(guess, pos + 1, window)), pos + 1
        )
        advance = jnp.tile(kept, branches)
        cache = Cache(cache.k, cache.v, cache.length + advance, cache.position + advance)
        return cache, guess, pos + kept, passes + 1

    return jax.lax.while_loop(lambda s: jnp.any(s[2] < until), one_pass, (cache, guess, pos, jnp.int32(0)))
