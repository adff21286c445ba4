"""The transformer of CLIP and of DINO, and the image tower that both have.

    pixels [B, S, S, 3] --patches--> [B, T, D], class token first, + positions --> N pre-norm blocks --> norm of the class token [B, D]

Weights of the N layers are stacked and scanned. Products run at full precision: features are compared with those of PyTorch.
Modules are made with zeros, abstractly; their weights come from files (files.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Activation = Literal["quick_gelu", "gelu"]
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's weights were trained with it
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of N equal blocks."""

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    eps: float
    """Of the LayerNorms."""
    activation: Activation
    causal: bool = False


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """An image tower."""

    blocks: TransformerConfig
    image_size: int
    patch_size: int
    patch_bias: bool
    """DINO has it, CLIP has not."""
    pre_norm: bool
    """A norm before the blocks: CLIP has it, DINO has not."""


class Linear(nnx.Module):
    """x @ kernel + bias; `shape` is (..., in, out), leading axes are layers."""

    def __init__(self, *shape: int, bias: bool = True):
        self.kernel = nnx.Param(jnp.zeros(shape))
        self.bias = nnx.Param(jnp.zeros((*shape[:-2], shape[-1]))) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        y = jnp.matmul(x, self.kernel[...], precision="highest")
        return y if self.bias is None else y + self.bias[...]


class LayerNorm(nnx.Module):
    """Over the last axis; `shape` is (..., D)."""

    def __init__(self, *shape: int, eps: float):
        self.scale, self.bias, self.eps = nnx.Param(jnp.zeros(shape)), nnx.Param(jnp.zeros(shape)), eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * self.scale[...] + self.bias[...]


class Blocks(nnx.Module):
    """N pre-norm transformer blocks, stacked: x + attention(norm1 x), then x + fc2(act(fc1(norm2 x)))."""

    def __init__(self, c: TransformerConfig):
        n, d, f = c.num_layers, c.dim, c.ffn_dim
        self.config = c
        self.norm1, self.norm2 = LayerNorm(n, d, eps=c.eps), LayerNorm(n, d, eps=c.eps)
        self.query, self.key, self.value, self.out = (Linear(n, d, d) for _ in range(4))
        self.fc1, self.fc2 = Linear(n, d, f), Linear(n, f, d)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Through all layers, [B, L, D] -> [B, L, D]."""
        return jax.lax.scan(lambda x, layer: (layer._block(x), None), x, self)[0]

    def _block(self, x: jax.Array) -> jax.Array:
        c, (b, length, d) = self.config, x.shape
        h = self.norm1(x)
        q, k, v = (linear(h).reshape(b, length, c.num_heads, d // c.num_heads) for linear in (self.query, self.key, self.value))
        scores = jnp.einsum("blhk,bmhk->bhlm", q, k, precision="highest") * q.shape[-1] ** -0.5
        if c.causal:
            scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
        context = jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(scores), v, precision="highest")
        x = x + self.out(context.reshape(b, length, d))
        return x + self.fc2(_ACTIVATIONS[c.activation](self.fc1(self.norm2(x))))


class ImageTower(nnx.Module):
    """Pixels to one vector, that of the class token."""

    def __init__(self, c: ImageConfig):
        d, p = c.blocks.dim, c.patch_size
        self.config = c
        self.patches = Linear(p * p * 3, d, bias=c.patch_bias)
        self.class_token = nnx.Param(jnp.zeros(d))
        self.positions = nnx.Param(jnp.zeros(((c.image_size // p) ** 2 + 1, d)))
        self.pre_norm = LayerNorm(d, eps=c.blocks.eps) if c.pre_norm else None
        self.blocks = Blocks(c.blocks)
        self.norm = LayerNorm(d, eps=c.blocks.eps)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """float32 [B, S, S, 3], preprocessed -> [B, D]."""
        b, p, side = pixels.shape[0], self.config.patch_size, self.config.image_size // self.config.patch_size
        patches = pixels.reshape(b, side, p, side, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, side * side, p * p * 3)
        first = jnp.broadcast_to(self.class_token[...], (b, 1, self.config.blocks.dim))
        x = jnp.concatenate([first, self.patches(patches)], axis=1) + self.positions[...]
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        return self.norm(self.blocks(x)[:, 0])


def in_batches(function: Callable[..., jax.Array], *arrays: np.ndarray, most: int = 64) -> np.ndarray:
    """`function` over at most `most` rows at once; the last batch is filled up to a power of two, so that few shapes are compiled."""
    done = []
    for start in range(0, len(arrays[0]), most):
        parts = [array[start : start + most] for array in arrays]
        count = len(parts[0])
        room = (1 << (count - 1).bit_length()) - count
        done.append(np.asarray(function(*(np.pad(part, ((0, room), *((0, 0),) * (part.ndim - 1))) for part in parts)))[:count])
    return np.concatenate(done)


def unit(vectors: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Rows of length 1, float32 (0 for a row of zeros)."""
    rows = np.asarray(vectors, np.float64)
    return (rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)).astype(np.float32)
