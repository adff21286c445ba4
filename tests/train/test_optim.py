"""Moments and frozen weights in half the memory: the same training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.test_training import CONFIG, data, drawn, replace, run_steps, start
from xprompt_jax.config import OptimConfig
from xprompt_jax.mesh import make_mesh, shard_batch
from xprompt_jax.train.optim import in_bfloat16, make_optimizer, merge, round_stochastic, sides
from xprompt_jax.train.state import abstract_state, init_state
from xprompt_jax.train.step import make_train_step

ONE_BUCKET = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, buckets=CONFIG.data.buckets[:1]))
BF16 = replace(ONE_BUCKET, optim={"moment_dtype": "bfloat16"})


def test_rounding_is_right_on_average():
    x = jnp.float32([1.001, -3.1415926, 1e-20, 2.5e8, 0.0])
    noise = jax.random.bits(jax.random.key(0), (20_000, 5), jnp.uint32) >> 16
    rounded = np.asarray(round_stochastic(jnp.broadcast_to(x, noise.shape), noise), np.float64)
    np.testing.assert_allclose(rounded.mean(0), x, rtol=1e-4)
    nearest = np.asarray(x.astype(jnp.bfloat16), np.float64)
    assert (np.abs(rounded - nearest) <= np.abs(nearest) / 128).all()  # one of the two neighbours
    assert {len(np.unique(column)) for column in rounded.T[:4]} == {2}

    exact = jnp.float32([1.0, -0.375, 3e38, jnp.inf, -jnp.inf, jnp.nan]).astype(jnp.bfloat16).astype(jnp.float32)
    for noise in (0, 0xFFFF):
        np.testing.assert_array_equal(round_stochastic(exact, jnp.full(6, noise, jnp.uint32)).astype(jnp.float32), exact)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_moments_follow_float32(beta2):
    """The second moment falls when gradients do, also where a step is below bfloat16's resolution."""
    adam = optax.scale_by_adam(0.9, beta2)
    small = in_bfloat16(adam)
    gradient = jax.random.normal(jax.random.key(1), (4096,))

    def body(states, i):
        g = {"w": jnp.where(i < 20, gradient, 0.1 * gradient)}
        wide, low = adam.update(g, states[0]), small.update(g, states[1])
        return (wide[1], low[1]), None

    start = ({"w": jnp.zeros(4096)},) * 2
    (wide, low), _ = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(400)))((adam.init(start[0]), small.init(start[1])))
    assert low.mu["w"].dtype == low.nu["w"].dtype == jnp.bfloat16
    relative = np.asarray(low.nu["w"].astype(jnp.float32) / wide.nu["w"])
    assert relative.mean() == pytest.approx(1.0, abs=5e-3)  # rounded to nearest, 0.999 stays 1.3 times too large
    assert relative.std() < 0.06
    assert np.asarray(low.mu["w"].astype(jnp.float32) / wide.mu["w"]).mean() == pytest.approx(1.0, abs=5e-3)


def train_on_one_batch(config, devices, steps=30):
    """Losses, and the last state."""
    mesh = make_mesh(config.mesh, devices)
    optimizer = make_optimizer(config.optim, steps)
    state = init_state(config, optimizer, mesh, start(mesh))
    step = make_train_step(config, optimizer, jax.tree.map(lambda a: a.sharding, abstract_state(config, optimizer, mesh)))
    losses = []
    with jax.set_mesh(mesh):
        batch = shard_batch(data(0, config), mesh)
        for _ in range(steps):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.fixture(scope="module")
def low():
    return train_on_one_batch(BF16, jax.devices()[:1])


def test_half_the_memory_trains_as_well(low):
    losses, state = train_on_one_batch(ONE_BUCKET, jax.devices()[:1])
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)
    assert 2 * size(low[1].opt_state) == size(state.opt_state) == 2 * size(state.params)
    assert losses[-1] < losses[0] / 2
    np.testing.assert_allclose(low[0], losses, rtol=0.05)
    assert jax.tree.structure(low[1]) == jax.tree.structure(state)  # a checkpoint of either has the same names


def test_eight_devices_round_as_one(low):
    losses, state = train_on_one_batch(BF16, None)
    np.testing.assert_allclose(losses, low[0], rtol=2e-3)
    assert all(leaf.sharding.num_devices == 8 for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)


def test_frozen_weights_in_bfloat16_are_what_a_bfloat16_step_reads():
    """Weights are cast at use: where activations are bfloat16, a frozen copy in bfloat16 changes no bit."""
    config = replace(ONE_BUCKET, optim={"trainable": "xp"}, compute={"dtype": "bfloat16"})
    wide, history = run_steps(config, jax.devices()[:1], steps=2)
    low, same = run_steps(replace(config, optim={"frozen_dtype": "bfloat16"}), jax.devices()[:1], steps=2)
    np.testing.assert_array_equal(low.params["xp"], wide.params["xp"])
    assert [h["loss"] for h in same] == [h["loss"] for h in history]
    assert sum(v.nbytes for v in low.frozen.values()) * 2 == sum(v.nbytes for v in wide.frozen.values())


def test_trained_columns_of_a_bfloat16_head_stay_float32():
    config = replace(ONE_BUCKET, optim={"trainable": "image_head", "frozen_dtype": "bfloat16"})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = init_state(config, make_optimizer(OptimConfig(), 4), mesh, start(mesh))
    head = merge({"head.image": state.params["head.image"] + 1e-4}, state.frozen)["head"]
    np.testing.assert_array_equal(head[:, 4:36], state.params["head.image"] + 1e-4)


def as_matrices(name, stack):
    """A stacked parameter as the matrices that Muon sees, float64 [layers, inputs, outputs]."""
    count = np.prod([stack.shape[i] for i in sides(name).reduction_axis])
    return np.asarray(stack, np.float64).reshape(len(stack), count, -1)


def test_muon_turns_every_layer_s_matrix_alone_and_adam_the_rest():
    params = drawn()
    keys = jax.random.split(jax.random.key(1), len(params))
    sizes = 10.0 ** np.random.default_rng(0).integers(-3, 3, len(params))
    grads = {n: c * jax.random.normal(key, params[n].shape) for key, c, n in zip(keys, sizes, params, strict=True)}
    plain = OptimConfig(learning_rate=0.5, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=0.0)
    adamw, muon = (make_optimizer(dataclasses.replace(plain, name=name), 10) for name in ("adamw", "muon"))
    by_adam, by_muon = (jax.jit(lambda g, p, o=o: o.update(g, o.init(p), p)[0])(grads, params) for o in (adamw, muon))
    turned = {name for name in params if sides(name)}
    matrices = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "mlp.gate", "mlp.up", "mlp.down")
    assert turned == {f"blocks.{name}" for name in matrices}
    for name in params.keys() - turned:
        np.testing.assert_array_equal(by_muon[name], by_adam[name], err_msg=name)
    for name in turned:
        for g, u in zip(as_matrices(name, grads[name]), as_matrices(name, by_muon[name]), strict=True):
            left, _, right = np.linalg.svd(g, full_matrices=False)
            seen = left.T @ -u @ right.T / (0.5 * 0.2 * max(g.shape) ** 0.5)  # U V^T, up to what five iterations leave
            assert 0.6 < np.diagonal(seen).min() < np.diagonal(seen).max() < 1.3, name
            np.testing.assert_allclose(seen - np.diag(np.diagonal(seen)), 0, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_learns_and_eight_devices_are_one(dtype):
    config = replace(ONE_BUCKET, optim={"name": "muon", "moment_dtype": dtype}, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    losses, state = train_on_one_batch(config, jax.devices())
    assert losses[-1] < 0.6 * losses[0]
    moments = [leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
    assert set(moments) == {jnp.dtype(dtype)}
    if dtype == "float32":
        alone, _ = train_on_one_batch(replace(config, mesh={"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])
        np.testing.assert_allclose(losses[:5], alone[:5], rtol=2e-4)


def test_the_average_forgets_the_start_soon():
    config = replace(ONE_BUCKET, optim={"ema_decay": 0.25})
    want, steps = drawn()["embed"], []
    state, _ = run_steps(config, jax.devices()[:1], seen=lambda state: steps.append(jax.device_get(state.params["embed"])))
    for params, decay in zip(steps, (1 / 10, 2 / 11, 0.25), strict=True):
        want = decay * want + (1 - decay) * params
    np.testing.assert_allclose(state.ema["embed"], want, rtol=1e-5, atol=1e-7)
