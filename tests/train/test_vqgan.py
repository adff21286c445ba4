"""Training a small image tokenizer."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers import TINY_VQ
from xprompt_jax.config import VQConfig
from xprompt_jax.data.images import to_pixels
from xprompt_jax.errors import UserError
from xprompt_jax.model.params import flatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.train.vqgan import train_vqgan

CONFIG: VQConfig = dataclasses.replace(TINY_VQ, channel_multipliers=(1, 2), num_codes=16, image_size=8)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Two flat colours each, side by side or one above the other."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (64, 2, 1, 3)).repeat(4, axis=1).repeat(8, axis=2)
    pictures[::2] = pictures[::2].swapaxes(1, 2)
    return pictures.astype(np.uint8)


def train(images: np.ndarray, steps: int, seed: int = 0) -> VQGAN:
    return train_vqgan(CONFIG, images, steps=steps, batch=16, learning_rate=4e-3, seed=seed, progress=False)


@pytest.fixture(scope="module")
def trained(images) -> VQGAN:
    return train(images, 150)


def error_and_codes(model: VQGAN, images: np.ndarray) -> tuple[float, np.ndarray]:
    codes = jax.jit(lambda m, x: m.encode(x))(model, to_pixels(images))
    decoded = jax.jit(lambda m, c: m.decode(c))(model, codes)
    return float(np.abs(decoded - to_pixels(images)).mean()), np.asarray(codes)


def test_training_lowers_the_error_and_uses_the_codebook(trained, images):
    before, _ = error_and_codes(VQGAN(CONFIG, jax.random.key(0)), images)
    after, codes = error_and_codes(trained, images)
    flat = float(np.abs(to_pixels(images) - to_pixels(images).mean((0, 1, 2))).mean())  # one colour for everything
    assert after < 0.6 * min(before, flat), (before, flat, after)
    assert len(np.unique(codes)) >= CONFIG.num_codes // 2


def test_rows_lie_among_the_latents(trained, images):
    """The codebook follows the encoder: no row is left where it started, far from everything."""
    latent = np.asarray(jax.jit(lambda m, x: m.encode_latent(x))(trained, to_pixels(images))).reshape(-1, 1, CONFIG.embed_dim)
    rows = np.asarray(trained.quantize.rows)
    spread = np.linalg.norm(latent - latent.mean(0), axis=-1).max()
    assert (np.linalg.norm(latent - rows, axis=-1).min(0) < spread).all()


def test_seed_decides_everything(images):
    """With fewer images than a batch holds."""
    first, again, other = (flatten(train(images[:3], 6, seed)) for seed in (3, 3, 4))
    for name, value in first.items():
        assert np.isfinite(value).all(), name
        np.testing.assert_array_equal(value, again[name], err_msg=name)
    assert any(np.any(value != other[name]) for name, value in first.items())


@pytest.mark.parametrize("wrong", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)])
def test_other_arrays_are_refused(wrong):
    with pytest.raises(UserError, match="training images must be uint8"):
        train(wrong, 2)


def test_sides_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="multiples of 2"):
        train(np.zeros((2, 9, 8, 3), np.uint8), 2)
