"""A checkpoint is the state it was asked to keep, on any mesh, or an error that says what to do."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests.disk import needs_a_small_disk, on_a_small_disk
from xprompt_jax.checkpoint import Checkpoints, load_arrays, save_arrays
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


def test_arrays_travel_with_their_types(tmp_path):
    arrays = {
        "head": np.arange(32.0, dtype=np.float32).reshape(4, 8) / 3,
        "attention.q_norm.scale": np.ones((2, 4, 8), ml_dtypes.bfloat16) / 3,
        "norm": np.ones(8, np.float16) / 3,
    }
    save_arrays(tmp_path / "a", arrays)
    loaded = load_arrays(tmp_path / "a", {name: value.shape for name, value in arrays.items()})
    assert set(loaded) == set(arrays)
    for name, value in arrays.items():
        assert loaded[name].dtype == value.dtype and loaded[name].tobytes() == value.tobytes()
    assert set(load_arrays(tmp_path / "a", {"norm": (8,)})) == {"norm"}


def test_arrays_that_do_not_belong_are_refused(tmp_path):
    save_arrays(tmp_path / "a", {"head": np.ones((4, 8), np.float32)})
    with pytest.raises(UserError, match="no parameter xp"):
        load_arrays(tmp_path / "a", {"xp": (3, 4)})
    with pytest.raises(UserError, match="head has shape"):
        load_arrays(tmp_path / "a", {"head": (4, 9)})
    with pytest.raises(UserError, match="not a complete checkpoint"):
        load_arrays(tmp_path / "nothing", {})
    for file in (f for f in (tmp_path / "a").rglob("*") if f.is_file() and f.stat().st_size > 64 and "metadata" not in f.name.lower()):
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match="damaged|not a complete"):
        load_arrays(tmp_path / "a", {"head": (4, 8)})


def test_a_full_disk_is_told_and_the_older_checkpoint_stays():
    needs_a_small_disk()
    result = on_a_small_disk(
        "6m",
        """
        import os, jax.numpy as jnp
        from xprompt_jax.checkpoint import Checkpoints
        from xprompt_jax.errors import UserError
        checkpoints = Checkpoints("/mnt/run")
        like = {"w": jnp.arange(1 << 18, dtype=jnp.float32) / 3}
        checkpoints.save(1, like)
        checkpoints.wait()
        with open("/mnt/other", "wb") as f:
            f.write(bytes(os.statvfs("/mnt").f_bavail * os.statvfs("/mnt").f_bsize - 300_000))
        try:
            checkpoints.save(2, like)
            checkpoints.wait()
        except UserError as e:
            print(e)
        os.remove("/mnt/other")
        again = Checkpoints("/mnt/run")
        print(again.latest(), bool((again.restore(1, like)["w"] == like["w"]).all()))
    """,
    )
    told, kept = result.stdout.splitlines()
    assert told == "/mnt/run: cannot write the checkpoint: No space left on device; free space or choose another place", result.stderr
    assert kept == "1 True"
