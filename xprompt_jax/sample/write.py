"""Writing: text, and text with images in it, several rows at once, each in a state of its own.

    row 0   a  red  ball  boi  c  c  c  c ...  c  eoi  is  eos          place: -1 in text, else the newest token's place in the
    row 1   it  got  darker  eos                                      image's template

    text     may go on with a word or the end; or with begin-image, where a whole image still fits into what is left of
             the row and the row may have another image
    image    follows the layout's template: where it has an id, that id; where it has CODE, an image code and nothing else

So an image has exactly its rows x columns codes and its frame, no XP or reserved id is ever written, and a caption or a
difference description is the case of no images. Words come one in a pass. Inside an image a window of tokens is computed in a
pass, and what agrees with its drafts is kept, exactly as in speculative.py under the rule jacobi; drafts are the pass before, and
for a second image the first. Images can be guided away from the text: each row then has a second one that sees the image alone,
from begin-image on (Lumina's negative context; facts: inference.md 6).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from xprompt_jax.errors import UserError
from xprompt_jax.model.cache import Cache
from xprompt_jax.model.chameleon import Chameleon, extend, project_logits
from xprompt_jax.model.quantize import Int8
from xprompt_jax.sample.arguments import number, whole
from xprompt_jax.sample.draw import MAX_BATCH, Prompt, check_sane, explained_memory, image_keys, pad_rows
from xprompt_jax.sample.example import ImageLike
from xprompt_jax.sample.logits import Sampling, choose, gumbel, penalise_repeats
from xprompt_jax.sample.prefill import prefill
from xprompt_jax.tokens import CODE, Vocabulary

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

log = logging.getLogger(__name__)

_PASSES = 32
"""Passes between two looks at what has been written."""
_ROOM = 32
"""Rows have room for a multiple of it: another max_tokens seldom compiles anything."""


class Rows(NamedTuple):
    """B rows half written."""

    cache: Cache
    """2B rows under guidance, the ones that see an image alone behind; holds everything before `token`."""
    out: jax.Array
    """int32 [B, n + W], what was written; -1 where nothing was yet."""
    number: jax.Array
    """int32 [B], how much of it there is."""
    token: jax.Array
    """int32 [B], the newest token of each row."""
    place: jax.Array
    """int32 [B], its place in an image's template; -1 in text."""
    guess: jax.Array
    """int32 [B, template + W], the image of each row: final up to `place`, drafts behind it."""
    images: jax.Array
    """int32 [B], images the row may still begin."""
    seen: jax.Array
    """bool [B, V], words written so far."""
    done: jax.Array
    """bool [B], rows that have ended."""
    passes: jax.Array
    """int32, passes so far."""
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


@functools.partial(jax.jit, static_argnames=("window", "dtype"), donate_argnames=("rows",))
def write_tokens(
    model: Chameleon, image_head: jax.Array | Int8 | None, rows: Rows, words: Words, limit: jax.Array, keys: jax.Array,
    scale: jax.Array, text: Sampling, image: Sampling, penalty: jax.Array, *, window: int, dtype: str,
) -> Rows:  # fmt: skip
    """Goes on for some passes, while there are rows in an image (with its head) or while all rows are in text (without).

    Args:
      model: decoder with its layers apart.
      image_head: [D, codes], the head's columns of the image codes; None writes words.
      rows: from before.
      words: the vocabulary.
      limit: int32, most tokens of a row; whatever is begun fits into them.
      keys: [B].
      scale: guidance on the text while an image is drawn, where the cache has rows for it.
      text, image: sampling.
      penalty: of words that were written already.
      window: tokens computed per pass; 1 where words are written.
      dtype: of the computation.
    """
    batch, end = rows.token.shape[0], words.template.shape[0] - 1
    guided = rows.cache.length.shape[0] > batch
    head, embed, index = model.head[...], model.embed[...].astype(dtype), jnp.arange(window)
    cut = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, window))
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0))

    def one_pass(rows: Rows) -> Rows:
        cache, in_image, begin = rows.cache, rows.place >= 0, words.template[0]
        if guided:  # the second rows begin again with every image: bos, begin-image, codes
            alone = 1 + jnp.maximum(rows.place, 0)
            join = lambda full: jnp.concatenate([full[:batch], alone])
            cache = Cache(cache.k, cache.v, join(cache.length), join(cache.position))
        fed = cut(rows.guess, jnp.maximum(rows.place, 0)).at[:, 0].set(rows.token)
        x = embed[jnp.tile(fed, (2 if guided else 1, 1))]
        h, cache = extend(model.blocks, x, cache, jnp.zeros_like(cache.length), model.config.rope_theta)
        h = model.final(h)

        logits = project_logits(h[:batch, 0], head)
        sane = rows.sane & jnp.all(jnp.isfinite(logits))
        may_begin = (rows.images > 0) & (limit - rows.number > end)
        vocabulary = jnp.arange(logits.shape[1])
        allowed = words.text | ((vocabulary == begin) & may_begin[:, None])
        noise = gumbel(keys, rows.number[:, None], logits.shape[1])[:, 0]
        word = choose(jnp.where(allowed, penalise_repeats(logits, rows.seen, penalty), -jnp.inf), noise, text)
        proposal, kept, guess = word[:, None], jnp.ones_like(rows.number), rows.guess
        if image_head is not None:
            codes = project_logits(h, image_head)
            sane &= jnp.all(jnp.isfinite(codes))
            if guided:
                codes = (1 - scale) * codes[batch:] + scale * codes[:batch]
            drawn = choose(codes, gumbel(keys, rows.number[:, None] + index, codes.shape[-1]), image) + words.image_start
            forced = words.template[jnp.minimum(rows.place[:, None] + 1 + index, end)]
            proposal = jnp.where(in_image[:, None], jnp.where(forced == CODE, drawn, forced), proposal)
            agrees = jnp.sum(jnp.cumprod(fed[:, 1:] == proposal[:, :-1], axis=1), axis=1)
            kept = jnp.where(in_image, jnp.minimum(1 + agrees, end - rows.place), 1).astype(jnp.int32)
            guess = jnp.where(in_image[:, None], put(guess, proposal, rows.place + 1), guess)

        kept = jnp.where(rows.done, 0, kept)
        newest = jnp.take_along_axis(proposal, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
        token = jnp.where(rows.done, rows.token, newest)
        began = ~in_image & (token == begin) & ~rows.done
        place = jnp.where(in_image, rows.place + kept, jnp.where(began, 0, -1))
        place = jnp.where(place == end, -1, place)
        number, out = rows.number + kept, put(rows.out, jnp.where(index < kept[:, None], proposal, -1), rows.number)
        done = rows.done | ((place < 0) & words.ends[token]) | (number >= limit)
        seen = rows.seen | (~in_image[:, None] & (vocabulary == token[:, None]))
        moved = jnp.tile(kept, 2 if guided else 1)
        cache = Cache(cache.k, cache.v, cache.length + moved, cache.position + moved)
        return Rows(cache, out, number, token, place, guess, rows.images - began, seen, done, rows.passes + 1, sane)

    def goes_on(rows: Rows) -> jax.Array:
        drawing = jnp.any(rows.place >= 0)
        return (rows.passes < first + _PASSES) & ~jnp.all(rows.done) & (~drawing if image_head is None else drawing)

    first = rows.passes
    return jax.lax.while_loop(goes_on, one_pass, rows)


def write(
    model: XPrompt, prompts: Sequence[Prompt], *, seed: int, max_tokens: int, max_images: int, scale: float, text: Sampling,
    image: Sampling, repetition_penalty: float, window: int,
) -> Iterator[list[np.ndarray]]:  # fmt: skip
    """Goes on with every prompt until it ends.

    Args:
      model: with tokenizers.
      prompts: of at least one token each.
      seed: a row depends on it and on its own prompt, not on the batch.
      max_tokens: of a row.
      max_images: of a row.
      scale: guidance on the text while an image is drawn; 1 is off.
      window: tokens of an image computed at once; it changes no token.

    Yields:
      After some tokens, and at the end: for each prompt int32 [n], its tokens so far.

    Raises:
      UserError: a number out of its range, logits that are no numbers, or too much for the device's memory.
    """
    max_tokens, max_images, window = whole("max_tokens", max_tokens, 1), whole("max_images", max_images, 0), whole("window", window, 1)
    if number("repetition_penalty", repetition_penalty) <= 0:
        raise UserError(f"repetition_penalty {repetition_penalty} must be above 0 (1 is off)")
    vocab, grid, size = model.tokenizer.vocab, model.config.vq.grid, model.config.vocab_size
    words = _words(vocab, model.prompter.layout.template(grid, grid), size, model.config.layout)
    room = -(-max_tokens // _ROOM) * _ROOM + window
    image_head = model.image_head if max_images else None
    written: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    for first in range(0, len(prompts), MAX_BATCH):
        turn = prompts[first : first + MAX_BATCH]
        given = [turn[i] for i in pad_rows(range(len(turn)))]
        batch, guided = len(given), scale != 1 and max_images > 0
        before = [(c, p[:-1]) for c, p in given] + [(None, np.zeros(0, np.int32))] * (batch * guided)
        with explained_memory():
            cache = prefill(
                model.layers_apart, model.config, [c for c, _ in before], [p for _, p in before], vocab.bos,
                room=room, dtype=model.compute.dtype, cache_dtype=model.cache_dtype,
            )  # fmt: skip
        drafts = np.where(words.template == CODE, words.image_start, words.template)
        rows = Rows(
            cache, out=jnp.full((batch, room), -1, jnp.int32), number=jnp.zeros(batch, jnp.int32),
            token=jnp.asarray([p[-1] for _, p in given], jnp.int32), place=jnp.full(batch, -1, jnp.int32),
            guess=jnp.asarray(np.tile(np.pad(drafts, (0, window), mode="edge"), (batch, 1)), jnp.int32),
            images=jnp.full(batch, max_images, jnp.int32), seen=jnp.zeros((batch, size), bool), done=jnp.zeros(batch, bool),
            passes=jnp.int32(0), sane=jnp.bool(True),
        )  # fmt: skip
        keys = image_keys(seed, [0] * batch)
        while not bool(rows.done.all()):
            drawing = bool((rows.place >= 0).any())
            with explained_memory():
                rows = write_tokens(
                    model.layers_apart, image_head if drawing else None, rows, words, np.int32(max_tokens), keys, np.float32(scale), text,
                    image, np.float32(repetition_penalty), window=window if drawing else 1, dtype=model.compute.dtype,
                )  # fmt: skip
                out = np.asarray(rows.out)
            check_sane(rows.sane, model.compute.dtype)
            written[first : first + len(turn)] = [row[row >= 0] for row in out[: len(turn)]]
            yield list(written)
        log.debug("%d tokens of %d rows in %d passes", sum(map(len, written[first:])), len(turn), int(rows.passes))


def _words(vocab: Vocabulary, template: np.ndarray, size: int, layout: str) -> Words:
    text, ends = np.zeros(size, bool), np.zeros(size, bool)
    text[: vocab.size] = vocab.text_mask
    ends[vocab.eos] = True
    if layout == "lumina":  # its turns end with sep
        text[vocab.sep] = ends[vocab.sep] = True
    return Words(text, ends, template, np.int32(vocab.image_start))


def answers(
    model: XPrompt, prompts: Sequence[Prompt], *, partial: bool, **options: Any
) -> Iterator[list[list[str | PIL.Image.Image]]]:  # fmt: skip
    """What `write` writes as texts and images: when it has ended, or (partial) also after some tokens; its arguments and errors."""
    rows: list[np.ndarray] = []
    for rows in write(model, prompts, **options):
        if partial:
            yield [parts(model, row) for row in rows]
    if not partial:
        yield [parts(model, row) for row in rows]


def mixed(model: XPrompt, prompt: str | Sequence[str | ImageLike]) -> np.ndarray:
    """A text, or texts and images in their order -> int32 [n], the tokens of a prompt.

    Raises:
      UserError: it is neither, or an image cannot be read.
    """
    if not isinstance(prompt, str | list | tuple):
        raise UserError(f"a prompt must be a text, or a list of texts and images, not {type(prompt).__name__}; put it into [ ]")
    ids: list[int] = []
    for piece in [prompt] if isinstance(prompt, str) else prompt:
        is_text = isinstance(piece, str)
        ids += model.tokenizer.encode(piece) if is_text else model.prompter.layout.encode(model.encode_images([piece])[0]).tolist()
    return np.array([*ids, model.tokenizer.vocab.sep], np.int32)


def parts(model: XPrompt, tokens: np.ndarray) -> list[str | PIL.Image.Image]:
    """Tokens that `write` wrote, as texts and images in their order; what is not drawn yet repeats an image's first code."""
    vocab, layout, grid = model.tokenizer.vocab, model.prompter.layout, model.config.vq.grid
    out: list[str | PIL.Image.Image] = []
    template, at = layout.template(grid, grid), 0
    while at < len(tokens):
        begins = np.nonzero(tokens[at:] == vocab.boi)[0]
        end = at + int(begins[0]) if begins.size else len(tokens)
        if text := model.tokenizer.decode(tokens[at:end]).strip():
            out.append(text)
        at = end + len(template)
        if begins.size:
            drawn = tokens[end:at]
            codes = drawn[template[: len(drawn)] == CODE]
            missing = np.full(grid * grid - len(codes), codes[0] if len(codes) else vocab.image_start)
            square = np.concatenate([codes, missing]).reshape(1, grid, grid) - vocab.image_start
            out += model.decode_images(square)
    return out
