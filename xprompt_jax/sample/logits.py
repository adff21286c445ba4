"""From logits to a token: temperature, top-k, top-p, and noise that belongs to a position, not to a batch.

The noise of token i of an image is Gumbel(fold_in(key of the image, i)), and the token is argmax(logits / T + noise): an
exact sample of the softmax. It does not depend on the batch the image is drawn in, nor on how many positions a pass
computes at once; that makes seeds mean something and lossless parallel decoding testable (facts: inference.md 1.3).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from xprompt_jax.errors import UserError
from xprompt_jax.sample.arguments import number, whole


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a distribution is narrowed before a token is drawn. Defaults change nothing but the seedable draw.

    A pytree whose leaves are the temperature and top_p: other values of them do not compile anything again, another top_k
    does.
    """

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens, ties included; 0 keeps all."""
    top_p: float | None = 1.0
    """Keep the smallest set of most likely tokens with this much mass; 1 (stored as None) keeps all."""

    def __post_init__(self):
        temperature, top_k = number("temperature", self.temperature), whole("top_k", self.top_k, 0)
        top_p = 1.0 if self.top_p is None else number("top_p", self.top_p)
        if not (temperature == 0 or temperature >= 1e-3):
            raise UserError(f"temperature {temperature} must be 0 (takes the most likely token) or at least 0.001; it must not be negative")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p {top_p} must be in (0, 1]")
        # Numbers of one type: a temperature of 1 would compile another program than 1.0.
        for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", None if top_p == 1 else top_p)):
            object.__setattr__(self, name, value)

    def tree_flatten(self) -> tuple[tuple[Any, Any], int]:
        """Leaves, and what programs are compiled for."""
        return (self.temperature, self.top_p), self.top_k

    @classmethod
    def tree_unflatten(cls, top_k: int, leaves: tuple[Any, Any]) -> Sampling:
        """The same object around traced values, which cannot be checked and were."""
        self = object.__new__(cls)
        for name, value in zip(("temperature", "top_k", "top_p"), (leaves[0], top_k, leaves[1]), strict=True):
            object.__setattr__(self, name, value)
        return self


def narrow(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature, then top-k, then top-p: float32 [..., V] -> [..., V] with -inf on what is cut."""
    logits = logits / jnp.where(sampling.temperature == 0, 1.0, sampling.temperature)
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        mass_before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        floor = jnp.min(jnp.where(mass_before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        floor = jnp.minimum(floor, ordered[..., :1])  # a top_p below float32's normal numbers counts as 0, and none would be left
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits


def gumbel(keys: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Noise of tokens `index` [B, W] of the images with `keys` [B]: float32 [B, W, size]."""
    one = lambda key, i: jax.random.gumbel(jax.random.fold_in(key, i), (size,), jnp.float32)
    return jax.vmap(jax.vmap(one, (None, 0)))(keys, index)


def choose(logits: jax.Array, noise: jax.Array, sampling: Sampling) -> jax.Array:
    """int32 [...]: one token per distribution [..., V]; the most likely one at temperature 0."""
    logits = narrow(logits.astype(jnp.float32), sampling)
    return jnp.argmax(logits + jnp.where(sampling.temperature == 0, 0.0, noise), axis=-1).astype(jnp.int32)


def probabilities(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 [..., V]: the law that `choose` draws from."""
    logits = narrow(logits.astype(jnp.float32), sampling)
    greedy = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jnp.where(sampling.temperature == 0, greedy, jax.nn.softmax(logits, axis=-1))


def penalise_repeats(logits: jax.Array, seen: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Makes tokens that were produced already less likely (Meta's text default is 1.2; 1 turns it off).

    Args:
      logits: float32 [B, V].
      seen: bool [B, V].
      penalty: positive logits are divided by it, negative ones multiplied.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
