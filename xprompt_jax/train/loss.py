"""Next-token cross-entropy on the answer tokens alone, in slices, with z-loss on the same tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xprompt_jax.mesh import constrain
from xprompt_jax.model.chameleon import project_logits


class Sums(NamedTuple):
    """Sums over tokens (float32 scalars); they add up over slices, buckets and microbatches and are divided once."""

    loss: jax.Array
    """Weighted negative log-likelihood, nats."""
    z: jax.Array
    """Weighted squared log-partition."""
    correct: jax.Array
    """Weight of the tokens whose most likely prediction is right."""
    weight: jax.Array
    """Total weight."""


def gather_answers(hidden: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
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
      weights: float32 [B, A].
      chunk: tokens of a row per slice.
    """
    batch, answers, _ = states.shape
    chunk = min(chunk, answers)
    pad = -answers % chunk
    slices = lambda x: jnp.moveaxis(jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)).reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(total: Sums, part):
        states, labels, weights = part
        # 0 x nan is nan: a padding slot that overflowed must not reach the sums, nor its gradient the model.
        states = jnp.where(weights[..., None] > 0, states, 0)
        logits = constrain(project_logits(states, head), "batch", "slots", "vocab")
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # A sum over the vocabulary, not a gather: it stays local when the vocabulary is split over devices.
        label_logit = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0.0), axis=-1)
        part = Sums(
            jnp.sum(weights * (log_z - label_logit)), jnp.sum(weights * log_z**2),
            jnp.sum(weights * (label_logit >= jnp.max(logits, axis=-1))), jnp.sum(weights),
        )  # fmt: skip
        return jax.tree.map(jnp.add, total, part), None

    zero = Sums(*(jnp.zeros((), jnp.float32),) * 4)
    return jax.lax.scan(body, zero, (slices(states), slices(labels), slices(weights)))[0]
