"""Pods that are not here: the recipes compile for 256 devices, and what they move is what the formulas say."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_collectives import collectives, device_groups, mesh_axes
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from predict_scaling import Plan, tables
from report_sharding import lowered_step

from tests.helpers import TINY
from xprompt_jax.commands.train import load_config
from xprompt_jax.config import BucketConfig, ComputeConfig, Config, DataConfig, MeshConfig, TrainConfig, to_json
from xprompt_jax.errors import UserError
from xprompt_jax.mesh import AXES, _arrange, make_mesh, spec
from xprompt_jax.model.attention import dense_attention, splash_causal

ROOT = Path(__file__).resolve().parents[2]
PODS = ["chameleon_7b_pod", "chameleon_30b_pod"]
V5P_MEMORY = 95 * 2**30
SMALL = Config(
    model=dataclasses.replace(TINY, num_layers=5),
    compute=ComputeConfig(dtype="bfloat16", remat="block"),
    data=DataConfig(buckets=(BucketConfig("in_context", examples=1, context=8, todo=9, answer=9, rows=32),)),
    train=TrainConfig(accumulate=2, loss_chunk=4096),
)


def report(tmp_path, config, devices, *flags):
    """The tool's JSON, and what XLA complained about."""
    tool, out = ROOT / "tools" / "report_sharding.py", tmp_path / "report.json"
    command = [sys.executable, tool, "--config", config, "--devices", devices, "--json", out, *flags]
    ran = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"},  # it reads what XLA dumps
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(out.read_text()), ran.stderr


def sent(found, axes, *kinds):
    return sum(c["sent"] for c in found["collectives"] if c["axes"] == axes and (not kinds or c["kind"] in kinds))


@pytest.mark.parametrize("name", PODS)
def test_pods_compile_for_256_devices(tmp_path, name):
    path = ROOT / "configs" / f"{name}.py"
    found, complaints = report(tmp_path, path, 256, "--compute.attention", "xla")
    assert found["devices"] == 256
    assert "rematerialization" not in complaints
    # The CPU has no flash attention and widens bfloat16: an upper bound.
    assert found["memory"]["arguments"] + found["memory"]["temporary"] + found["memory"]["output_not_reused"] < V5P_MEMORY
    assert found["memory"]["arguments"] < 1.05 * found["state_bytes"] / 256 + 2**23  # the batch is the rest
    assert sum(found["whole_on_every_device"].values()) < 1e-4 * found["state_bytes"]
    matrices = [leaf for leaf in found["whole_on_every_device"] if "norm" not in leaf and "xp" not in leaf]
    assert not matrices
    paper = Plan(load_config(path), *found["mesh"].values(), accumulate=1).sent()
    assert sent(found, "tensor") == pytest.approx(paper["tensor"], rel=0.03)
    assert sent(found, "fsdp") == pytest.approx(paper["fsdp"], rel=0.03)


@pytest.mark.parametrize("name", PODS)
def test_pods_lower_for_tpu_with_their_kernel(name):
    config = load_config(ROOT / "configs" / f"{name}.py")
    assert config.compute.attention == "splash"
    tpu = AbstractDevice("TPU v5", 1, "tpu")
    mesh = AbstractMesh((1, 128, 2), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=tpu)
    _, lowered = lowered_step(config, mesh, "tpu")
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 1)], ids=str)
def test_splash_on_eight_devices_is_causal_attention(heads, kv_heads):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (4, 100, n, 128)) for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True))
    want = dense_attention(q, k, v, jnp.tril(jnp.ones((1, 100, 100), bool)))
    mesh = make_mesh(MeshConfig(2, 2, 2))
    rows = jax.device_put((q, k, v), NamedSharding(mesh, spec("batch")))
    with jax.set_mesh(mesh):
        got = jax.jit(functools.partial(splash_causal, interpret=True))(*rows)
    assert got.sharding.shard_shape(got.shape) == (1, 100, heads // (1 if heads % 2 else 2), 128)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("buckets", [1, 2])
def test_fsdp_moves_what_a_hand_counts(tmp_path, buckets):
    """The same whether a step has one bucket or two."""
    more = (BucketConfig("text_to_image", examples=0, context=0, todo=12, answer=12, rows=16),)
    data = dataclasses.replace(SMALL.data, buckets=SMALL.data.buckets + more[: buckets - 1])
    (tmp_path / "c.json").write_text(to_json(dataclasses.replace(SMALL, data=data)))
    found, complaints = report(tmp_path, tmp_path / "c.json", 8)
    assert "rematerialization" not in complaints
    # q and o: 32 x 4 x 8; k and v: 32 x 2 x 8; gate, up, down: 32 x 48. Five layers, two microbatches, 7/8 of it leaves or arrives.
    layers = (2 * 32 * 4 * 8 + 2 * 32 * 2 * 8 + 3 * 32 * 48) * 5
    head = 32 * 448
    gathered = layers * 2 * (1 + 1) + head * (2 + 2 + 4)  # forward and backward in bfloat16; the head's last gather in float32
    scattered = layers * 2 + head * 4
    matrices = {"reduce-scatter": 0, "all-gather": 0}
    for c in found["collectives"]:
        if c["kind"] in matrices and not c["type"].startswith("s32"):  # ids of the embedding
            assert (c["axes"], c["group"]) == ("fsdp", 8)
            matrices[c["kind"]] += c["sent"]
    assert matrices == {"all-gather": 2 * gathered * 7 // 8, "reduce-scatter": 2 * scattered * 7 // 8}
    assert sent(found, "tensor") == sent(found, "data") == 0


def test_slices_exchange_gradients_alone(tmp_path):
    (tmp_path / "c.json").write_text(to_json(SMALL))
    found, complaints = report(tmp_path, tmp_path / "c.json", 8, "--mesh.data", "2", "--mesh.fsdp", "4", "--mesh.slices", "2")
    assert "rematerialization" not in complaints  # or whole activations would cross the slow network
    across = [c for c in found["collectives"] if "data" in c["axes"]]
    assert {c["kind"] for c in across} == {"all-reduce"}
    assert {c["axes"] for c in across} <= {"data", "data x fsdp"}
    layers = (2 * 32 * 4 * 8 + 2 * 32 * 2 * 8 + 3 * 32 * 48) * 5
    matrices = sum(c["sent"] for c in across if c["axes"] == "data" and c["where"].endswith("dot_general"))
    assert matrices == 2 * (layers * 2 + 32 * 448 * 4) // 4  # twice (ring of 2: once the bytes), each a fourth of the gradient


def test_mesh_of_slices_keeps_each_together():
    devices = jax.devices()
    mesh = make_mesh(MeshConfig(2, 2, 2, slices=2), devices)
    assert mesh.devices.tolist() == np.array(devices, object).reshape(2, 2, 2).tolist()
    assert dict(make_mesh(MeshConfig(-1, 2, 1, slices=4)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    for config in (MeshConfig(2, 4, 1, slices=4), MeshConfig(1, 8, 1, slices=2), MeshConfig(2, 4, 1, slices=0)):
        with pytest.raises(UserError, match="mesh.slices"):
            make_mesh(config, devices)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as mesh_utils sees it."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    process_index: int = 0
    core_on_chip: int = 0


def test_mesh_follows_the_slices_that_devices_name():
    # Devices come interleaved: 0 2 4 6 are a square of slice 0, 1 3 5 7 one of slice 1.
    chips = [Chip(i, i % 2, (i // 2 % 2, i // 4, 0)) for i in range(8)]
    grid = _arrange(chips, (4, 2, 1), 2)
    assert [sorted(c.id for c in half.flat) for half in np.split(grid, 2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(UserError, match="--mesh.slices 2"):
        _arrange(chips, (4, 2, 1), 1)
    gpus = [dataclasses.replace(c, slice_index=i // 2, platform="gpu") for i, c in enumerate(chips)]  # a slice a host
    assert [[c.id for c in row] for row in _arrange(gpus, (4, 2, 1), 2)[..., 0]] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("text, groups", [
    ("{{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
    ("[2,2]<=[4], x", [[0, 1], [2, 3]]),
    ("[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=1,'c'=2] {'a'}, x", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
    ("mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
    ("mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
], ids=str)  # fmt: skip
def test_groups_are_read_in_every_notation(text, groups):
    assert device_groups(text).tolist() == groups


def test_an_unknown_notation_is_refused():
    with pytest.raises(ValueError, match="not understood"):
        device_groups("everyone")


def test_groups_become_mesh_axes():
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    assert mesh_axes(np.arange(0, 8, 2), mesh) == "fsdp"
    assert mesh_axes(np.array([0, 8]), mesh) == "data"
    assert mesh_axes(np.arange(8), mesh) == "fsdp x tensor"
    assert mesh_axes(np.array([0, 4]), mesh) == "fsdp (2 of 4)"


HLO = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %a = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %b = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %ab = f32[8]{0} add(%a, %b)
  %c = f32[8]{0} all-reduce(%x), replica_groups={{0,2},{1,3}}, to_apply=%add
  %kept = f32[4]{0} dynamic-slice(%c, %i), dynamic_slice_sizes={4}
  ROOT %t = (s32[], f32[8]) tuple(%i, %ab)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %start = (s32[], f32[8]) tuple(%zero, %x)
  %loop = (s32[], f32[8]) while(%start), condition=%condition, body=%body
  ROOT %g = bf16[16]{0} all-gather(%h#1), replica_groups={{0,2},{1,3}}, dimensions={0}
  %h = (f32[8], bf16[8]) tuple(%x, %y)
}
"""


def test_collectives_are_counted_as_their_loops_run():
    found = {(c.kind, c.axes): (c.count, c.bytes, c.sent) for c in collectives(HLO, {"fsdp": 2, "tensor": 2})}
    assert found == {
        ("all-reduce", "tensor"): (7, 32, 7 * 32),  # a and b are only added: one sum
        ("reduce-scatter", "fsdp"): (7, 32, 7 * 16),
        ("all-gather", "fsdp"): (1, 32, 16),
    }
    with pytest.raises(ValueError, match="unknown length"):
        collectives(HLO.replace("constant(7)", "add(%n1, %n2)"), {"fsdp": 2, "tensor": 2})


def test_the_document_holds_the_tables_that_the_formulas_give():
    text = (ROOT / "docs" / "scaling.md").read_text()
    for name in PODS:
        assert "\n".join(tables(Path("configs") / f"{name}.py")) in text, "docs/scaling.md is stale: run tools/predict_scaling.py"
