"""One table says where things live, and mistakes in it are refused."""

import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.helpers import TINY
from xprompt_jax.config import PRESETS, MeshConfig
from xprompt_jax.errors import UserError
from xprompt_jax.mesh import constrain, make_mesh, report, row_share, shard_batch, sharding_for, spec, start_distributed
from xprompt_jax.model.chameleon import abstract_model
from xprompt_jax.model.params import flatten, logical_axes

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(MeshConfig(), (1, 8, 1)), (MeshConfig(2, -1, 2), (2, 2, 2)), (MeshConfig(-1, 1, 4), (2, 1, 4)), (MeshConfig(8, 1, 1), (8, 1, 1))],
    ids=str,
)
def test_mesh_fills_what_is_left(config, sizes):
    assert dict(make_mesh(config).shape) == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))


@pytest.mark.parametrize("config", [MeshConfig(3, -1, 1), MeshConfig(2, 2, 1), MeshConfig(-1, -1, 1), MeshConfig(0, -1, 1)], ids=str)
def test_mesh_that_does_not_fit_is_refused(config):
    with pytest.raises(UserError, match="mesh data="):
        make_mesh(config)


def test_every_parameter_has_a_partition_without_collision():
    for preset in ("7b", "30b", "mini"):
        for name, p in flatten(abstract_model(PRESETS[preset])).items():
            assert len(spec(*logical_axes(name))) == p.ndim, name
    assert spec("batch", "slots", "act_embed") == P(("data", "fsdp"), None, None)
    assert spec(*logical_axes("blocks.attention.wq")) == P(None, "fsdp", "tensor", None)


@pytest.mark.parametrize("axes", [("batch", "embed"), ("heads", "vocab"), ("ffn", "ffn")], ids=str)
def test_colliding_axes_are_refused(axes):
    with pytest.raises(ValueError, match="mesh axis"):
        spec(*axes)


def test_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="emebd"):
        spec("emebd")


def test_axis_that_does_not_divide_stays_whole():
    mesh = make_mesh(MeshConfig(1, 2, 4))
    axes = logical_axes("blocks.attention.wk")
    assert sharding_for(mesh, axes, (2, 32, 2, 8)).spec == P(None, "fsdp", None, None)
    assert sharding_for(mesh, axes, (2, 32, 4, 8)).spec == P(None, "fsdp", "tensor", None)
    with pytest.raises(ValueError):
        sharding_for(mesh, axes, (2, 32))


def test_constrain_places_under_a_mesh_and_is_nothing_without():
    x = jnp.arange(8 * 3 * 4.0).reshape(8, 3, 4)
    np.testing.assert_array_equal(constrain(x, "batch", "slots", "heads"), x)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x + 0, "batch", "slots", "heads"))(x)
        odd = jax.jit(lambda x: constrain(x + 0, "batch", "slots", "heads"))(x[:3, :, :3])
    assert y.sharding.shard_shape(y.shape) == (2, 3, 2)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(odd, x[:3, :, :3])


def test_batch_rows_go_over_data_and_fsdp_in_order():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    rows = np.arange(8 * 5, dtype=np.int32).reshape(8, 5)
    batch = shard_batch({"in_context": {"ids": rows, "example_lengths": np.zeros((8, 0), np.int32)}}, mesh)
    ids = batch["in_context"]["ids"]
    assert ids.sharding.shard_shape(ids.shape) == (2, 5)
    np.testing.assert_array_equal(ids, rows)
    assert batch["in_context"]["example_lengths"].shape == (8, 0)


def test_report_tells_bytes_and_what_learns():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    params = flatten(abstract_model(TINY))
    lines = report(params, logical_axes, mesh, {"xp"}).splitlines()
    assert len(lines) == len(params) + 1
    state = {line.split()[0]: line.split()[-1] for line in lines[:-1]}
    assert [name for name, word in state.items() if word == "trained"] == ["xp"]
    assert f"{sum(p.size for p in params.values()):,} parameters" in lines[-1]
    params = flatten(abstract_model(PRESETS["7b"]))
    head = next(line for line in report(params, logical_axes, mesh, set()).splitlines() if line.startswith("head "))
    assert f"{4096 * 65536 * 4 / 8 / 2**20:.2f} MiB" in head  # split over fsdp=4 and tensor=2


def test_large_tensor_on_every_device_is_refused():
    wide = {"head": jax.ShapeDtypeStruct((4099, 2053), jnp.float32)}  # primes: nothing divides them
    with pytest.raises(UserError, match="head"):
        report(wide, logical_axes, make_mesh(MeshConfig(1, 4, 2)), {"head"})
    report(wide, logical_axes, make_mesh(MeshConfig(8, 1, 1)), {"head"})  # plain data parallelism copies on purpose
    small = {"head": jax.ShapeDtypeStruct((41, 20), jnp.float32)}
    report(small, logical_axes, make_mesh(MeshConfig(1, 4, 2)), {"head"})


@pytest.mark.parametrize("tensor, owners, shares", [
    (2, [0, 0, 0, 0, 1, 1, 1, 1], {0: (0, 2), 1: (1, 2)}),  # each process has rows of its own
    (4, [0, 0, 1, 1, 2, 2, 3, 3], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),  # two hold the same
    (2, [0, 1, 0, 1, 2, 3, 2, 3], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
    (8, [0, 0, 0, 0, 1, 1, 1, 1], {0: (0, 1), 1: (0, 1)}),  # all do
    (2, [1, 1, 0, 0, 1, 1, 0, 0], {0: (1, 2), 1: (0, 2)}),  # rows of a process are apart
])  # fmt: skip
def test_processes_that_hold_the_same_rows_have_one_share(tensor, owners, shares):
    devices = np.array([types.SimpleNamespace(process_index=owner) for owner in owners]).reshape(1, -1, tensor)
    mesh = types.SimpleNamespace(devices=devices, shape={"data": 1, "fsdp": 8 // tensor, "tensor": tensor})
    assert {process: row_share(mesh, process) for process in set(owners)} == shares
    crossed = types.SimpleNamespace(devices=devices.reshape(-1)[[0, 1, 2, 4, 3, 5, 6, 7]].reshape(1, -1, 2), shape=mesh.shape)
    if (tensor, owners) == (2, [0, 0, 0, 0, 1, 1, 1, 1]):
        with pytest.raises(UserError, match=r"hold some rows together and others not; lower --mesh\.tensor"):
            row_share(crossed, 0)


def test_one_process_starts_alone(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    start_distributed("off")
    start_distributed("auto")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "")  # half-set, as in a shell inside an allocation
    start_distributed("auto")
    assert jax.process_count() == 1


def joined(environment, mode="auto"):
    """What each of two real processes sees: its index, the count, the GPUs it would drive. {i} in the environment is the index."""
    code = (
        "import sys, jax; from xprompt_jax.mesh import start_distributed; start_distributed(sys.argv[1]);"
        "print(jax.process_index(), jax.process_count(), jax.config.values['jax_cuda_visible_devices'])"
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "OMPI_", "TPU_", "CUDA_"))}
    inherited |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_COORDINATOR_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, mode.format(i=i, port=port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=inherited | {name: value.format(i=i) for name, value in environment.items()},
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        return [p.communicate(timeout=120)[0].splitlines()[-1] for p in processes]
    finally:
        for p in processes:
            p.kill()


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1,b", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "{i}",
}  # fmt: skip
SHARED_NODE = SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "{i}"}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "{i}",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "{i}",
}  # fmt: skip
GKE = {
    "JAX_FORCE_TPU_INIT": "1", "TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1", "TPU_WORKER_ID": "{i}",
    "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "mode", "gpus"),
    [
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0"}, "auto", ["all", "all"]),
        (SHARED_NODE, "auto", ["0", "1"]),
        (SHARED_NODE | {"CUDA_VISIBLE_DEVICES": "{i}"}, "auto", ["all", "all"]),  # --gpus-per-task=1: each sees its own alone
        (SHARED_NODE, "127.0.0.1:{port},2,{i}", ["all", "all"]),
        (OPEN_MPI, "auto", ["0", "1"]),
        (GKE, "auto", ["all", "all"]),
    ],
    ids=["slurm-nodes", "slurm-one-node", "slurm-bound", "address", "open-mpi", "gke"],
)
def test_processes_of_a_scheduler_join(environment, mode, gpus):
    assert joined(environment, mode) == [f"{i} 2 {seen}" for i, seen in enumerate(gpus)]


def test_scheduler_that_keeps_the_meeting_place_is_one_line():
    lines = joined({name: value for name, value in OPEN_MPI.items() if "orte" not in name})  # Open MPI 5
    assert all("UserError" in line and "--distributed address:port,count,index" in line for line in lines), lines


@pytest.mark.parametrize("mode", ["on", "host:1234", "host,2,0", "host:1234,two,0", "host:1234,2,2"])
def test_malformed_start_is_refused(mode):
    with pytest.raises(UserError, match="--distributed"):
        start_distributed(mode)
