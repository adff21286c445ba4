"""Next-token cross-entropy on the answer tokens alone, in slices, with z-loss on the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xprompt_jax.mesh import constrain
from xprompt_jax.model.chameleon import project_logits


class Sums(NamedTuple):
    """Sums over tokens, float32, scalars or of each group; they add up over slices, buckets and microbatches and are divided once."""

    loss: jax.Array
    """Weighted negative log-likelihood, nats."""
    z: jax.Array
    """Weighted squared log-partition."""
    correct: jax.Array
    """Weight of the tokens whose most likely prediction is right."""
    weight: jax.Array
    """Total weight."""


def gather_answers(hidden: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The hidden states that predict the loss tokens, and their labels.

    Args:
      hidden: [B, L, D].
      batch: as `prompt.stack` makes it; slot t is predicted at slot t - 1.

    Returns:
      [B, A, D] and int32 [B, A]. Padding points at slot 0, with weight 0.
    """
    at = jnp.maximum(batch["targets"] - 1, 0)
    states = jnp.take_along_axis(hidden, at[..., None], axis=1)
    return states, jnp.take_along_axis(batch["ids"], batch["targets"], axis=1)


def cross_entropy(states: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, *, chunk: int) -> Sums:
    """Sums over all tokens; logits exist for `chunk` tokens of each row at a time, in the backward pass too.

    Args:
      states: [B, A, D].
      head: [D, V].
      labels: int32 [B, A].
      weights: float32 [B, A]; or [G, B, A], of which each group has sums of its own.
      chunk: tokens of a row per slice.
    """
    answers = states.shape[1]
    chunk = min(chunk, answers)

    def slices(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, -answers % chunk if i == axis else 0) for i in range(x.ndim)]
        return jnp.moveaxis(jnp.pad(x, widths).reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint
    def body(total: Sums, part):
        states, labels, weights = part
        # 0 x nan is nan: a padding slot that overflowed must not reach the sums, nor its gradient the model.
        states = jnp.where(jnp.any(weights.reshape(-1, *labels.shape) > 0, axis=0)[..., None], states, 0)
        logits = constrain(project_logits(states, head), "batch", "slots", "vocab")
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # A sum over the vocabulary, not a gather: it stays local when the vocabulary is split over devices.
        label_logit = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0.0), axis=-1)
        added = lambda x: jnp.sum(weights * x, axis=(-2, -1))
        part = Sums(added(log_z - label_logit), added(log_z**2), added(label_logit >= jnp.max(logits, axis=-1)), added(1.0))
        return jax.tree.map(jnp.add, total, part), None

    zero = Sums(*(jnp.zeros(weights.shape[:-2], jnp.float32),) * 4)
    return jax.lax.scan(body, zero, (slices(states, 1), slices(labels, 1), slices(weights, weights.ndim - 1)))[0]
