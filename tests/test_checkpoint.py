"""A checkpoint is the state it was asked to keep, on any mesh, or an error that says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from xprompt_jax.checkpoint import Checkpoints, load_params, save_params
from xprompt_jax.config import MeshConfig
from xprompt_jax.errors import UserError
from xprompt_jax.mesh import make_mesh, spec


def state_on(mesh, value=1.0):
    place = NamedSharding(mesh, spec("embed", "heads"))
    return {
        "params": {"blocks.attention.wq": jax.device_put(value * jnp.arange(64.0).reshape(8, 8), place)},
        "step": jnp.asarray(int(value), jnp.int32),
    }


def abstract(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_state_comes_back_bitwise_and_on_another_mesh(tmp_path):
    state = state_on(make_mesh(MeshConfig(1, 4, 2)), 1 / 3)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.save(7, state)
    checkpoints.wait()
    assert checkpoints.latest() == 7
    for mesh in (make_mesh(MeshConfig(1, 4, 2)), make_mesh(MeshConfig(1, 1, 8)), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        target = abstract(state_on(mesh))
        restored = checkpoints.restore(7, target)
        assert_same(restored, state)
        assert restored["params"]["blocks.attention.wq"].sharding == target["params"]["blocks.attention.wq"].sharding
    checkpoints.close()


def test_newest_are_kept_and_a_new_process_sees_them(tmp_path):
    mesh = make_mesh(MeshConfig())
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state_on(mesh, step))
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest() == 3
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 3]
    assert_same(again.restore(2, abstract(state_on(mesh))), state_on(mesh, 2))
    again.close()


def test_memory_reused_while_saving_does_not_reach_the_file(tmp_path):
    mesh = make_mesh(MeshConfig())
    state = state_on(mesh)
    before = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    for _ in range(5):
        state = overwrite(state)
    checkpoints.wait()
    assert_same(checkpoints.restore(1, abstract(state)), before)
    checkpoints.close()


def test_unfinished_save_is_not_seen(tmp_path):
    mesh = make_mesh(MeshConfig())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_on(mesh))
    checkpoints.close()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path)
    assert again.latest() == 1
    again.close()


def test_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_params_travel_with_type_and_sharding(tmp_path):
    params = {"head": jnp.arange(32.0).reshape(4, 8) / 3, "blocks.attention.q_norm.scale": jnp.ones((2, 4, 8), jnp.bfloat16)}
    save_params(tmp_path / "params", params)
    place = NamedSharding(make_mesh(MeshConfig(1, 4, 2)), spec("embed", "vocab"))
    like = {
        "head": jax.ShapeDtypeStruct((4, 8), jnp.bfloat16, sharding=place),
        "blocks.attention.q_norm.scale": jax.ShapeDtypeStruct((2, 4, 8), jnp.bfloat16),
    }
    loaded = load_params(tmp_path / "params", like)
    assert set(loaded) == set(params)
    assert loaded["head"].sharding == place
    np.testing.assert_array_equal(loaded["head"], params["head"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(loaded["blocks.attention.q_norm.scale"], params["blocks.attention.q_norm.scale"])
    only = load_params(tmp_path / "params", {"head": like["head"]})
    assert set(only) == {"head"}


def test_params_that_do_not_belong_are_refused(tmp_path):
    save_params(tmp_path / "params", {"head": jnp.ones((4, 8))})
    with pytest.raises(UserError, match="no parameter xp"):
        load_params(tmp_path / "params", {"xp": jax.ShapeDtypeStruct((3, 4), jnp.float32)})
    with pytest.raises(UserError, match="head has shape"):
        load_params(tmp_path / "params", {"head": jax.ShapeDtypeStruct((4, 9), jnp.float32)})
    with pytest.raises(UserError, match="not a complete checkpoint"):
        load_params(tmp_path / "nothing", {})
