"""Drawing many images: batches, guidance rows, chunks. What `XPrompt.generate`, `stream` and `text_to_image` run on.

Rows of one batch, for two images under guidance with the branches "example" and "full" (guidance.py):

    example: image 0 | image 1      every branch has a prompt and a cache row of its own,
    full:    image 0 | image 1      and all of them are fed the same drafts

Programs are compiled once for each (images rounded up to a power of two, branches, prompt rounded up, window): seeds,
inputs, instructions, scales and temperatures are data.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from xprompt_jax.errors import UserError
from xprompt_jax.sample.arguments import MAX_SEED, seed_of, whole
from xprompt_jax.sample.compiled import CompiledPrompt
from xprompt_jax.sample.logits import Sampling
from xprompt_jax.sample.prefill import check_room, prefill
from xprompt_jax.sample.speculative import decode_image, start
from xprompt_jax.tokens import CODE

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

log = logging.getLogger(__name__)

MAX_BATCH = 16
"""Rows drawn or written at once; more are done in turns."""

DECODINGS = ("jacobi", "speculative", "sequential")

Prompt = tuple[CompiledPrompt | None, np.ndarray]
"""What a row is given: compiled examples, and int32 task tokens."""


def draw(
    model: XPrompt, branches: Mapping[str, Sequence[Prompt]], drafts: np.ndarray | None, weights: Mapping[str, float], *,
    seed: int, num_images: int, first_image: int = 0, decoding: str, window: int, sampling: Sampling, progress: bool, partial: bool,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Draws `num_images` of every prompt, from number `first_image` on.

    Args:
      model: with tokenizers.
      branches: the prompts of each branch of guidance, one for each image to come.
      drafts: int32 [prompts, grid, grid] first guesses of the codes; None has none.
      weights: of the branches that are computed.
      partial: yields after every row of codes, and not at the end alone.

    Yields:
      int32 [prompts * num_images, grid, grid] codes; what is not drawn yet repeats the image's first code.

    Raises:
      UserError: unknown decoding, a number out of its range, logits that are no numbers, or too much for the device's memory.
    """
    if decoding not in DECODINGS:
        raise UserError(f"decoding {decoding!r} is unknown; use jacobi or sequential, or speculative")
    num_images, window = whole("num_images", num_images, 1), whole("window", window, 1)
    first_image = whole("first_image", first_image, 0, MAX_SEED - num_images)
    window = 1 if decoding == "sequential" else window
    grid = model.config.vq.grid
    total = len(branches["full"]) * num_images
    codes = np.zeros((total, grid, grid), np.int32)
    chunks = grid if partial or progress else 1
    scales = np.array(list(weights.values()), np.float32)
    with tqdm(total=total * grid * grid, unit="token", disable=not progress, desc="drawing") as bar:
        for first in range(0, total, MAX_BATCH):
            images = list(range(first, min(first + MAX_BATCH, total)))
            padded = pad_rows(images)
            rows = [branches[name][i // num_images] for name in weights for i in padded]
            keys = image_keys(seed, [first_image + i % num_images for i in padded])
            guess = np.zeros((len(padded), grid, grid), np.int32) if drafts is None else drafts[[i // num_images for i in padded]]
            for done, drawn in _draw_batch(model, rows, guess, scales, keys, window, sampling, chunks, decoding == "speculative"):
                codes[images] = np.where(done, drawn[: len(images)], drawn[: len(images), :1, :1])
                bar.update(len(images) * grid * grid // chunks)
                if partial:
                    yield codes.copy()
    if not partial:
        yield codes


def _draw_batch(model, rows, guess, scales, keys, window, sampling, chunks, speculative):
    """Yields (bool [grid, grid] of codes that are final, int32 [B, grid, grid] codes)."""
    vocab, layout, grid = model.tokenizer.vocab, model.prompter.layout, model.config.vq.grid
    template = layout.template(grid, grid)
    places = np.nonzero(template == CODE)[0]
    pad = lambda ids: np.pad(ids, [(0, 0)] * (ids.ndim - 1) + [(0, window)], constant_values=vocab.eoi)
    with explained_memory():
        cache = prefill(
            model.layers_apart, model.config, [c for c, _ in rows], [p for _, p in rows], vocab.bos,
            room=len(template) + window, dtype=model.compute.dtype, cache_dtype=model.cache_dtype,
        )  # fmt: skip
        ids = jnp.asarray(pad(np.stack([layout.encode(codes) for codes in guess])))
        state = start(cache, ids, vocab.image_start, vocab.num_codes, window, speculative=speculative)
    for chunk in range(1, chunks + 1):
        final = chunk * grid * grid // chunks
        with explained_memory():
            state = decode_image(
                model.layers_apart, model.image_head, np.int32(vocab.image_start), state, pad(template),
                np.int32(places[final - 1]), keys, scales, sampling, window=window, dtype=model.compute.dtype,
            )  # fmt: skip
            codes = np.asarray(state.guess)[:, places].reshape(-1, grid, grid) - vocab.image_start
        check_sane(state.sane, model.compute.dtype)
        log.debug("%d rows of codes of %d images in %d passes", final // grid, len(guess), int(state.passes))
        yield (np.arange(grid * grid) < final).reshape(grid, grid), codes


def check_prompt(model: XPrompt, text: str, code: np.ndarray | None = None, *, window: int) -> None:
    """Refuses what `draw` would: a task on an image (its codes), or a text to draw, that leaves no room for an image.

    Raises:
      UserError: it is too long.
    """
    prompter, grid = model.prompter, model.config.vq.grid
    prompt = prompter.text_task(text) if code is None else prompter.task(text, code)
    check_room(len(prompt), prompter.layout.num_tokens(grid, grid) + window)


def pad_rows(rows: Sequence[int]) -> list[int]:
    """Repeats the last row up to the next power of two, so that few programs are compiled."""
    return [*rows, *[rows[-1]] * ((1 << (len(rows) - 1).bit_length()) - len(rows))]


def image_keys(seed: int, numbers: Sequence[int]) -> jax.Array:
    """[B]: one key for each image number of a seed."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(np.uint32(seed_of(seed))), np.array(numbers, np.uint32))


def check_sane(sane: jax.Array, dtype: str) -> None:
    """Refuses what a model computed that computes no numbers."""
    if not bool(sane):
        cure = "" if dtype == "float32" else f", or {dtype} is too narrow for it: try compute dtype float32"
        raise UserError(f"the model's logits are NaN or infinite: its weights are damaged (convert them again, with --verify){cure}")


@contextlib.contextmanager
def explained_memory() -> Iterator[None]:
    """One line instead of the compiler's report when the device's memory does not suffice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e) and "Out of memory" not in str(e):
            raise
        raise UserError("this does not fit the device's memory: give fewer inputs or images at once, a shorter prompt, a smaller window, "
                        "or no guidance") from None  # fmt: skip
