"""XP tokens: S learnable rows in a table of their own, put where the prompt has XP slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xprompt_jax.prompt import Role, SlotShape


def init_xp(key: jax.Array, embed: jax.Array, num_xp: int) -> jax.Array:
    """[S, D]: the mean of the word embeddings plus small noise (gist tokens start from the mean too; facts 7.5)."""
    scale = jnp.std(embed)
    return jnp.mean(embed, axis=0) + scale * jax.random.normal(key, (num_xp, embed.shape[1]), embed.dtype)


def place_in_slots(x: jax.Array, xp: jax.Array, shape: SlotShape) -> jax.Array:
    """Writes the XP rows over the XP slots of embedded tokens x [B, L, D]."""
    if not shape.examples:
        return x
    rows = jnp.broadcast_to(jnp.tile(xp, (shape.examples, 1)).astype(x.dtype), (x.shape[0], shape.examples * shape.xp, x.shape[2]))
    return jnp.concatenate([x[:, : shape.context_end], rows, x[:, shape.xp_end :]], axis=1)


def rank_in_group(roles: jax.Array, groups: jax.Array, segments: jax.Array) -> jax.Array:
    """int32 [B, L]: how many XP tokens of the same group and segment stand before each token."""
    same = (groups[:, :, None] == groups[:, None, :]) & (segments[:, :, None] == segments[:, None, :])
    before = jnp.tril(jnp.ones((roles.shape[1],) * 2, bool), k=-1)
    return jnp.sum(same & before & (roles[:, None, :] == Role.XP), axis=-1)


def place_by_role(x: jax.Array, xp: jax.Array, roles: jax.Array, groups: jax.Array, segments: jax.Array) -> jax.Array:
    """The same for any arrangement of roles [B, L]: the i-th XP token of a group takes row i."""
    rows = xp[jnp.minimum(rank_in_group(roles, groups, segments), xp.shape[0] - 1)].astype(x.dtype)
    return jnp.where((roles == Role.XP)[..., None], rows, x)
