"""Int8 weights and cache against what they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TINY
from xprompt_jax.model.attention import cached_attention
from xprompt_jax.model.cache import Cache, empty_cache, write
from xprompt_jax.model.chameleon import Chameleon, extend, unstacked
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.model.product import product
from xprompt_jax.model.quantize import Int8, quantize, quantized

MATRICES = {"wq": ("bld,dhk->blhk", 1), "wo": ("blhk,hkd->bld", 2), "down": ("blf,fd->bld", 1), "head": ("...d,dv->...v", 1)}


def wide(x: Int8) -> jax.Array:
    """What an int8 array stands for."""
    return x.values * x.scale


@pytest.fixture(scope="module")
def decoder():
    return unstacked(Chameleon(TINY, jax.random.key(0)))


def test_rounding_is_within_half_a_step_and_exact_where_it_can_be():
    x = jax.random.normal(jax.random.key(0), (16, 5, 8)) * jnp.logspace(-6, 6, 5)[:, None]
    rounded = quantize(x, (0,))
    assert rounded.values.dtype == jnp.int8 and rounded.scale.shape == (1, 5, 8)
    assert bool(jnp.all(jnp.abs(wide(rounded) - x) <= 0.5001 * rounded.scale))
    assert bool(jnp.all(jnp.max(jnp.abs(rounded.values), axis=0) == 127))
    np.testing.assert_array_equal(wide(quantize(jnp.arange(-127.0, 128), 0)), jnp.arange(-127.0, 128))
    np.testing.assert_array_equal(wide(quantize(jnp.zeros((3, 4)), 0)), 0)
    assert bool(jnp.isnan(quantize(jnp.array([[1.0, jnp.nan], [2.0, 3.0]]), 0).scale[0, 1]))


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_is_that_of_the_matrix_it_stands_for(decoder, name, dtype):
    weight = {k.rpartition(".")[2]: v for k, v in flatten(quantized(decoder)).items()}[name]
    equation, inputs = MATRICES[name]
    x = jax.random.normal(jax.random.key(1), (2, 3, *weight.shape[:inputs])).astype(dtype)
    want = jnp.einsum(equation, x.astype(jnp.float32), wide(weight))
    got = product(equation, x, weight)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=1e-5 if dtype == jnp.float32 else 2**-8, atol=1e-5)
    assert product(equation, x, weight, jnp.float32).dtype == jnp.float32


def test_only_matrices_are_rounded(decoder):
    before, after = flatten(decoder), flatten(quantized(decoder))
    assert before.keys() == after.keys()
    rounded = {name for name, value in after.items() if isinstance(value, Int8)}
    kinds = {name.rpartition(".")[2] for name in rounded}
    assert kinds == {"wq", "wk", "wv", "wo", "gate", "up", "down", "head"} and len(rounded) == 7 * TINY.num_layers + 1
    assert all(after[name] is before[name] for name in before.keys() - rounded)


def test_an_int8_decoder_computes_what_its_weights_stand_for(decoder):
    small = jax.jit(quantized)(decoder)
    like = unflatten(decoder, {n: wide(v) if isinstance(v, Int8) else v for n, v in flatten(small).items()})
    x = jax.random.normal(jax.random.key(2), (2, 7, TINY.dim))
    run = lambda m: extend(m.blocks, x, empty_cache(TINY, 2, 7, jnp.float32), jnp.full(2, 7), TINY.rope_theta)[0]
    np.testing.assert_allclose(run(small), run(like), atol=2e-5)
    assert float(jnp.abs(run(small) - run(decoder)).max()) > 1e-4


def test_the_loop_carries_int8_and_no_wide_copy():
    """Left to itself, XLA converts all weights once, before the loop that decodes, which then reads the wide copies in every step."""
    config = dataclasses.replace(TINY, dim=64, ffn_dim=256)
    model = jax.eval_shape(lambda: quantized(unstacked(Chameleon(config, jax.random.key(0)))))

    def loop(model, x, cache):
        step = lambda _, carry: extend(model.blocks, *carry, jnp.ones(1, jnp.int32), config.rope_theta)
        return jax.lax.fori_loop(0, 5, step, (x, cache))

    cache = jax.eval_shape(lambda: empty_cache(config, 1, 8, jnp.float32))
    lowered = jax.jit(loop).lower(model, jax.ShapeDtypeStruct((1, 1, 64), jnp.float32), cache)
    program = lowered.compile({"xla_backend_optimization_level": 0}).as_text()  # the passes over HLO are all there
    (carried,) = [line for line in program.splitlines() if " while(" in line]
    assert carried.count("s8[64,256]") == 2 * config.num_layers and "f32[64,256]" not in carried


def test_the_cache_rounds_a_token_once(decoder):
    """Int8 attention is attention over what the cache stands for, and near that over what was put in."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 6, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    lengths = jnp.array([0, 3])
    empty = empty_cache(TINY, 2, 12, jnp.int8)
    ks, vs = write(empty.k[0], k, lengths), write(empty.v[0], v, lengths)
    assert ks.values.dtype == jnp.int8 and ks.scale.shape == (2, 2, 12, 1)
    got = cached_attention(q, ks, vs, lengths)
    np.testing.assert_allclose(got, cached_attention(q, wide(ks), wide(vs), lengths), atol=1e-6)
    exact = cached_attention(q, *(write(jnp.zeros((2, 2, 12, 8)), t, lengths) for t in (k, v)), lengths)
    assert 0 < float(jnp.abs(got - exact).max()) < 4 / 127
    one_by_one = write(write(empty.k[0], k[:, :2], lengths), k[:, 2:], lengths + 2)
    jax.tree.map(np.testing.assert_array_equal, one_by_one, ks)


def test_error_of_the_cache_through_all_layers(decoder):
    x = jax.random.normal(jax.random.key(5), (2, 9, TINY.dim))

    def run(dtype) -> tuple[jax.Array, Cache]:
        return extend(decoder.blocks, x, empty_cache(TINY, 2, 9, dtype), jnp.full(2, 9), TINY.rope_theta)

    (want, _), (got, cache) = run(jnp.float32), run(jnp.int8)
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    assert 0 < error < 0.01
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache.k)) == 2 * 9 * 2 * (8 + 4) * TINY.num_layers
