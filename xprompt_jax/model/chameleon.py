"""The decoder: Chameleon's transformer with XP tokens (facts: chameleon.md 1.2).

    pre-norm (7B):   h = x + Attn(RMS_a(x));   out = h + MLP(RMS_m(h))
    swin (30B):      h = x + RMS_a(Attn(x));   out = h + RMS_m(MLP(h))

Three ways through the same blocks, which differ only in the `attend` function they hand in:
    hidden      the training pass: slots of several shapes at once, split attention
    logits      the oracle: any roles, dense mask
    extend      W more tokens per row onto a cache: prefill, decoding, windows of drafts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from xprompt_jax.config import ComputeConfig, ModelConfig
from xprompt_jax.mesh import constrain
from xprompt_jax.model.attention import cached_attention, dense_attention, dense_mask, split_attention
from xprompt_jax.model.cache import Cache, write
from xprompt_jax.model.layers import MLP, Attention, dropout, normal, rms_norm, rotary
from xprompt_jax.model.product import product
from xprompt_jax.model.quantize import Int8
from xprompt_jax.model.xp import init_xp, place_by_role, place_in_slots
from xprompt_jax.prompt import SlotShape

# attend(q, k, v, state) -> (context, output): q [B, L, H, K], k and v [B, L, G, K], normed but not yet rotated.
Attend = Callable[..., tuple[jax.Array, object]]


class Block(nnx.Module):
    """One decoder block; its parameters are stacked over all layers (see layers.py)."""

    def __init__(self, config: ModelConfig, key: jax.Array, dtype):
        keys = jax.random.split(key)
        self.attention = Attention(config, keys[0], dtype)
        self.mlp = MLP(config, keys[1], dtype)
        self.attention_norm = nnx.Param(jnp.ones((config.num_layers, config.dim), dtype))
        self.mlp_norm = nnx.Param(jnp.ones((config.num_layers, config.dim), dtype))
        self.swin, self.eps = config.swin_norm, config.norm_eps

    def __call__(self, x: jax.Array, attend: Attend, rate: float = 0.0, key: jax.Array | None = None):
        """[B, L, D] -> ([B, L, D], what `attend` put out)."""
        keys = (None, None) if key is None else jax.random.split(key)
        x = checkpoint_name(constrain(x, "batch", "slots", "act_embed"), "block_input")
        # Each branch has an input of its own, a norm or a constraint: there the gradients of its weights' products are added up before
        # devices exchange them, once and not once for each product.
        enter = lambda x, norm: constrain(x, "batch", "slots", "act_embed") if self.swin else rms_norm(x, norm[...], self.eps)

        h = enter(x, self.attention_norm)
        context, out = attend(*self.attention.project(h))
        h = self.attention.output(context)
        h = rms_norm(h, self.attention_norm[...], self.eps) if self.swin else h
        x = x + dropout(h, rate, keys[0])

        h = self.mlp(enter(x, self.mlp_norm))
        h = rms_norm(h, self.mlp_norm[...], self.eps) if self.swin else h
        return x + dropout(h, rate, keys[1]), out


def remat_policy(name: str):
    """The checkpoint policy of a `ComputeConfig.remat` choice, and None for "none"."""
    policies = jax.checkpoint_policies
    return {
        "none": lambda: None,
        "block": lambda: policies.nothing_saveable,
        "dots": lambda: policies.dots_with_no_batch_dims_saveable,
        "names": lambda: policies.save_only_these_names("query", "key", "value", "context", "mlp"),
        "offload": lambda: policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=["block_input"],
            offload_src="device", offload_dst="pinned_host",
        ),
    }[name]()  # fmt: skip


class Rows(NamedTuple):
    """B rows of one shape, as the training pass takes them."""

    ids: jax.Array
    """int32 [B, L]."""
    positions: jax.Array
    """int32 [B, L]."""
    example_lengths: jax.Array
    """int32 [B, E]."""
    shape: SlotShape
    """What the L slots are."""


def pack(parts: Sequence[jax.Array]) -> jax.Array:
    """Arrays [B, L, ...] of several B and L as one [P, sum of B L / P, ...], P the greatest number that divides every B.

    Rows are split over devices, whose number divides each B and so P: every device packs what it has.
    """
    lanes = math.gcd(*(len(part) for part in parts))
    packed = [part.reshape(lanes, -1, *part.shape[2:]) for part in parts]
    return jnp.concatenate(packed, axis=1) if len(packed) > 1 else packed[0]


def unpack(x: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """The way back: [P, T, ...] -> [B, L, ...] for each (B, L)."""
    out, start = [], 0
    for rows, slots in shapes:
        size = rows * slots // len(x)
        out.append(x[:, start : start + size].reshape(rows, slots, *x.shape[2:]))
        start += size
    return out


def layer_at(blocks: Block, i: int) -> Block:
    """Layer i of the stacked blocks."""
    return jax.tree.map(lambda w: w[i], blocks)


class Chameleon(nnx.Module):
    """Decoder parameters and its passes. No random state, no files, no tokenizer."""

    def __init__(self, config: ModelConfig, key: jax.Array, dtype=jnp.float32):
        keys = jax.random.split(key, 4)
        self.config = config
        self.embed = normal(keys[0], (config.vocab_size, config.dim), 1.0, dtype)
        self.head = normal(keys[1], (config.dim, config.vocab_size), config.dim**-0.5, dtype)
        self.norm = nnx.Param(jnp.ones(config.dim, dtype))
        self.xp = nnx.Param(init_xp(keys[2], self.embed[...], config.num_xp_tokens))
        self.blocks: Any = Block(config, keys[3], dtype)  # all layers stacked; `unstacked` makes it a list of layers

    def hidden(self, parts: Sequence[Rows], compute: ComputeConfig, *, rate: float = 0.0, key: jax.Array | None = None) -> list[jax.Array]:
        """The training pass, on rows of several shapes at once: every layer's weights are used, and gathered from devices, once.

        Args:
          parts: rows of each shape; ids at XP slots are ignored.
          rate, key: residual-branch dropout; off without a key.

        Returns:
          Of each part [B, L, D] in `compute.dtype`, after the final norm.
        """
        x, _ = self._run(self._embed_slots(parts, compute), self._slots_attend(parts, compute), compute, rate, key)
        return unpack(self.final(x), [part.ids.shape for part in parts])

    def encode_examples(
        self, ids: jax.Array, positions: jax.Array, shape: SlotShape, example_lengths: jax.Array, compute: ComputeConfig
    ) -> tuple[jax.Array, jax.Array]:
        """What a compiled prompt keeps: keys (normed, not rotated) and values of the XP slots in every layer.

        Args:
          ids, positions, shape, example_lengths: as of `Rows`, with one example each; `shape` has E = 1 and T = 0.

        Returns:
          k, v: [N, B, S, G, K].
        """
        parts = [Rows(ids, positions, example_lengths, shape)]
        attend, slots = self._slots_attend(parts, compute), slice(shape.context_end, shape.xp_end)
        keep = lambda q, k, v: (attend(q, k, v)[0], (k[:, slots], v[:, slots]))
        return self._run(self._embed_slots(parts, compute), keep, compute)[1]

    def logits(
        self, ids: jax.Array, roles: jax.Array, groups: jax.Array, positions: jax.Array, segments: jax.Array,
        compute: ComputeConfig,
    ) -> jax.Array:  # fmt: skip
        """The oracle: any arrangement of roles, groups, positions and segments (all int32 [B, L]) -> float32 [B, L, V]."""
        x = place_by_role(self.embed_tokens(ids, compute), self.xp[...], roles, groups, segments)
        mask = dense_mask(roles, groups, segments)

        def attend(q, k, v):
            q, k = (rotary(t, positions, self.config.rope_theta) for t in (q, k))
            return dense_attention(q, k, v, mask), None

        x, _ = self._run(x, attend, compute)
        return project_logits(self.final(x), self.head[...])

    def embed_tokens(self, ids: jax.Array, compute: ComputeConfig) -> jax.Array:
        """int32 [B, L] -> [B, L, D] in the compute type."""
        # The table is split over fsdp, as the rows are: a device looks up its part of the embedding for all rows of its group, then they
        # trade. XLA finds this way by itself only where data is 1, and copies everything everywhere where it is not.
        x = self.embed[...].astype(compute.dtype)[constrain(ids, "rows", "slots")]
        return constrain(constrain(x, "rows", "slots", "embed"), "batch", "slots", "act_embed")

    def final(self, x: jax.Array) -> jax.Array:
        """The norm before the head."""
        return rms_norm(x, self.norm[...], self.config.norm_eps)

    def _embed_slots(self, parts: Sequence[Rows], compute: ComputeConfig) -> jax.Array:
        """Embedded tokens with the XP rows in their slots, packed."""
        x = self.embed_tokens(pack([part.ids for part in parts]), compute)
        rows = unpack(x, [part.ids.shape for part in parts])
        return pack([place_in_slots(x, self.xp[...], part.shape) for x, part in zip(rows, parts, strict=True)])

    def _slots_attend(self, parts: Sequence[Rows], compute: ComputeConfig) -> Attend:
        """Attention of packed rows: all else in a block looks at single tokens, so here alone the rows are taken apart."""
        positions, shapes = pack([part.positions for part in parts]), [part.ids.shape for part in parts]

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            q, k = (rotary(t, positions, self.config.rope_theta) for t in (q, k))
            apart = zip(parts, *(unpack(t, shapes) for t in (q, k, v)), strict=True)
            return pack([split_attention(q, k, v, part.shape, part.example_lengths, compute) for part, q, k, v in apart]), None

        return attend

    def _run(self, x: jax.Array, attend: Attend, compute: ComputeConfig, rate: float = 0.0, key: jax.Array | None = None):
        """x through all layers; returns (x, outputs of attend stacked over layers)."""
        num_layers = self.config.num_layers
        keys = None if key is None else jax.random.split(key, num_layers)
        stacked = not isinstance(self.blocks, nnx.List)

        def layer(x, scanned):
            block, key = scanned
            return block(x, attend, rate, key)

        policy = remat_policy(compute.remat)
        if policy is not None:
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=not compute.scan_layers)
        if stacked and compute.scan_layers:
            return jax.lax.scan(layer, x, (self.blocks, keys))
        outs = []
        for i in range(num_layers):
            block = layer_at(self.blocks, i) if stacked else self.blocks[i]
            x, out = layer(x, (block, None if keys is None else keys[i]))
            outs.append(out)
        return x, jax.tree.map(lambda *o: jnp.stack(o), *outs)


def unstacked(model: Chameleon) -> Chameleon:
    """The same decoder with its layers apart: decoding reads each weight once, and a slice of a stack would be a copy."""
    graph, state = nnx.split(model)
    apart = nnx.merge(graph, state)
    apart.blocks = nnx.List([layer_at(model.blocks, i) for i in range(model.config.num_layers)])
    return apart


def restacked(model: Chameleon) -> Chameleon:
    """The way back from `unstacked`, without touching `model`; memory is allocated for the stacks."""
    graph, state = nnx.split(model)
    stacked = nnx.merge(graph, state)
    stacked.blocks = jax.tree.map(lambda *weights: jnp.stack(weights), *model.blocks)
    return stacked


def extend(blocks: Sequence[Block], x: jax.Array, cache: Cache, count: jax.Array, theta: float) -> tuple[jax.Array, Cache]:
    """W more tokens per row: their keys and values go into the cache, and they attend to it.

    Args:
      blocks: the N layers, apart (see `unstacked`).
      x: embedded tokens [B, W, D].
      cache: rows need W free slots each.
      count: int32 [B], how many of the W tokens are kept; the rest are padding or drafts.
      theta: rotary base.

    Returns:
      [B, W, D] before the final norm, and the cache with length and position advanced by `count`.
    """
    positions = cache.position[:, None] + jnp.arange(x.shape[1])
    ks, vs = [], []
    for block, k_buffer, v_buffer in zip(blocks, cache.k, cache.v, strict=True):

        def attend(q, k, v, k_buffer=k_buffer, v_buffer=v_buffer):
            q, k = (rotary(t, positions, theta) for t in (q, k))
            k_buffer, v_buffer = write(k_buffer, k, cache.length), write(v_buffer, v, cache.length)
            return cached_attention(q, k_buffer, v_buffer, cache.length), (k_buffer, v_buffer)

        x, (k_buffer, v_buffer) = block(x, attend)
        ks.append(k_buffer)
        vs.append(v_buffer)
    return x, Cache(tuple(ks), tuple(vs), cache.length + count, cache.position + count)


def project_logits(x: jax.Array, head: jax.Array | Int8) -> jax.Array:
    """[..., D] times head [D, V] -> float32 [..., V]."""
    return product("...d,dv->...v", x, head, jnp.float32)


def abstract_model(config: ModelConfig, dtype=jnp.float32) -> Chameleon:
    """The decoder's shapes without its memory."""
    return jax.eval_shape(lambda: Chameleon(config, jax.random.key(0), dtype))
