"""The decoder: sizes, and its passes against the oracle."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import FP32, TINY, column, random_decoder, random_rows, segments
from xprompt_jax.config import PRESETS
from xprompt_jax.model.attention import cached_attention
from xprompt_jax.model.cache import Cache, empty_cache, write
from xprompt_jax.model.chameleon import Rows, abstract_model, extend, pack, project_logits, unpack, unstacked
from xprompt_jax.model.params import count, flatten, logical_axes, unflatten
from xprompt_jax.prompt import SlotShape, stack

SHAPE = SlotShape(examples=2, context=6, xp=3, todo=7)


@pytest.mark.parametrize("name, parameters", [("7b", 7_013_666_816), ("30b", 34_294_308_864)])
def test_published_sizes(name, parameters):
    config = PRESETS[name]
    assert count(abstract_model(config)) == parameters + config.num_xp_tokens * config.dim


def test_the_mini_is_small():
    assert count(abstract_model(PRESETS["mini"])) <= 20_000_000


@pytest.fixture(scope="module", params=["pre-norm", "swin"])
def model(request):
    config = dataclasses.replace(TINY, swin_norm=request.param == "swin")
    # Norms start at one and biases at zero; random here, or a norm in the wrong place would go unseen.
    return random_decoder(config)


@functools.partial(jax.jit, static_argnames=("compute", "shape", "rate"))
def hidden(model, batch, compute=FP32, shape=SHAPE, rate=0.0, key=None):
    (out,) = model.hidden([Rows(batch["ids"], batch["positions"], batch["example_lengths"], shape)], compute, rate=rate, key=key)
    return out


@jax.jit
def logits(model, *row):
    return model.logits(*row, FP32)


def oracle(model, rows):
    return logits(model, *(column(rows, n) for n in ("ids", "roles", "groups", "positions")), segments(rows))


@pytest.mark.parametrize("compute", [
    FP32,
    dataclasses.replace(FP32, scan_layers=False),
    dataclasses.replace(FP32, remat="names"),
    dataclasses.replace(FP32, remat="block", scan_layers=False),
], ids=["scan", "unrolled", "scan-names", "unrolled-block"])  # fmt: skip
def test_training_pass_is_the_oracle(model, compute):
    rows = random_rows(1, SHAPE)
    b = stack(rows, SHAPE.todo)
    real = segments(rows)[..., None]
    np.testing.assert_allclose(
        project_logits(hidden(model, b, compute), model.head[...]) * real, oracle(model, rows) * real, atol=1e-4, rtol=1e-4
    )


def test_rows_of_several_shapes_together_are_each_alone(model):
    """Values, and the gradient of what all of them ask for."""
    shapes = [SHAPE, SlotShape(0, 0, 0, 8), SlotShape(1, 5, 3, 4)]
    batches = [stack(random_rows(10 + i, shape, batch), shape.todo) for i, (shape, batch) in enumerate(zip(shapes, (6, 2, 4), strict=True))]
    parts = [Rows(b["ids"], b["positions"], b["example_lengths"], shape) for b, shape in zip(batches, shapes, strict=True)]
    seen = lambda outs: sum(jnp.sum(jnp.sin(out[:, -shape.todo :])) for out, shape in zip(outs, shapes, strict=True))

    @jax.jit
    def together(model):
        out = model.hidden(parts, FP32)
        return seen(out), out

    @jax.jit
    def alone(model):
        out = [model.hidden([part], FP32)[0] for part in parts]
        return seen(out), out

    want, wanted = jax.grad(alone, has_aux=True)(model)[::-1]
    got, grads = jax.grad(together, has_aux=True)(model)[::-1]
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)
    for name, value in flatten(wanted).items():
        np.testing.assert_allclose(flatten(grads)[name], value, atol=1e-4, rtol=1e-3, err_msg=name)


def test_what_was_packed_is_unpacked():
    parts = [np.arange(n * slots).reshape(n, slots) + 1000 * n for n, slots in ((6, 5), (4, 3), (2, 7))]
    packed = pack(parts)
    assert packed.shape == (2, 6 * 5 // 2 + 4 * 3 // 2 + 7)
    np.testing.assert_array_equal(packed[0], np.concatenate([part[: len(part) // 2].ravel() for part in parts]))
    for part, again in zip(parts, unpack(packed, [p.shape for p in parts]), strict=True):
        np.testing.assert_array_equal(again, part)


@pytest.mark.parametrize("remat", ["block", "dots", "names", "offload"])
def test_remat_changes_no_gradient(model, remat):
    b = stack(random_rows(2, SHAPE), SHAPE.todo)

    def loss(model, compute):
        return jnp.sum(jnp.sin(hidden(model, b, compute)[:, SHAPE.xp_end :]))

    want = flatten(jax.jit(jax.grad(lambda m: loss(m, FP32)))(model))
    got = flatten(jax.jit(jax.grad(lambda m: loss(m, dataclasses.replace(FP32, remat=remat))))(model))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5, rtol=1e-4, err_msg=name)


def test_the_example_reaches_the_task_through_xp_alone(model):
    """Changing an example changes the answer; cutting the XP table's way (stop at the XP slots) would not."""
    rows = random_rows(3, SHAPE)
    b = stack(rows, SHAPE.todo)

    def answer(ids):
        return hidden(model, b | {"ids": ids})[:, SHAPE.xp_end :]

    other = b["ids"].copy()
    other[:, 1 : SHAPE.context_end] = (other[:, 1 : SHAPE.context_end] + 7) % 400
    assert np.abs(answer(other) - answer(b["ids"])).max() > 1e-3
    # In the first layer XP keys do not depend on the example yet: one layer deep, the task sees nothing of it.
    shallow = dataclasses.replace(model.config, num_layers=1)
    one = unflatten(abstract_model(shallow), {n: v[:1] if n.startswith("blocks") else v for n, v in flatten(model).items()})
    run = lambda ids: hidden(one, b | {"ids": ids})[:, SHAPE.xp_end :]
    np.testing.assert_array_equal(run(other), run(b["ids"]))


def test_dropout_needs_a_key_and_follows_it(model):
    b = stack(random_rows(4, SHAPE), SHAPE.todo)
    run = lambda key: hidden(model, b, rate=0.5, key=key)
    plain = hidden(model, b)
    np.testing.assert_array_equal(run(None), plain)
    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 0.1 and np.abs(first - other).max() > 0.1


def test_prefill_and_decode_are_the_oracle(model):
    """Rows of different lengths, fed in uneven pieces with padding in between, against one dense pass."""
    rng, lengths = np.random.default_rng(5), [5, 9, 7]
    ids = rng.integers(2, 400, (3, 9))
    roles = np.full((3, 9), 3)
    want = logits(model, ids, roles, np.zeros_like(ids), np.tile(np.arange(9), (3, 1)), np.ones_like(ids))
    apart, cache = unstacked(model), empty_cache(model.config, 3, 9 + 4, jnp.float32)

    @jax.jit
    def feed(apart, window, cache, counts):
        h, cache = extend(apart.blocks, apart.embed[...][window], cache, counts, model.config.rope_theta)
        return project_logits(apart.final(h), apart.head[...]), cache

    fed = np.zeros(3, int)
    while (fed < lengths).any():
        counts = np.minimum(rng.integers(0, 5, 3), lengths - fed)
        window = np.stack([np.resize(np.append(ids[b, f : f + c], [1]), 4) for b, (f, c) in enumerate(zip(fed, counts, strict=True))])
        got, cache = feed(apart, window, cache, counts)
        for b, (f, c) in enumerate(zip(fed, counts, strict=True)):
            np.testing.assert_allclose(got[b, :c], want[b, f : f + c], atol=1e-4, rtol=1e-4)
        fed += counts
    np.testing.assert_array_equal(cache.length, lengths)


def test_cache_writes_per_row():
    new = jnp.arange(1, 13, dtype=jnp.float32).reshape(2, 2, 3, 1)  # two rows of two tokens of three heads
    buffer = write(jnp.zeros((2, 3, 5, 1)), new, jnp.array([0, 3]))[..., 0]
    np.testing.assert_array_equal(buffer[0], [[1, 4, 0, 0, 0], [2, 5, 0, 0, 0], [3, 6, 0, 0, 0]])
    np.testing.assert_array_equal(buffer[1], [[0, 0, 0, 7, 10], [0, 0, 0, 8, 11], [0, 0, 0, 9, 12]])
    assert isinstance(jax.tree.map(lambda x: x, empty_cache(TINY, 1, 2, jnp.float32)), Cache)


def test_every_parameter_has_axes_and_survives_flattening(model):
    params = flatten(model)
    assert all(len(logical_axes(name)) == value.ndim for name, value in params.items())
    again = flatten(unflatten(abstract_model(model.config), params))
    assert all(np.array_equal(again[name], params[name]) for name in params)


@pytest.mark.parametrize("window", [1, 4])
def test_attention_takes_the_cache_as_it_lies(window):
    """No step may copy the cache to turn it around: that took more time than the attention itself."""
    rows, heads, slots, dim = 2, 3, 50, 32
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    cache = like(rows, heads, slots, dim)
    lowered = jax.jit(cached_attention).lower(like(rows, window, 2 * heads, dim), cache, cache, jax.ShapeDtypeStruct((rows,), jnp.int32))
    program = lowered.compile().as_text()
    made = re.findall(r"= \w+\[([\d,]+)\]\S* (\w+)\(", program)
    assert {"dot", "parameter"} <= {kind for _, kind in made}
    size = rows * heads * slots * dim
    assert [kind for shape, kind in made if math.prod(map(int, shape.split(","))) >= size and kind not in ("parameter", "bitcast")] == []
