"""Trains a small image tokenizer of one's own, in a minute on a laptop's CPU.

Published VQGANs need days and a discriminator. This recipe aims at exact colours and edges in a few hundred steps:
  loss      L1 and L2 of pixels, L1 of their differences to the right and lower neighbour, and commitment. No GAN.
  optimizer Muon for the kernels, which halves the steps; Adam for norms, biases and the last layers.
  warm-up   the first steps train a plain autoencoder; then k-means over its latents gives the codebook.
  codebook  moving averages of the latents that chose each row (van den Oord et al. 2017, appendix A.1) in place of
            taming's gradient term (facts: chameleon.md 2.3): many times faster at these lengths. Rows that fall out of
            use are moved to latents of the current batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
from tqdm import tqdm

from xprompt_jax.config import VQConfig
from xprompt_jax.data.images import to_pixels
from xprompt_jax.errors import UserError
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.model.vqgan import VQGAN

Params = dict[str, jax.Array]

CODEBOOK = "quantize.embedding.weight"
SQUARE, EDGE, COMMITMENT = 5.0, 0.25, 0.25  # weights beside L1: L2, neighbour differences, |latent - row|^2
MUON_LEARNING_RATE = 2.0  # of kernels, relative to `learning_rate`
DECAY = 0.97  # of the codebook's moving averages, per step
DEAD = 0.05  # a row used less than this fraction of an even share is moved
WARMUP = 0.08  # fraction of the steps without quantisation
KMEANS_ROUNDS = 10
KMEANS_IMAGES = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VQState:
    """What a step takes and gives."""

    params: Params
    """The VQGAN, float32; its codebook follows `sums / usage` and gets no gradient."""
    opt_state: Any
    usage: jax.Array
    """float32 [num_codes]: moving average of the latents per step that chose each row."""
    sums: jax.Array
    """float32 [num_codes, embed_dim]: moving average of the sum of those latents."""


def train_vqgan(
    config: VQConfig, images: np.ndarray, *, steps: int, batch: int = 32, learning_rate: float, seed: int = 0, progress: bool = True
) -> VQGAN:
    """Trains a VQGAN from random weights; the same arguments give the same weights on the same machine.

    Args:
      config: of the VQGAN; sides of `images` must be multiples of `config.downsample`.
      images: uint8 [n, h, w, 3]; drawn from with replacement.
      steps: of `batch` images each, the warm-up without quantisation among them.
      batch: images per step.
      learning_rate: peak of the schedule: linear warm-up over a twentieth of the steps, then cosine to zero.
      seed: of weights and draws.
      progress: shows a bar with the mean absolute error in levels (0-255).

    Raises:
      UserError: images of another type or shape, or of sides that do not fit the tokenizer.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise UserError(f"training images must be uint8 [n, height, width, 3], not {images.dtype} {list(images.shape)}")
    rng = np.random.default_rng(seed)
    # rbg: threefry's many small draws would take longer to compile than the training step.
    init_key, kmeans_key, key = jax.random.split(jax.random.key(seed, impl="rbg"), 3)
    like = jax.eval_shape(lambda: VQGAN(config, init_key))
    params = jax.jit(lambda k: flatten(VQGAN(config, k)))(init_key)
    optimizer = _optimizer(learning_rate, steps)
    state = VQState(params, optimizer.init(_trained(params)), jnp.ones(config.num_codes), jnp.zeros((config.num_codes, config.embed_dim)))
    step = jax.jit(functools.partial(_step, like, optimizer), donate_argnums=0)
    quantise_from = int(steps * WARMUP)
    with tqdm(total=steps, unit="step", disable=not progress, desc="image tokenizer") as bar:
        for i in range(steps):
            if i == quantise_from:
                sample = images[rng.integers(0, len(images), min(KMEANS_IMAGES, len(images)))]
                state = _start_codebook(like, state, sample, batch, kmeans_key)
            pixels = to_pixels(images[rng.integers(0, len(images), batch)])
            state, error = step(state, pixels, jax.random.fold_in(key, i), jnp.float32(i >= quantise_from))
            bar.update()
            if i % 10 == 0 or i == steps - 1:
                bar.set_postfix(error=f"{float(error) * 127.5:.1f}")
    return unflatten(like, state.params)


def _optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    def rate(factor: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, factor * learning_rate, max(steps // 20, 1), max(steps, 2))

    # Every kernel but those that write latents and pixels; seen as a matrix of all its inputs by its outputs.
    as_matrix = contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)

    def matrices(params: Params) -> dict[str, contrib.MuonDimensionNumbers | None]:
        # Parameters of the other group come as placeholders without dimensions.
        inner = {name for name, value in params.items() if getattr(value, "ndim", 0) == 4 and not name.endswith("conv_out.weight")}
        return {name: as_matrix if name in inner else None for name in params}

    return contrib.muon(
        rate(MUON_LEARNING_RATE), adam_learning_rate=rate(1.0), muon_weight_dimension_numbers=matrices, consistent_rms=0.2,
        adam_b2=0.99,
    )  # fmt: skip


def _trained(params: Params) -> Params:
    return {name: value for name, value in params.items() if name != CODEBOOK}


def _loss(like: VQGAN, params: Params, codebook: jax.Array, pixels: jax.Array, quantise: jax.Array):
    model = unflatten(like, {**params, CODEBOOK: codebook})
    latent = model.encode_latent(pixels)
    codes, rows = model.quantize(jax.lax.stop_gradient(latent))
    # Straight through: the decoder sees rows, the encoder gets the gradient at the rows.
    seen = latent + quantise * jax.lax.stop_gradient(rows - latent)
    error = model.decode_latent(seen) - pixels
    level = jnp.mean(jnp.abs(error))
    edges = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
    commitment = jnp.mean((latent - rows) ** 2)
    return level + SQUARE * jnp.mean(error**2) + EDGE * edges + quantise * COMMITMENT * commitment, (level, latent, codes)


def _step(
    like: VQGAN, optimizer: optax.GradientTransformation, state: VQState, pixels: jax.Array, key: jax.Array, quantise: jax.Array
) -> tuple[VQState, jax.Array]:
    """One update; also the mean absolute error. `quantise` is 1 or 0."""
    params, codebook = _trained(state.params), state.params[CODEBOOK]
    gradient = jax.grad(functools.partial(_loss, like), has_aux=True)
    grads, (level, latent, codes) = gradient(params, codebook, pixels, quantise)
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)

    latent, codes = latent.reshape(-1, latent.shape[-1]), codes.reshape(-1)
    count, total = _gather(latent, codes, len(codebook))
    usage = DECAY * state.usage + (1 - DECAY) * count
    sums = DECAY * state.sums + (1 - DECAY) * total
    share = len(latent) / len(codebook)
    dead = usage < DEAD * share
    fresh = latent[jax.random.randint(key, (len(codebook),), 0, len(latent))]
    # A moved row starts with an even share, so that it has time to be found.
    usage, sums = jnp.where(dead, share, usage), jnp.where(dead[:, None], fresh * share, sums)
    return VQState({**params, CODEBOOK: sums / usage[:, None]}, opt_state, usage, sums), level


def _gather(latent: jax.Array, codes: jax.Array, num_codes: int) -> tuple[jax.Array, jax.Array]:
    """How many of `latent` [n, C] chose each code, [num_codes], and their sums, [num_codes, C]."""
    count = jnp.zeros(num_codes).at[codes].add(1.0)
    return count, jnp.zeros((num_codes, latent.shape[-1])).at[codes].add(latent)


def _start_codebook(like: VQGAN, state: VQState, images: np.ndarray, batch: int, key: jax.Array) -> VQState:
    """The codebook by k-means over the latents of `images`, from random latents."""
    encode = jax.jit(lambda params, pixels: unflatten(like, params).encode_latent(pixels))
    parts = [encode(state.params, to_pixels(images[i : i + batch])) for i in range(0, len(images), batch)]
    latent = jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    num_codes = state.usage.shape[0]

    @jax.jit
    def improve(_: int, rows: jax.Array) -> jax.Array:
        codes, _rows = unflatten(like, {**state.params, CODEBOOK: rows}).quantize(latent)
        count, total = _gather(latent, codes, num_codes)
        return jnp.where(count[:, None] > 0, total / jnp.maximum(count, 1)[:, None], rows)

    rows = latent[jax.random.choice(key, len(latent), (num_codes,), replace=len(latent) < num_codes)]
    rows = jax.lax.fori_loop(0, KMEANS_ROUNDS, improve, rows)
    share = jnp.full(num_codes, images.shape[0] / len(parts) * parts[0].shape[1] * parts[0].shape[2] / num_codes)
    return dataclasses.replace(state, params={**state.params, CODEBOOK: rows}, usage=share, sums=rows * share[:, None])
