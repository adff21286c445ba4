"""Attention under the XP mask: the dense oracle, the split form that production uses, and the cached form.

Training never builds an [L, L] mask. With the slots of prompt.py the mask falls apart into calls that fast kernels
know (square, causal), and E * S dense rows:

    1. [SINK | IE_e]               square causal, the examples folded into the batch
    2. XP_e over [SINK | IE_e | XP_e]   S dense rows, with the example's length as the only mask
    3. [SINK | XP_1 .. XP_E | TD]  square causal; only the TD rows of the result are kept

Padding needs no mask in 1 and 3: it stands at the end, where causality already hides it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from xprompt_jax.config import ComputeConfig
from xprompt_jax.errors import UserError
from xprompt_jax.mesh import sharding_for
from xprompt_jax.model.quantize import Int8
from xprompt_jax.prompt import Role, SlotShape

_MASKED = -1e30  # finite, so that a row without any key cannot become NaN

_LEAST_BLOCK, _MOST_BLOCKS = 128, 8
"""Queries of a block of `blocked_causal`, at least; blocks of one call, at most (each is a part of the program)."""


def dense_mask(roles: jax.Array, groups: jax.Array, segments: jax.Array) -> jax.Array:
    """The contract as a matrix, for tests and for `XPrompt.logits`.

    Args:
      roles: int32 [B, L], values of `prompt.Role`.
      groups: int32 [B, L], the example a token belongs to.
      segments: int32 [B, L], the document a token belongs to.

    Returns:
      bool [B, L, L], true where query (row) may attend to key (column). PAD tokens see themselves alone.
    """
    length = roles.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    q, k = roles[:, :, None], roles[:, None, :]
    own_group = groups[:, :, None] == groups[:, None, :]
    from_example = ((q == Role.IE) | (q == Role.XP)) & own_group
    rule = (
        (k == Role.SINK)
        | ((k == Role.IE) & from_example)
        | ((k == Role.XP) & (((q == Role.XP) & own_group) | (q == Role.TD)))
        | ((k == Role.TD) & (q == Role.TD))
    )
    allowed = causal & rule & (segments[:, :, None] == segments[:, None, :]) & (q != Role.PAD) & (k != Role.PAD)
    return allowed | jnp.eye(length, dtype=bool)


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with a mask; the slow oracle, and the few dense rows of the split form.

    Args:
      q: [B, Q, H, K].
      k, v: [B, T, G, K], G dividing H.
      mask: bool, broadcastable to [B, Q, T].

    Returns:
      [B, Q, H, K] in q's type; scores and softmax in float32.
    """
    return _by_head(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)


def _by_head(
    q: jax.Array, k: jax.Array | Int8, v: jax.Array | Int8, mask: jax.Array, *, keys_first: bool = False
) -> jax.Array:  # fmt: skip
    """Attention on keys and values [B, G, T, K]: matrix products of blocks of memory, which no backend has to rearrange first.

    Args:
      q: [B, Q, H, K]; a group's query heads become rows of one product.
      k, v: arrays, or `Int8` with a scale for each token and head, which multiplies the scores and the weights and not the array.
      mask: bool, broadcastable to [B, Q, T].
      keys_first: multiplies keys with queries: a CPU turns the second factor around, which should be a few queries and not a cache.
    """
    batch, queries, heads, dim = q.shape
    groups = k.shape[1]
    keys, values = (t.values.astype(q.dtype) if isinstance(t, Int8) else t for t in (k, v))
    q = q.reshape(batch, queries, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, dim)
    if keys_first:
        turned = jnp.einsum("bgtk,bgqk->bgtq", keys, q, preferred_element_type=jnp.float32)
        scores = jax.lax.optimization_barrier(turned).swapaxes(2, 3)  # without the barrier, XLA swaps the factors again
    else:
        scores = jnp.einsum("bgqk,bgtk->bgqt", q, keys, preferred_element_type=jnp.float32)
    scores = scores * dim**-0.5
    if isinstance(k, Int8):
        scores = scores * k.scale.swapaxes(2, 3)
    mask = jnp.tile(jnp.broadcast_to(mask, (mask.shape[0], queries, mask.shape[2])), (1, heads // groups, 1))
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, _MASKED), axis=-1)
    if isinstance(v, Int8):
        weights = weights * v.scale.swapaxes(2, 3)
    out = jnp.einsum("bgqt,bgtk->bgqk", weights.astype(values.dtype), values)
    return out.reshape(batch, groups, heads // groups, queries, dim).transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, dim)


def split_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, shape: SlotShape, example_lengths: jax.Array, compute: ComputeConfig | None = None
) -> jax.Array:
    """Attention under the XP mask on the slots of prompt.py, without ever forming the mask.

    Args:
      q: [B, L, H, K], rotated.
      k, v: [B, L, G, K], keys rotated.
      shape: the slots of the rows.
      example_lengths: int32 [B, E], tokens of each example.
      compute: says which kernel computes the causal calls, see `causal_kernel`; None is the defaults.

    Returns:
      [B, L, H, K]. Rows of padding hold finite values without meaning.
    """
    causal = causal_kernel(compute or ComputeConfig(), q.dtype)
    batch, examples, context, xp = q.shape[0], shape.examples, shape.context, shape.xp
    if not examples:
        return causal(q, k, v)

    def fold(t: jax.Array, start: int, size: int) -> jax.Array:
        """Slots of all examples, with the examples folded into the batch: [B * E, size, heads, K]."""
        return t[:, start : start + examples * size].reshape(batch * examples, size, *t.shape[2:])

    def per_example(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        sink = jnp.repeat(t[:, :1], examples, axis=0)
        return jnp.concatenate([sink, fold(t, 1, context)], axis=1), fold(t, shape.context_end, xp)

    (q_ie, q_xp), (k_ie, k_xp), (v_ie, v_xp) = per_example(q), per_example(k), per_example(v)
    example = causal(q_ie, k_ie, v_ie)

    in_example = jnp.arange(1 + context) <= example_lengths.reshape(-1, 1)
    mask = jnp.concatenate(
        [
            jnp.broadcast_to(in_example[:, None], (batch * examples, xp, 1 + context)),
            jnp.broadcast_to(jnp.tril(jnp.ones((xp, xp), bool)), (batch * examples, xp, xp)),
        ],
        axis=-1,
    )
    keys, values = jnp.concatenate([k_ie, k_xp], axis=1), jnp.concatenate([v_ie, v_xp], axis=1)
    carried = dense_attention(q_xp, keys, values, mask)

    parts = [
        example[::examples, :1],
        example[:, 1:].reshape(batch, examples * context, *q.shape[2:]),
        carried.reshape(batch, examples * xp, *q.shape[2:]),
    ]
    if shape.todo:
        visible = [jnp.concatenate([t[:, :1], t[:, shape.context_end :]], axis=1) for t in (q, k, v)]
        parts.append(causal(*visible)[:, 1 + examples * xp :])
    return jnp.concatenate(parts, axis=1)


def cached_attention(q: jax.Array, k: jax.Array | Int8, v: jax.Array | Int8, lengths: jax.Array) -> jax.Array:
    """Attention of W new tokens over a cache that already holds their keys.

    Args:
      q: [B, W, H, K], rotated.
      k, v: [B, G, T, K], the whole cache; of int8, a scale for each token and head.
      lengths: int32 [B], slots of each row that were filled before the new tokens.

    Returns:
      [B, W, H, K] in q's type: new token i of a row sees slots 0 .. lengths + i. Scores and softmax in float32.
    """
    window = lengths[:, None] + jnp.arange(q.shape[1])
    return _by_head(q, k, v, jnp.arange(k.shape[2]) <= window[..., None], keys_first=True)


Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def causal_kernel(compute: ComputeConfig, dtype) -> Kernel:
    """The kernel for square causal attention that `compute.attention` names, q [B, L, H, K], k and v [B, L, G, K].

    xla runs everywhere; cudnn needs an NVIDIA GPU and a 16-bit type; splash needs a TPU.

    Raises:
      UserError: the backend cannot run here. There is no silent fallback.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device  # a mesh may be of machines that are not here (compiling ahead of time)
    platform, backend = device.platform if device else jax.default_backend(), compute.attention
    if backend == "xla":
        return blocked_causal
    if backend == "cudnn":
        if platform != "gpu":
            raise UserError(f"compute.attention 'cudnn' needs an NVIDIA GPU, this is {platform}; use 'xla'")
        if jnp.dtype(dtype).itemsize != 2:
            raise UserError(f"compute.attention 'cudnn' needs compute.dtype bfloat16 or float16, not {jnp.dtype(dtype)}")
        return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    if backend == "splash":
        if platform != "tpu":
            raise UserError(f"compute.attention 'splash' needs a TPU, this is {platform}; use 'xla'")
        return functools.partial(splash_causal, block=compute.splash_block)
    raise UserError(f"compute.attention {backend!r} is unknown; use xla, cudnn or splash")


def blocked_causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Square causal attention in plain XLA, with most of the upper triangle left out.

        keys      0    1    2    3
        block 0   \\    .    .    .     each block of queries meets the keys up to its own end;
        block 1   x    \\    .    .     only the blocks on the diagonal hold masked scores
        block 2   x    x    \\    .
        block 3   x    x    x    \\

    With n blocks it computes (n + 1) / 2n of the square's scores. The backward pass makes them again and keeps none, as flash kernels do.

    Args:
      q: [B, L, H, K], rotated.
      k, v: [B, L, G, K], keys rotated.

    Returns:
      [B, L, H, K].
    """
    length, attend = q.shape[1], jax.checkpoint(dense_attention)
    block = max(_LEAST_BLOCK, -(-length // _MOST_BLOCKS))
    rows = []
    for start in range(0, length, block):
        end = min(start + block, length)
        mask = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        rows.append(attend(q[:, start:end], k[:, :end], v[:, :end], mask[None]))
    return jnp.concatenate(rows, axis=1) if len(rows) > 1 else rows[0]


def splash_causal(q: jax.Array, k: jax.Array, v: jax.Array, *, block: int = 512, interpret: bool = False) -> jax.Array:
    """Square causal attention by JAX's TPU splash kernel; lengths are padded to a multiple of its block.

    XLA cannot split a Pallas kernel over devices: under the mesh of `jax.set_mesh`, each runs it on its own rows and heads.
    `interpret` runs the kernel's program on any device, slowly, so that tests can hold it against the oracle.
    """
    repeat = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(t, repeat, axis=2) for t in (k, v))
    local = functools.partial(_splash, block=block, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        spec = sharding_for(mesh, ("batch", "slots", "heads", "head_dim"), q.shape).spec
        local = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return local(q, k, v)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, *, block: int, interpret: bool) -> jax.Array:
    """The kernel on one device; k and v have as many heads as q."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, dim = q.shape[1:]
    block = min(block, length + -length % 128)
    pad = -length % block
    q, k, v = (jnp.pad(t, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for t in (q * dim**-0.5, k, v))
    mask = splash.MultiHeadMask([splash.CausalMask((length + pad, length + pad))] * heads)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )  # fmt: skip
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret)
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :length]
