"""Where things live: the device mesh, the one table from logical axes to mesh axes, and the start of several processes.

Mesh axes are data, fsdp and tensor; an axis of size 1 stays. Several slices (islands of fast links) split the data axis, whose one
collective a step, the sum of the gradients, is the least traffic. All axes are Auto: XLA propagates shardings from
parameters, batches and the few `constrain` calls of the model, and the same code runs on jax 0.10 to 0.12. That choice is
made here alone.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from xprompt_jax.config import MeshConfig
from xprompt_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Parameters and activations share the table; their embedding axes differ in name.
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "rows": ("data",),  # of a batch, where fsdp splits another axis
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "act_embed": (),
    "slots": (),
    "layers": (),
    "head_dim": (),
    "xp": (),
    None: (),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a configuration; -1 takes the devices that are left.

    Raises:
      UserError: more than one -1, the sizes do not multiply to the number of devices, the slices are not those of the devices, or
        processes hold some rows together and others not.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"mesh data={sizes[0]} fsdp={sizes[1]} tensor={sizes[2]}: sizes are positive, and one may be -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(f"mesh data={sizes[0]} fsdp={sizes[1]} tensor={sizes[2]} does not fit {len(devices)} devices; "
                        "change --mesh.data, --mesh.fsdp or --mesh.tensor")  # fmt: skip
    if config.slices < 1 or sizes[0] % config.slices:
        raise UserError(f"mesh data={sizes[0]} is not a multiple of mesh.slices {config.slices}; change --mesh.data or --mesh.slices")
    mesh = Mesh(_arrange(devices, sizes, config.slices), AXES, axis_types=(AxisType.Auto,) * 3)
    _row_shares(mesh)
    return mesh


def _arrange(devices: Sequence[Any], sizes: Sequence[int], slices: int) -> np.ndarray:
    """Devices as [data, fsdp, tensor]; the slow network between slices carries the outermost steps of data alone."""
    inside = (sizes[0] // slices, *sizes[1:])
    # On a TPU's torus neighbours on an axis are neighbours on a ring. A torus of 8 x 8 x 4 holds 128 x 2 only if an axis may be split.
    place = functools.partial(mesh_utils.create_device_mesh, inside, allow_split_physical_axes=True)
    real = len({getattr(d, "slice_index", None) for d in devices})
    if real == slices > 1:
        return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    if real > 1 and devices[0].platform == "tpu":
        raise UserError(f"the devices belong to {real} TPU slices, mesh.slices is {slices}; set --mesh.slices {real}")
    # GPUs report a slice for every host or NVLink domain, CPUs none: as many slices as asked for, of consecutive devices.
    return np.concatenate([place(list(group)) for group in np.split(np.asarray(devices, object), slices)])


def spec(*logical: str | None) -> PartitionSpec:
    """The partition of a tensor with these logical axes.

    Raises:
      ValueError: two of them map to the same mesh axis, or an axis is unknown.
    """
    unknown = [name for name in logical if name not in RULES]
    if unknown:
        raise ValueError(f"logical axes {unknown} are not in mesh.RULES")
    used = [axis for name in logical for axis in RULES[name]]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {logical} map to {used}: one mesh axis cannot split two dimensions")
    entries = [RULES[name] for name in logical]
    return PartitionSpec(*(e if len(e) > 1 else e[0] if e else None for e in entries))


def sharding_for(mesh: Mesh | AbstractMesh, logical: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """The sharding of a tensor of `shape`; a dimension that its mesh axes do not divide stays whole."""
    whole = [name if size % math.prod(mesh.shape[a] for a in RULES[name]) == 0 else None for name, size in zip(logical, shape, strict=True)]
    spec(*logical)  # collisions are refused on the names asked for
    return NamedSharding(mesh, spec(*whole))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """States how an activation is laid out, under the mesh of `jax.set_mesh`; without a mesh, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    whole = [
        name if size % math.prod(mesh.shape[a] for a in RULES[name]) == 0 else None for name, size in zip(logical, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, spec(*whole))


def row_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(i, n): a process feeds the i-th of n equal shares of a step's rows; the default is this process.

    Processes whose devices hold the same rows feed the same share: on a TPU's torus a tensor axis of 4 lies across two hosts.
    """
    owned = _row_shares(mesh)
    shares = sorted(set(owned.values()))
    return shares.index(owned[jax.process_index() if process is None else process]), len(shares)


def _row_shares(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Process -> which blocks of a step's rows its devices hold, of as many as data x fsdp has devices.

    Raises:
      UserError: two processes hold some blocks together and others not.
    """
    owned: dict[int, set[int]] = {}
    for block, group in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])):
        for device in group:
            owned.setdefault(getattr(device, "process_index", 0), set()).add(block)
    shares = {tuple(sorted(blocks)) for blocks in owned.values()}
    if len(set().union(*shares)) != sum(map(len, shares)) or len(set(map(len, shares))) > 1:
        sizes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise UserError(f"mesh {sizes}: processes hold some rows together and others not; lower --mesh.tensor")
    return {process: tuple(sorted(blocks)) for process, blocks in owned.items()}


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch (a pytree of arrays [rows, ...]; see `row_share`) -> global arrays, rows over data and fsdp."""
    sharding, (_, shares) = NamedSharding(mesh, spec("batch")), row_share(mesh)

    def placed(a: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, a, (len(a) * shares, *a.shape[1:]))

    return jax.tree.map(lambda a: placed(np.asarray(a)), batch)


def place(value: np.ndarray, logical: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
    """A tensor of the host where its logical axes belong, each device with its part alone; without a mesh, on the first device."""
    sharding = SingleDeviceSharding(jax.devices()[0]) if mesh is None else sharding_for(mesh, logical, value.shape)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def whole_array(x: jax.Array) -> np.ndarray:
    """The values on the host; of an array that several processes share, all of them must ask."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def all_agree(yes: bool) -> bool:
    """Whether every process says yes; waits for all of them."""
    if jax.process_count() == 1:
        return yes
    return bool(multihost_utils.process_allgather(np.asarray(yes)).all())


def from_first(number: int) -> int:
    """The first process's number, on all of them; waits for it."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


class AnyProcess:
    """A flag that is up as soon as one process raises it, seen at the same step by all of them.

    `post` starts a tiny reduction behind the work that is already queued; `up` reads the one before. So no process waits
    for the others, and all of them stop after the same step.
    """

    def __init__(self, mesh: Mesh):
        self._each_device = NamedSharding(mesh, PartitionSpec(AXES))
        self._any = jax.jit(jnp.any)
        self._before: Any = False
        self._posted: Any = False

    def post(self, flag: bool) -> None:
        """Tells the others; called once a step by every process."""
        if jax.process_count() == 1:
            self._before = flag
            return
        mine = np.full(jax.local_device_count(), flag)
        self._before, self._posted = self._posted, self._any(jax.make_array_from_process_local_data(self._each_device, mine))

    def up(self) -> bool:
        """Whether any process raised the flag, one `post` ago (where there is one process: at the last)."""
        return bool(self._before)


def start_distributed(mode: str = "auto") -> None:
    """Joins the processes of one run; call before any other use of JAX.

    Under SLURM and Open MPI, a process that is alone on its node drives all GPUs there; several on a node drive one each. With an
    address, a process drives all it sees. JAX_LOCAL_DEVICE_IDS overrides both.

    Args:
      mode: "off"; "auto" (joins when SLURM, Open MPI or a TPU pod started more than one process); or
        "address:port,count,index", where no scheduler is asked.

    Raises:
      UserError: a malformed mode; the processes do not find each other.
    """
    if mode == "off":
        return
    if mode != "auto":
        address, _, rest = mode.partition(",")
        count, _, index = rest.partition(",")
        port = address.rpartition(":")[2]
        if not (port.isdigit() and count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise UserError(f"--distributed {mode!r}: use auto, off, or address:port,count,index with index from 0 to count - 1")
        jax.distributed.initialize(address, int(count), int(index), cluster_detection_method="deactivate")
        return

    number = lambda name: int(text) if (text := os.environ.get(name, "")).isdigit() else 1
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        scheduled, alone = True, number("OMPI_COMM_WORLD_LOCAL_SIZE") == 1
    else:  # The step's sizes: SLURM_NTASKS is also set in a batch script that srun has not spread out.
        scheduled = number("SLURM_STEP_NUM_TASKS") > 1
        alone = number("SLURM_STEP_NUM_TASKS") == number("SLURM_STEP_NUM_NODES")
    if not scheduled and not _on_tpu_pod():
        return
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError, OSError) as e:  # Open MPI 5, for one, does not say where its processes meet
        raise UserError(f"cannot join the other processes: {e}; give --distributed address:port,count,index, or off") from None
    # JAX hands each process of SLURM and Open MPI the GPU of its number on the node: seven of eight would idle beside a process that is
    # alone, and a process to which the scheduler shows a single GPU has none of a higher number.
    single = "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")
    if scheduled and (alone or single) and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, "all")


def _on_tpu_pod() -> bool:
    """Whether this is one of several TPU workers. GKE lists them; on a TPU VM only the metadata server knows, and JAX asks it."""
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if workers is not None:
        return "," in workers or int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    # JAX sets the variable on import where it finds no TPU. A VM that is alone joins itself, which costs nothing.
    return "TPU_SKIP_MDS_QUERY" not in os.environ and importlib.util.find_spec("libtpu") is not None


def report(params: Mapping[str, Any], axes: Callable[[str], Sequence[str | None]], mesh: Mesh, trainable: Collection[str]) -> str:
    """A table of every parameter: shape, type, partition, bytes on one device, trained or frozen.

    Raises:
      UserError: a large tensor (over 2 % of all bytes and 16 MiB) would stand whole on every device of fsdp x tensor.
    """
    rows, total = [], sum(p.size * p.dtype.itemsize for p in params.values())
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for name, p in params.items():
        sharding = sharding_for(mesh, axes(name), p.shape)
        size = p.size * p.dtype.itemsize
        local = math.prod(sharding.shard_shape(p.shape)) * p.dtype.itemsize
        if split > 1 and local == size and size > max(0.02 * total, 2**24):
            raise UserError(f"{name} {p.shape} ({size / 2**20:.0f} MiB) would be whole on every device: no dimension is a multiple "
                            "of its mesh axis; change --mesh.fsdp or --mesh.tensor")  # fmt: skip
        state = "trained" if name in trainable else "frozen"
        rows.append((name, "x".join(map(str, p.shape)), str(p.dtype), str(tuple(sharding.spec)), f"{local / 2**20:.2f} MiB", state))
    widths = [max(len(r[i]) for r in rows) for i in range(6)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    count = sum(p.size for p in params.values())
    lines.append(f"{count:,} parameters, {total / 2**20:.1f} MiB, mesh {dict(mesh.shape)}")
    return "\n".join(lines)


def log_devices() -> None:
    """Says which devices this process sees; a silent fall back to the CPU is a common surprise."""
    devices = jax.devices()
    where = jax.process_index(), jax.process_count()
    logging.getLogger(__name__).info("%d x %s, process %d of %d", len(devices), devices[0].device_kind, *where)
