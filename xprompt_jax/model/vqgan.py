"""The VQGAN image tokenizer: pixels <-> a grid of codes (facts: chameleon.md 2).

    encode:  [B, h, w, 3] in [-1, 1]  ->  encoder, quant_conv  ->  nearest codebook row  ->  int32 [B, h/f, w/f]
    decode:  codes  ->  codebook rows, post_quant_conv, decoder  ->  [B, h, w, 3], about [-1, 1], not clamped

Parameter paths are those of Meta's checkpoint (encoder.down.0.block.0.conv1.weight ...); kernels are [height, width,
in, out]. The tokenizer runs in float32, products at full precision: in 16 bits or TF32, codes flip.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from xprompt_jax.config import VQConfig
from xprompt_jax.errors import UserError

_EPS = 1e-6
_CODES_AT_ONCE = 1024  # bounds the distances held in memory: 4 KB per place
_PIXELS_AT_ONCE = 2**20  # bounds the activations of `encode` and `decode`: 1.5 GB at Chameleon's width, which has 1.5 KB per pixel


def _groups(channels: int) -> int:
    """Groups of every GroupNorm, from the width of the first level: 32, as in Chameleon, where they divide it.

    Narrower models take Chameleon's four channels a group: groups of one channel erase the brightness of a picture.
    """
    if channels % 32 and channels % 4:
        raise UserError(f"vq.channels {channels} must be a multiple of 4")
    return 32 if channels % 32 == 0 else channels // 4


class Conv(nnx.Module):
    """A convolution, channels last."""

    def __init__(self, key: jax.Array, inputs: int, outputs: int, size: int = 3, *, stride: int = 1):
        std = (inputs * size * size) ** -0.5
        self.weight = nnx.Param(std * jax.random.normal(key, (size, size, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.stride, self.pad = stride, size // 2

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, in] -> [B, h/stride, w/stride, out]."""
        # A stride of 2 pads right and below only (trap 12).
        padding = [(0, 1)] * 2 if self.stride == 2 else [(self.pad, self.pad)] * 2
        y = jax.lax.conv_general_dilated(
            x, self.weight[...], (self.stride, self.stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        return y + self.bias[...]


class Norm(nnx.Module):
    """GroupNorm."""

    def __init__(self, channels: int, groups: int):
        self.weight, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.groups = groups

    def _pool(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, 1, 1, C]: the mean of each channel's group."""
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        groups = mean.reshape(*mean.shape[:3], self.groups, -1)
        return jnp.broadcast_to(jnp.mean(groups, axis=-1, keepdims=True), groups.shape).reshape(mean.shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> the same."""
        x = x - self._pool(x)
        return x * (jax.lax.rsqrt(self._pool(x * x) + _EPS) * self.weight[...]) + self.bias[...]


class ResBlock(nnx.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution on x where the channels change."""

    def __init__(self, key: jax.Array, inputs: int, outputs: int, groups: int):
        keys = jax.random.split(key, 3)
        self.norm1, self.conv1 = Norm(inputs, groups), Conv(keys[0], inputs, outputs)
        self.norm2, self.conv2 = Norm(outputs, groups), Conv(keys[1], outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = Conv(keys[2], inputs, outputs, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, in] -> [B, h, w, out]."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttentionBlock(nnx.Module):
    """Single-head attention over all places, plus x."""

    def __init__(self, key: jax.Array, channels: int, groups: int):
        keys = jax.random.split(key, 4)
        self.norm = Norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (Conv(k, channels, channels, 1) for k in keys)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> the same."""
        h = self.norm(x)
        q, k, v = (f(h).reshape(x.shape[0], -1, x.shape[3]) for f in (self.q, self.k, self.v))
        scores = jnp.einsum("bqc,bkc->bqk", q, k, precision="highest") * x.shape[3] ** -0.5
        h = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(scores, axis=-1), v, precision="highest")
        return x + self.proj_out(h.reshape(x.shape))


class Middle(nnx.Module):
    """Residual, attention, residual."""

    def __init__(self, key: jax.Array, channels: int, groups: int):
        keys = jax.random.split(key, 3)
        self.block_1 = ResBlock(keys[0], channels, channels, groups)
        self.attn_1 = AttentionBlock(keys[1], channels, groups)
        self.block_2 = ResBlock(keys[2], channels, channels, groups)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> the same."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nnx.Module):
    """Half or double the resolution: one convolution, of stride 2 or after nearest-neighbour doubling."""

    def __init__(self, key: jax.Array, channels: int, *, up: bool):
        self.conv = Conv(key, channels, channels, stride=1 if up else 2)
        self.up = up

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, 2h, 2w, C] or [B, h/2, w/2, C]."""
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2) if self.up else x)


class Level(nnx.Module):
    """Residual blocks at one resolution, then a change of resolution (absent at the last)."""

    def __init__(self, key: jax.Array, inputs: int, outputs: int, groups: int, blocks: int, resample: str | None):
        keys = jax.random.split(key, blocks + 1)
        self.block = nnx.List([ResBlock(k, outputs if i else inputs, outputs, groups) for i, k in enumerate(keys[1:])])
        if resample is not None:
            setattr(self, resample, Resample(keys[0], outputs, up=resample == "upsample"))
        self.resample = resample

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, in] -> [B, h, w, out], or the changed resolution."""
        for block in self.block:
            x = block(x)
        return x if self.resample is None else getattr(self, self.resample)(x)


class Encoder(nnx.Module):
    """Pixels to latents."""

    def __init__(self, c: VQConfig, key: jax.Array):
        widths, groups = [c.channels * m for m in c.channel_multipliers], _groups(c.channels)
        keys = jax.random.split(key, len(widths) + 3)
        self.conv_in = Conv(keys[0], 3, c.channels)
        inputs = [c.channels, *widths[:-1]]
        last = len(widths) - 1
        self.down = nnx.List([
            Level(keys[3 + i], a, b, groups, c.num_res_blocks, "downsample" if i < last else None)
            for i, (a, b) in enumerate(zip(inputs, widths, strict=True))
        ])  # fmt: skip
        self.mid = Middle(keys[1], widths[-1], groups)
        self.norm_out, self.conv_out = Norm(widths[-1], groups), Conv(keys[2], widths[-1], c.latent_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, 3] -> [B, h/f, w/f, latent channels]."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Latents to pixels; `up` is stored from fine to coarse and runs from its end (trap 12)."""

    def __init__(self, c: VQConfig, key: jax.Array):
        widths, groups = [c.channels * m for m in c.channel_multipliers], _groups(c.channels)
        keys = jax.random.split(key, len(widths) + 3)
        self.conv_in = Conv(keys[0], c.latent_channels, widths[-1])
        self.mid = Middle(keys[1], widths[-1], groups)
        inputs = [*widths[1:], widths[-1]]
        self.up = nnx.List([
            Level(keys[3 + i], a, b, groups, c.num_res_blocks + 1, "upsample" if i > 0 else None)
            for i, (a, b) in enumerate(zip(inputs, widths, strict=True))
        ])  # fmt: skip
        self.norm_out, self.conv_out = Norm(widths[0], groups), Conv(keys[2], widths[0], 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, rows, columns, latent channels] -> [B, rows*f, columns*f, 3]."""
        x = self.mid(self.conv_in(x))
        for level in reversed(list(self.up)):
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Codebook(nnx.Module):
    """The vectors that codes stand for."""

    def __init__(self, c: VQConfig, key: jax.Array):
        bound = 1 / c.num_codes
        rows = jax.random.uniform(key, (c.num_codes, c.embed_dim), minval=-bound, maxval=bound)
        self.embedding = nnx.Dict(weight=nnx.Param(rows))

    @property
    def rows(self) -> jax.Array:
        """float32 [num_codes, C]."""
        return self.embedding.weight[...]

    def __call__(self, latent: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[..., C] -> (int32 [...] codes of the nearest rows, lowest code first in a tie; those rows [..., C])."""
        rows = self.rows
        parts = -(-len(rows) // _CODES_AT_ONCE)
        size = -(-len(rows) // parts)  # all parts of one size: products of equal rows then round alike, and ties stay ties
        padding = parts * size - len(rows)
        padded = jnp.pad(rows, ((0, padding), (0, 0)))
        norms = jnp.pad(jnp.sum(rows * rows, axis=-1), (0, padding), constant_values=jnp.inf)
        best = jnp.full(latent.shape[:-1], jnp.inf, jnp.float32)
        codes = jnp.zeros(latent.shape[:-1], jnp.int32)
        for start in range(0, parts * size, size):
            part = slice(start, start + size)
            # Without |latent|^2, which is the same for all rows.
            distance = norms[part] - 2 * jnp.einsum("...c,nc->...n", latent, padded[part], precision="highest")
            nearest = jnp.min(distance, axis=-1)
            codes = jnp.where(nearest < best, start + jnp.argmin(distance, axis=-1).astype(jnp.int32), codes)
            best = jnp.minimum(best, nearest)
        return codes, rows[codes]


def _in_slices(f: Callable[[jax.Array], jax.Array], x: jax.Array, pixels: int) -> jax.Array:
    """f(x), computed for as many images at a time as hold _PIXELS_AT_ONCE, but at least one.

    No smaller, though a picture may be large: its normalisations and its attention see all of it at once.

    Args:
      f: treats each image on its own.
      x: [B, ...].
      pixels: of one image.
    """
    if len(x) <= 1 or len(x) * pixels <= _PIXELS_AT_ONCE:
        return f(x)
    parts = -(-len(x) // max(1, _PIXELS_AT_ONCE // pixels))
    size = -(-len(x) // parts)
    padded = jnp.pad(x, [(0, parts * size - len(x))] + [(0, 0)] * (x.ndim - 1))
    y = jax.lax.map(f, padded.reshape(parts, size, *x.shape[1:]))
    return y.reshape(parts * size, *y.shape[2:])[: len(x)]


class VQGAN(nnx.Module):
    """Encoder, codebook and decoder; parameters in float32. Sides may be any multiple of `config.downsample`.

    `encode` and `decode` take batches of any size: large ones go through in slices of a million pixels, in bounded memory.

    Raises:
      UserError: `config.channels` is not a multiple of 4.
    """

    def __init__(self, config: VQConfig, key: jax.Array):
        keys = jax.random.split(key, 5)
        self.config = config
        self.encoder, self.decoder = Encoder(config, keys[0]), Decoder(config, keys[1])
        self.quantize = Codebook(config, keys[2])
        self.quant_conv = Conv(keys[3], config.latent_channels, config.embed_dim, 1)
        self.post_quant_conv = Conv(keys[4], config.embed_dim, config.latent_channels, 1)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """float32 [B, h, w, 3] in [-1, 1] -> int32 [B, h/f, w/f] codes, f = `config.downsample`.

        Raises:
          UserError: h or w is not a positive multiple of f.
        """
        return _in_slices(lambda x: self.quantize(self.encode_latent(x))[0], pixels, pixels.shape[1] * pixels.shape[2])

    def decode(self, codes: jax.Array) -> jax.Array:
        """int32 [B, rows, columns] -> float32 [B, rows*f, columns*f, 3], about [-1, 1], not clamped."""
        pixels = codes.shape[1] * codes.shape[2] * self.config.downsample**2
        return _in_slices(lambda c: self.decode_latent(self.quantize.rows[c]), codes, pixels)

    def encode_latent(self, pixels: jax.Array) -> jax.Array:
        """[B, h, w, 3] -> [B, h/f, w/f, C], before quantisation; raises like `encode`."""
        f, (h, w) = self.config.downsample, pixels.shape[1:3]
        if h % f or w % f or not h or not w:
            raise UserError(f"an image of {w} x {h} pixels: both sides must be multiples of {f}; resize or crop it")
        return self.quant_conv(self.encoder(pixels))

    def decode_latent(self, latent: jax.Array) -> jax.Array:
        """[B, rows, columns, C], quantised or not -> pixels [B, rows*f, columns*f, 3]."""
        return self.decoder(self.post_quant_conv(latent))
