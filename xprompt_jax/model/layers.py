"""The pieces of a decoder block: norms, rotary positions, projections, MLP.

Weights of all N layers are stored stacked (leading axis N); the methods work on one layer, whose weights have lost that
axis (`jax.lax.scan` over the module, or indexing, takes it off). Weights are cast to the activations' type at use.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from xprompt_jax.config import ModelConfig
from xprompt_jax.mesh import constrain
from xprompt_jax.model.product import product

LAYER_NORM_EPS = 1e-5


def normal(key: jax.Array, shape: tuple[int, ...], std: float, dtype) -> nnx.Param:
    """A parameter drawn from N(0, std^2)."""
    return nnx.Param(std * jax.random.normal(key, shape, dtype))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis; statistics in float32, the product in x's type (as HF does)."""
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
    return f.astype(x.dtype) * scale.astype(x.dtype)


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, half-rotation convention: dimension i pairs with i + K/2.

    Args:
      x: [B, L, heads, K].
      positions: int32 [B, L]; any value, no table bounds it (fact sheet trap 24).
      theta: base of the frequencies.

    Returns:
      As x; angles in float32.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class HeadNorm(nnx.Module):
    """LayerNorm (mean-subtracting, with bias) over each head, before rotary: Chameleon's QK-norm, not RMSNorm."""

    def __init__(self, num_layers: int, heads: int, head_dim: int, dtype):
        self.scale = nnx.Param(jnp.ones((num_layers, heads, head_dim), dtype))
        self.bias = nnx.Param(jnp.zeros((num_layers, heads, head_dim), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., heads, K] -> same."""
        f = x.astype(jnp.float32)
        f = f - jnp.mean(f, axis=-1, keepdims=True)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + LAYER_NORM_EPS)
        return f.astype(x.dtype) * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    """Projections of grouped-query attention; the attention itself is a function the caller hands to the block."""

    def __init__(self, c: ModelConfig, key: jax.Array, dtype):
        n, d, k = c.num_layers, c.dim, c.head_dim
        keys = jax.random.split(key, 4)
        self.wq = normal(keys[0], (n, d, c.num_heads, k), d**-0.5, dtype)
        self.wk = normal(keys[1], (n, d, c.num_kv_heads, k), d**-0.5, dtype)
        self.wv = normal(keys[2], (n, d, c.num_kv_heads, k), d**-0.5, dtype)
        self.wo = normal(keys[3], (n, c.num_heads, k, d), (2 * n * c.num_heads * k) ** -0.5, dtype)
        self.q_norm = HeadNorm(n, c.num_heads, k, dtype)
        self.k_norm = HeadNorm(n, c.num_kv_heads, k, dtype)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, L, D] -> normed queries [B, L, H, K], normed keys and plain values [B, L, G, K]; no rotary yet."""
        q = self.q_norm(product("bld,dhk->blhk", x, self.wq[...]))
        k = self.k_norm(product("bld,dgk->blgk", x, self.wk[...]))
        v = product("bld,dgk->blgk", x, self.wv[...])
        q, k, v = (constrain(t, "batch", "slots", "heads" if t is q else "kv_heads", "head_dim") for t in (q, k, v))
        return checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")

    def output(self, context: jax.Array) -> jax.Array:
        """[B, L, H, K] -> [B, L, D]."""
        return product("blhk,hkd->bld", checkpoint_name(context, "context"), self.wo[...])


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, c: ModelConfig, key: jax.Array, dtype):
        n, d, f = c.num_layers, c.dim, c.ffn_dim
        keys = jax.random.split(key, 3)
        self.gate = normal(keys[0], (n, d, f), d**-0.5, dtype)
        self.up = normal(keys[1], (n, d, f), d**-0.5, dtype)
        self.down = normal(keys[2], (n, f, d), (2 * n * f) ** -0.5, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, D]."""
        gate = checkpoint_name(product("bld,df->blf", x, self.gate[...]), "mlp")
        up = checkpoint_name(product("bld,df->blf", x, self.up[...]), "mlp")
        hidden = constrain(jax.nn.silu(gate) * up, "batch", "slots", "ffn")
        return product("blf,fd->bld", hidden, self.down[...])


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity without a key or at rate 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)
