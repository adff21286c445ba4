"""Writing: text, and text with images in it, several rows at once, each in a state of its own.

    row 0   a  red  ball  boi  c  c  c  c ...  c  eoi  is  eos          place: -1 in text, else the newest token's place in the
    row 1   it  got  darker  eos                                      image's template

    text     may go on with a word or the end; or with begin-image, where a whole image still fits into what is left of
             the row and the row may have another image
    image    follows the layout's template: where it has an id, that id; where it has CODE, an image code and nothing else

So an image has exactly its rows x columns codes and its frame, no XP or reserved id is ever written, and a caption or a
difference description is the case of no images. Images can be guided away from the text: each row then has a second one
that sees the image alone, from begin-image on (Lumina's negative context; facts: inference.md 6).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from xprompt_jax.errors import UserError
from xprompt_jax.model.cache import Cache
from xprompt_jax.model.chameleon import Chameleon, extend, project_logits
from xprompt_jax.sample.draw import MAX_BATCH, Prompt, check_sane, explained_memory, image_keys, pad_rows
from xprompt_jax.sample.logits import Sampling, choose, gumbel, penalise_repeats
from xprompt_jax.sample.prefill import prefill
from xprompt_jax.tokens import CODE, Vocabulary

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

_STEPS = 32
"""Tokens between two looks at whether all rows have ended."""


class Rows(NamedTuple):
    """B rows half written."""

    cache: Cache
    """2B rows under guidance, the ones that see an image alone behind; holds everything before `token`."""
    token: jax.Array
    """int32 [B], the newest token of each row."""
    place: jax.Array
    """int32 [B], its place in an image's template; -1 in text."""
    images: jax.Array
    """int32 [B], images the row may still begin."""
    seen: jax.Array
    """bool [B, V], words written so far."""
    done: jax.Array
    """bool [B], rows that have ended."""
    sane: jax.Array
    """bool, whether all logits were finite."""


class Words(NamedTuple):
    """What the rules need to know of the vocabulary: arrays, of NumPy or traced."""

    text: Any
    """bool [V], words of text, and the ends."""
    ends: Any
    """bool [V], what ends a row."""
    template: Any
    """int32 [n], of an image; it begins with begin-image."""
    image_start: Any
    """int32, id of code 0."""


@functools.partial(jax.jit, static_argnames=("steps", "num_codes", "dtype"), donate_argnames=("rows",))
def write_tokens(
    model: Chameleon, rows: Rows, words: Words, written: jax.Array, limit: jax.Array, keys: jax.Array, scale: jax.Array,
    text: Sampling, image: Sampling, penalty: jax.Array, *, steps: int, num_codes: int, dtype: str,
) -> tuple[Rows, jax.Array]:  # fmt: skip
    """Writes `steps` more tokens.

    Args:
      model: decoder with its layers apart.
      rows: from before.
      words: the vocabulary.
      written: int32, tokens written before (numbers the noise).
      limit: int32, most tokens of a row; whatever is begun fits into them.
      keys: [B].
      scale: guidance on the text while an image is drawn, where the cache has rows for it.
      text, image: sampling.
      penalty: of words that were written already.
      dtype: of the computation.

    Returns:
      rows, and int32 [B, steps] tokens; -1 after the end of a row.
    """
    batch, end = rows.token.shape[0], words.template.shape[0] - 1
    guided = rows.cache.length.shape[0] > batch
    head, embed = model.head[...], model.embed[...].astype(dtype)

    def step(rows: Rows, number: jax.Array) -> tuple[Rows, jax.Array]:
        cache = rows.cache
        if guided:  # the second rows begin again with every image: bos, begin-image, codes
            alone = 1 + jnp.maximum(rows.place, 0)
            join = lambda full: jnp.concatenate([full[:batch], alone])
            cache = Cache(cache.k, cache.v, join(cache.length), join(cache.position))
        x = embed[jnp.tile(rows.token, 2 if guided else 1)[:, None]]
        h, cache = extend(model.blocks, x, cache, jnp.ones_like(cache.length), model.config.rope_theta)
        logits = project_logits(model.final(h), head)[:, 0]
        sane = rows.sane & jnp.all(jnp.isfinite(logits))
        noise = gumbel(keys, jnp.full((batch, 1), number), logits.shape[-1])[:, 0]
        codes_of = lambda t: jax.lax.dynamic_slice_in_dim(t, words.image_start, num_codes, axis=1)

        begin = words.template[0]
        may_begin = (rows.images > 0) & (limit - number > end)
        allowed = words.text | ((jnp.arange(logits.shape[1]) == begin) & may_begin[:, None])
        word = choose(jnp.where(allowed, penalise_repeats(logits[:batch], rows.seen, penalty), -jnp.inf), noise, text)
        codes = codes_of(logits[:batch])
        if guided:
            codes = (1 - scale) * codes_of(logits[batch:]) + scale * codes
        code = choose(codes, codes_of(noise), image) + words.image_start
        forced = words.template[jnp.minimum(rows.place + 1, end)]
        token = jnp.where(rows.place < 0, word, jnp.where(forced == CODE, code, forced))

        began = (rows.place < 0) & (token == begin)
        place = jnp.where(rows.place < 0, jnp.where(began, 0, -1), jnp.where(rows.place + 1 == end, -1, rows.place + 1))
        done = rows.done | ((place < 0) & words.ends[token]) | (number + 1 >= limit)
        seen = rows.seen | (jnp.arange(logits.shape[1]) == token[:, None])
        out = jnp.where(rows.done, -1, token)
        return Rows(cache, token, place, rows.images - began, seen, done, sane), out

    rows, tokens = jax.lax.scan(step, rows, written + jnp.arange(steps))
    return rows, tokens.T


def write(
    model: XPrompt, prompts: Sequence[Prompt], *, seed: int, max_tokens: int, max_images: int, scale: float, text: Sampling,
    image: Sampling, repetition_penalty: float,
) -> list[np.ndarray]:  # fmt: skip
    """Goes on with every prompt until it ends.

    Args:
      model: with tokenizers.
      prompts: of at least one token each.
      seed: a row depends on it and on its own prompt, not on the batch.
      max_tokens: of a row.
      max_images: of a row.
      scale: guidance on the text while an image is drawn; 1 is off.

    Returns:
      For each prompt int32 [n], its tokens up to its end.

    Raises:
      UserError: a number out of its range, logits that are no numbers, or too much for the device's memory.
    """
    if max_tokens < 1 or max_images < 0 or repetition_penalty <= 0:
        raise UserError(f"max_tokens {max_tokens} must be at least 1, max_images {max_images} not negative, "
                        f"repetition_penalty {repetition_penalty} positive")  # fmt: skip
    out: list[np.ndarray] = []
    vocab, grid, size = model.tokenizer.vocab, model.config.vq.grid, model.config.vocab_size
    words = _words(vocab, model.prompter.layout.template(grid, grid), size, model.config.layout)
    for first in range(0, len(prompts), MAX_BATCH):
        turn = prompts[first : first + MAX_BATCH]
        given = [turn[i] for i in pad_rows(range(len(turn)))]
        batch, guided = len(given), scale != 1 and max_images > 0
        before = [(c, p[:-1]) for c, p in given] + [(None, np.zeros(0, np.int32))] * (batch * guided)
        with explained_memory():
            # Room for whole turns of _STEPS: another max_tokens seldom compiles anything, and rows that have ended may go on in vain.
            cache = prefill(
                model.layers_apart, model.config, [c for c, _ in before], [p for _, p in before], vocab.bos,
                room=-(-max_tokens // _STEPS) * _STEPS, dtype=model.compute.dtype, cache_dtype=model.cache_dtype,
            )  # fmt: skip
        rows = Rows(
            cache, jnp.asarray([p[-1] for _, p in given], jnp.int32), jnp.full(batch, -1, jnp.int32),
            jnp.full(batch, max_images, jnp.int32), jnp.zeros((batch, size), bool), jnp.zeros(batch, bool), jnp.bool(True),
        )  # fmt: skip
        written: list[np.ndarray] = []
        keys = image_keys(seed, [0] * batch)
        while len(written) * _STEPS < max_tokens and not bool(rows.done.all()):
            with explained_memory():
                rows, tokens = write_tokens(
                    model.layers_apart, rows, words, np.int32(len(written) * _STEPS), np.int32(max_tokens), keys, np.float32(scale),
                    text, image, np.float32(repetition_penalty), steps=_STEPS, num_codes=vocab.num_codes, dtype=model.compute.dtype,
                )  # fmt: skip
                written.append(np.asarray(tokens))
            check_sane(rows.sane, model.compute.dtype)
        tokens = np.concatenate(written, axis=1)[: len(turn)]
        out += [row[row >= 0] for row in tokens]
    return out


def _words(vocab: Vocabulary, template: np.ndarray, size: int, layout: str) -> Words:
    text, ends = np.zeros(size, bool), np.zeros(size, bool)
    text[: vocab.size] = vocab.text_mask
    ends[vocab.eos] = True
    if layout == "lumina":  # its turns end with sep
        text[vocab.sep] = ends[vocab.sep] = True
    return Words(text, ends, template, np.int32(vocab.image_start))


def parts(model: XPrompt, tokens: np.ndarray) -> list[str | PIL.Image.Image]:
    """What `write` wrote, as texts and images in their order."""
    vocab, layout, grid = model.tokenizer.vocab, model.prompter.layout, model.config.vq.grid
    out: list[str | PIL.Image.Image] = []
    size, at = layout.num_tokens(grid, grid), 0
    while at < len(tokens):
        begins = np.nonzero(tokens[at:] == vocab.boi)[0]
        end = at + int(begins[0]) if begins.size else len(tokens)
        if text := model.tokenizer.decode(tokens[at:end]).strip():
            out.append(text)
        if begins.size:
            out += model.decode_images(layout.decode(tokens[end : end + size], grid, grid)[None])
        at = end + size
    return out
