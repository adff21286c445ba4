"""Split attention against the dense mask, and the mask against its table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import column, random_rows, segments
from xprompt_jax.config import ComputeConfig
from xprompt_jax.errors import UserError
from xprompt_jax.model.attention import blocked_causal, causal_kernel, dense_attention, dense_mask, splash_causal, split_attention
from xprompt_jax.prompt import Role, SlotShape

SHAPES = [SlotShape(1, 7, 3, 9), SlotShape(3, 5, 2, 6), SlotShape(0, 0, 0, 8), SlotShape(2, 6, 1, 0)]


def allowed_by_the_table(roles, groups, segs, q, k):
    """The contract, read cell by cell."""
    if q == k:
        return True
    if k > q or segs[q] != segs[k] or Role.PAD in (roles[q], roles[k]):
        return False
    own = groups[q] == groups[k]
    return {
        (Role.IE, Role.SINK): True, (Role.XP, Role.SINK): True, (Role.TD, Role.SINK): True, (Role.SINK, Role.SINK): True,
        (Role.IE, Role.IE): own, (Role.XP, Role.IE): own, (Role.XP, Role.XP): own,
        (Role.TD, Role.XP): True, (Role.TD, Role.TD): True,
    }.get((roles[q], roles[k]), False)  # fmt: skip


def test_mask_is_the_table():
    rng = np.random.default_rng(0)
    roles, groups, segs = (rng.integers(0, n, (4, 30)) for n in (5, 2, 2))
    mask = np.asarray(dense_mask(*(jnp.asarray(a) for a in (roles, groups, segs))))
    for b in range(4):
        for q in range(30):
            for k in range(30):
                assert mask[b, q, k] == allowed_by_the_table(roles[b], groups[b], segs[b], q, k), (b, q, k)


def qkv(seed, batch, length, heads=4, kv_heads=2, dim=8):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(batch, length, n, dim) for n in (heads, kv_heads, kv_heads)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def with_gradients(attention):
    """One program: (q, k, v, ...) -> its values, and the gradients of q, k and v of a sum over them."""

    def run(q, k, v, *rest):
        seen = lambda *qkv: (jnp.sum(jnp.sin(out := attention(*qkv, *rest))), out)
        grads, out = jax.grad(seen, (0, 1, 2), has_aux=True)(q, k, v)
        return out, grads

    return jax.jit(run)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split_is_dense(shape):
    dense = with_gradients(lambda q, k, v, mask, lengths, real: dense_attention(q, k, v, mask) * real)
    split = with_gradients(lambda q, k, v, mask, lengths, real: split_attention(q, k, v, shape, lengths) * real)
    for seed in (0, 1):
        rows = random_rows(seed, shape) if shape.todo else _context_only(seed, shape)
        mask = dense_mask(column(rows, "roles"), column(rows, "groups"), segments(rows))
        given = (*qkv(seed, len(rows), shape.length), mask, column(rows, "example_lengths"), segments(rows)[..., None, None])
        (got, grads), (want, wanted) = split(*given), dense(*given)
        np.testing.assert_allclose(got, want, atol=2e-6)
        for got, want in zip(grads, wanted, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


def _context_only(seed, shape):
    """Rows as `compile` makes them: examples and XP, no task."""
    from xprompt_jax.prompt import Sample, fill

    rng, nothing = np.random.default_rng(seed), np.zeros(0, np.int32)
    lengths = rng.integers(0, shape.context + 1, (3, shape.examples))
    return [fill(Sample(tuple(np.arange(n) for n in row), nothing, nothing), shape, bos=0, pad=1) for row in lengths]


@pytest.mark.parametrize("length", [1, 128, 129, 1100])
def test_blocks_are_the_square(length):
    """Values and gradients, below a block, at its edge, and where the number of blocks is at its bound."""
    given = qkv(0, 1, length, heads=2, kv_heads=1)
    square = lambda q, k, v: dense_attention(q, k, v, jnp.tril(jnp.ones((1, length, length), bool)))
    (got, grads), (want, wanted) = (with_gradients(f)(*given) for f in (blocked_causal, square))
    np.testing.assert_allclose(got, want, atol=1e-5)
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=5e-5)


@pytest.mark.parametrize("block", [128, 512])
def test_splash_kernel_is_causal_attention(block):
    """Values and gradients, in several blocks and in one that is larger than the rows."""
    given = qkv(0, 1, 150, heads=2, kv_heads=1, dim=128)
    square = lambda q, k, v: dense_attention(q, k, v, jnp.tril(jnp.ones((1, 150, 150), bool)))
    kernel = functools.partial(splash_causal, block=block, interpret=True)
    (got, grads), (want, wanted) = (with_gradients(f)(*given) for f in (kernel, square))
    np.testing.assert_allclose(got, want, atol=2e-5)
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=5e-5)


@pytest.mark.parametrize("backend, message", [("cudnn", "needs an NVIDIA GPU"), ("splash", "needs a TPU"), ("flash", "unknown")])
def test_backends_that_cannot_run_are_refused(backend, message):
    if jax.default_backend() != "cpu":
        pytest.skip("asks what a CPU says")
    with pytest.raises(UserError, match=message):
        causal_kernel(ComputeConfig(attention=backend), jnp.bfloat16)


def test_blocks_of_splash_must_be_blocks():
    for block in (0, 64, 200):
        with pytest.raises(UserError, match=f"compute.splash_block is {block}; it must be a multiple of 128"):
            ComputeConfig(splash_block=block)
