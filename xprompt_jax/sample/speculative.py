"""Drawing images: lossless parallel decoding, of which one-by-one decoding is the window of 1.

All tokens of an image are guessed, a window of W is computed at once, and what agrees is kept:

    guess     boi  17  4  9 | 9  9  9  9     committed | drafts
                         ^ pos
    window               9    9  9  9        fed at positions pos .. pos+W-1
    proposal                  9  3  8  1     for positions pos+1 .. pos+W
    agrees                    y  n           the first proposal is always right, since its whole prefix is committed;
                                             a later one is right while all drafts before it were
    commit                    9  3           and 8, 1 stay as drafts for the next pass

Two rules make proposals; both lose nothing (facts: inference.md 1.3, 1.5):

    jacobi        argmax(logits + noise), the noise of every position fixed by the seed. The image is a deterministic
                  function of the prompt and the seed, the same at every W: exactly the tokens of one-by-one decoding come
                  out. In float32 on one device that is to the last bit of every token; in bfloat16 a near tie may fall
                  differently when W changes the matrix shapes, and so may the rounding of a key in an int8 cache.
    speculative   the draft, accepted or redrawn (rejection.py). Fewer passes; a seed's image depends on W, its law does not.

Rows commit as many tokens as they have, each for itself. A row that reached the end of the chunk waits: it is not cut at
the chunk's end, so where the chunks end changes nothing in its image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xprompt_jax.model.cache import Cache
from xprompt_jax.model.chameleon import Chameleon, extend, project_logits
from xprompt_jax.model.quantize import Int8
from xprompt_jax.sample.logits import Sampling, choose, gumbel, probabilities
from xprompt_jax.sample.rejection import couple
from xprompt_jax.tokens import CODE

# look(memory, fed [B, W], pos [B]) -> (float32 [R, B, W, V], memory): the laws after tokens `fed`, which stand at pos .. pos+W-1.
Look = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Drafts(NamedTuple):
    """B images half drawn."""

    memory: Any
    """Of the model: what it knows of tokens 0 .. pos-1, and of what was fed after them, which it must not look at."""
    guess: jax.Array
    """int32 [B, n + W]; tokens 0 .. pos are final, the rest are drafts."""
    pos: jax.Array
    """int32 [B], last final token of each row."""
    law: jax.Array | None
    """float32 [B, W, V], what the drafts of tokens pos+1 .. pos+W were drawn from; None under the rule jacobi."""
    passes: jax.Array
    """int32, passes so far."""
    sane: jax.Array
    """bool, whether all logits were finite."""


def start(memory: Any, guess: jax.Array, first_id: int, num_codes: int, window: int, *, speculative: bool) -> Drafts:
    """Nothing drawn but token 0; guesses are drafts that were not drawn, so their law is one-hot."""
    law = jax.nn.one_hot(guess[:, 1 : window + 1] - first_id, num_codes, dtype=jnp.float32) if speculative else None
    return Drafts(memory, guess, jnp.zeros(guess.shape[0], jnp.int32), law, jnp.int32(0), jnp.bool(True))


def decode(
    look: Look, drafts: Drafts, template: jax.Array, until: jax.Array, keys: jax.Array, branch_weights: jax.Array,
    first_id: jax.Array, sampling: Sampling, *, window: int,
) -> Drafts:  # fmt: skip
    """Draws until every row has reached token `until`; see the drawing above.

    Args:
      look: the model. Logits it gives for one position may depend on tokens up to that position alone.
      drafts: from `start` or from the last call.
      template: int32 [n + W], forced ids, and CODE where a code is drawn (beyond n: anything but CODE).
      until: int32, at most the last CODE of the template.
      keys: [B], one per image.
      branch_weights: float32 [R], guidance.
      first_id: id of code 0.
      sampling: after guidance.
      window: W, tokens computed per pass.

    Returns:
      drafts.
    """
    index = jnp.arange(window)
    last = jnp.max(jnp.where(template == CODE, jnp.arange(template.shape[0]), 0))
    cut = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, window))
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0))

    def one_pass(d: Drafts) -> Drafts:
        fed, draft = cut(d.guess, d.pos), cut(d.guess, d.pos + 1)
        logits, memory = look(d.memory, fed, d.pos)
        logits = jnp.einsum("r,rbwv->bwv", branch_weights, logits)
        target = d.pos[:, None] + 1 + index

        if d.law is None:
            drawn = choose(logits, gumbel(keys, target, logits.shape[-1]), sampling)
        else:
            p = probabilities(logits, sampling)
            # Fresh noise for every pass, known by where the row then stood: it never stands twice at one place.
            noise = jax.vmap(lambda key, at, t: jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, at), i))(t))
            drawn = couple(p, d.law, draft - first_id, noise(keys, d.pos, target))
        forced = template[jnp.minimum(target, template.shape[0] - 1)]
        proposal = jnp.where(forced == CODE, drawn + first_id, forced)

        active = d.pos < until
        agrees = jnp.cumprod(draft[:, :-1] == proposal[:, :-1], axis=1)
        kept = jnp.where(active, jnp.minimum(1 + jnp.sum(agrees, axis=1), last - d.pos), 0).astype(jnp.int32)
        guess = put(d.guess, jnp.where(active[:, None], proposal, draft), d.pos + 1)
        pos = d.pos + kept
        law = d.law
        if law is not None:
            moved = index + kept[:, None]
            newest = jnp.take_along_axis(p, jnp.minimum(moved, window - 1)[..., None], axis=1)
            untouched = jax.nn.one_hot(cut(guess, pos + 1) - first_id, p.shape[-1])
            newest = jnp.where((moved < window)[..., None], newest, untouched)
            law = jnp.where(active[:, None, None], newest, law)
        return Drafts(memory, guess, pos, law, d.passes + 1, d.sane & jnp.all(jnp.isfinite(logits)))

    return jax.lax.while_loop(lambda d: jnp.any(d.pos < until), one_pass, drafts)


@functools.partial(jax.jit, static_argnames=("window", "dtype"), donate_argnames=("drafts",))
def decode_image(
    model: Chameleon, image_head: jax.Array | Int8, first_id: jax.Array, drafts: Drafts, template: jax.Array, until: jax.Array,
    keys: jax.Array, branch_weights: jax.Array, sampling: Sampling, *, window: int, dtype: str,
) -> Drafts:  # fmt: skip
    """`decode` with the transformer; the memory is a cache of R * B rows, branch-major.

    Args:
      model: decoder with its layers apart.
      image_head: [D, codes], the head's columns of the image codes; no other token can be drawn.
      dtype: of the computation.
    """
    branches, cache = branch_weights.shape[0], drafts.memory
    prompt = jnp.tile(drafts.pos, branches)
    length, position = cache.length - prompt, cache.position - prompt
    at = lambda cache, pos: Cache(cache.k, cache.v, length + jnp.tile(pos, branches), position + jnp.tile(pos, branches))

    def look(cache: Cache, fed: jax.Array, pos: jax.Array) -> tuple[jax.Array, Cache]:
        x = model.embed[...].astype(dtype)[jnp.tile(fed, (branches, 1))]
        h, cache = extend(model.blocks, x, at(cache, pos), jnp.zeros_like(length), model.config.rope_theta)
        return project_logits(model.final(h), image_head).reshape(branches, *fed.shape, -1), cache

    done = decode(look, drafts, template, until, keys, branch_weights, first_id, sampling, window=window)
    return done._replace(memory=at(done.memory, done.pos))
