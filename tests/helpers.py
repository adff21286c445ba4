"""Tiny real parts shared by the tests: a tokenizer, a configuration, random slots."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from xprompt_jax.config import ComputeConfig, ModelConfig, VQConfig
from xprompt_jax.model.chameleon import Chameleon, abstract_model
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.prompt import Role, Sample, Slots, SlotShape, fill
from xprompt_jax.tokens import Tokenizer, train_tokenizer

FP32 = ComputeConfig(dtype="float32")
TINY_VQ = VQConfig(
    channels=8, channel_multipliers=(1, 1, 2), num_res_blocks=1, latent_channels=8, embed_dim=8, num_codes=32, image_size=16
)  # fmt: skip
TINY = ModelConfig(
    vocab_size=448, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, num_xp_tokens=3, vq=TINY_VQ
)  # fmt: skip

CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""First line of a process that a test interrupts: a shell's background jobs, and what they start, ignore SIGINT otherwise."""


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    """A tokenizer of 32 image codes and a few hundred words."""
    corpus = ["remove the rain", "add rain", "the output image has no rain", "paint the depth in grey"] * 4
    return train_tokenizer(corpus, num_codes=32, vocab_size=420)


def random_decoder(config: ModelConfig = TINY, seed: int = 0) -> Chameleon:
    """A decoder of random weights, norms and biases included. NumPy draws them, for which nothing need be compiled."""
    rng, like = np.random.default_rng(seed), abstract_model(config)

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        middle = 1.0 if name.endswith(("norm", "scale")) else 0.0
        return jnp.asarray(middle + 0.3 * rng.standard_normal(shape), jnp.float32)

    return unflatten(like, {name: draw(name, value.shape) for name, value in flatten(like).items()})


def random_sample(rng: np.random.Generator, shape: SlotShape, vocab: int = 400) -> Sample:
    """A sample of random lengths that fits the shape."""
    examples = tuple(rng.integers(2, vocab, rng.integers(0, shape.context + 1)) for _ in range(shape.examples))
    prompt = rng.integers(2, vocab, rng.integers(0, shape.todo - 1))
    answer = rng.integers(2, vocab, rng.integers(1, shape.todo - len(prompt) + 1))
    return Sample(examples, prompt, answer)


def random_rows(seed: int, shape: SlotShape, batch: int = 3, vocab: int = 400) -> list[Slots]:
    """Rows of random samples."""
    rng = np.random.default_rng(seed)
    return [fill(random_sample(rng, shape, vocab), shape, bos=0, pad=1) for _ in range(batch)]


def column(rows: list[Slots], name: str) -> jax.Array:
    """One field of all rows, stacked."""
    return jnp.asarray(np.stack([getattr(r, name) for r in rows]))


def segments(rows: list[Slots]) -> jax.Array:
    """1 where a row has a token, 0 on padding."""
    return (column(rows, "roles") != Role.PAD).astype(jnp.int32)
