"""Adapters: beside their matrices, trained as if both were one, written as an ordinary model."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from tests.test_runner import config as whole_run
from tests.train.test_training import CONFIG, assert_close, data, drawn, replace, run_steps, start
from xprompt_jax.checkpoint import Checkpoints
from xprompt_jax.config import LORA_TARGETS, MeshConfig, OptimConfig
from xprompt_jax.convert.formats import open_source
from xprompt_jax.convert.weights import load_decoder
from xprompt_jax.errors import UserError
from xprompt_jax.mesh import make_mesh
from xprompt_jax.model.params import flatten, logical_axes
from xprompt_jax.runner import run_training
from xprompt_jax.train.loop import train
from xprompt_jax.train.lora import SCALE, adapter_axes
from xprompt_jax.train.optim import assemble, make_optimizer, merge
from xprompt_jax.train.state import abstract_state, make_state
from xprompt_jax.train.step import bucket_sums

LORA = replace(
    dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, buckets=CONFIG.data.buckets[:1])),
    optim={"trainable": "lora", "lora_rank": 3, "lora_alpha": 6.0},
)
PARTS = {"wq": "attention", "wk": "attention", "wv": "attention", "wo": "attention", "gate": "mlp", "up": "mlp", "down": "mlp"}


def new_state(config=LORA, initial=None):
    return make_state(config, make_optimizer(config.optim, 4), jax.random.key(0), initial)


def some_state():
    """A state whose B is not zero."""
    state, rng = jax.jit(lambda initial: new_state(initial=initial))(drawn()), np.random.default_rng(5)
    params = {n: v + 0.1 * rng.standard_normal(v.shape).astype(np.float32) for n, v in jax.device_get(state.params).items()}
    return dataclasses.replace(state, params=params)


BATCH = data(0, LORA)["in_context"]


def loss(params, config=LORA):
    return bucket_sums(config, params, {"in_context": BATCH})["in_context"].loss


def test_gradients_are_those_through_merged_weights():
    """Loss and gradients against the dense weights W + 2 A B and the chain rule by hand."""
    state = some_state()
    through = lambda params: loss(assemble(params, state.frozen))
    got, grads = jax.jit(jax.value_and_grad(through))(state.params)
    whole = jax.jit(merge)(state.params, state.frozen)
    want, dense = jax.jit(jax.value_and_grad(lambda p: loss(p)))(whole)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(grads["xp"], dense["xp"], atol=1e-5, rtol=1e-4)
    assert set(grads) == {"xp"} | {f"lora.blocks.{part}.{n}.{side}" for n, part in PARTS.items() for side in "ab"}
    for target, part in PARTS.items():
        name = f"blocks.{part}.{target}"
        a, b = (np.asarray(state.params[f"lora.{name}.{side}"], float) for side in "ab")
        a, b = a.reshape(2, -1, 3), b.reshape(2, 3, -1)
        matrix = np.asarray(state.frozen[name]).reshape(2, a.shape[1], b.shape[2])
        np.testing.assert_allclose(whole[name].reshape(matrix.shape), matrix + 2.0 * a @ b, atol=1e-6)
        g = np.asarray(dense[name], float).reshape(matrix.shape)
        np.testing.assert_allclose(grads[f"lora.{name}.a"].reshape(a.shape), 2.0 * g @ b.swapaxes(1, 2), atol=2e-5, rtol=1e-4)
        np.testing.assert_allclose(grads[f"lora.{name}.b"].reshape(b.shape), 2.0 * a.swapaxes(1, 2) @ g, atol=2e-5, rtol=1e-4)


def test_new_adapters_are_the_base_model():
    config = replace(LORA, optim={"lora_targets": ("wq", "down")})
    state = jax.jit(lambda initial: new_state(config, initial))(drawn())
    base = {n: v for n, v in (state.frozen | state.params).items() if not n.startswith("lora.")}
    merged = merge(state.params, state.frozen)
    assert set(merged) == set(base)
    assert all(np.array_equal(merged[n], base[n]) for n in base)
    a = state.params["lora.blocks.attention.wq.a"]
    assert np.std(a) == pytest.approx(32**-0.5, rel=0.2)
    assert {n.split(".")[3] for n in state.params if n != "xp"} == {"wq", "down"}
    run = jax.jit(lambda p: loss(p, config))
    assert run(assemble(state.params, state.frozen)) == run(base)


def test_moments_and_shardings():
    """Two moments for what is trained and none for the rest; A lies like its matrix's input, B like its output."""
    config = dataclasses.replace(LORA, mesh=MeshConfig(1, 2, 4))
    state = abstract_state(config, make_optimizer(config.optim, 4), make_mesh(config.mesh))
    sizes = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)
    assert sizes(state.opt_state) == 2 * sizes(state.params)
    assert not {n for n in state.params if n != "xp"} & set(state.frozen) and state.frozen[SCALE].shape == ()
    for target, part in PARTS.items():
        name = f"blocks.{part}.{target}"
        a, b = state.params[f"lora.{name}.a"], state.params[f"lora.{name}.b"]
        whole = tuple(state.frozen[name].sharding.spec)
        assert (*tuple(a.sharding.spec)[:-1], *tuple(b.sharding.spec)[2:]) == whole
        assert adapter_axes(f"lora.{name}.a")[:-1] + adapter_axes(f"lora.{name}.b")[2:] == logical_axes(name)
    with pytest.raises(KeyError):
        adapter_axes("lora.blocks.mlp.up.c")


def made(jaxpr):
    """(operation, shape) of everything that a jaxpr computes, inside loops as well."""
    for equation in jaxpr.eqns:
        yield from ((equation.primitive.name, tuple(out.aval.shape)) for out in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from made(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("remat", ["none", "block", "dots", "names", "offload"])
def test_no_merged_weight_and_no_gradient_of_one_is_made(remat):
    """No product has the shape of a layer's matrix, and no loop over layers puts out anything of the shape of all layers' matrices."""
    config = dataclasses.replace(replace(LORA, model={"num_layers": 5, "dim": 40}), compute=dataclasses.replace(LORA.compute, remat=remat))
    state = jax.eval_shape(lambda: new_state(config))

    def found(base, trained):
        return set(made(jax.make_jaxpr(jax.grad(lambda params, frozen: loss(params | frozen, config)))(trained, base).jaxpr))

    assert ("scan", (5, 40, 3)) in found(state.frozen, state.params)  # the walk sees the gradient of an A
    shapes = {state.frozen[f"blocks.{part}.{target}"].shape for target, part in PARTS.items()}
    matrices = {("scan", shape) for shape in shapes} | {("dot_general", shape[1:]) for shape in shapes}
    assert not found(state.frozen, state.params) & matrices
    whole = {n: v for n, v in (state.frozen | state.params).items() if not n.startswith("lora.")}
    assert {("scan", shape) for shape in shapes} <= found({}, whole), "a full fine-tune has them"


def test_scan_is_unrolled_and_eight_devices_are_one():
    one, history = run_steps(LORA, jax.devices()[:1])
    unrolled = dataclasses.replace(LORA, compute=dataclasses.replace(LORA.compute, scan_layers=False, remat="block"))
    assert_close(run_steps(unrolled, jax.devices()[:1])[1], history)
    eight, same = run_steps(dataclasses.replace(LORA, mesh=MeshConfig(2, 2, 2)), None)
    assert_close(same, history)
    assert_close(eight.params, one.params, atol=2e-3)
    assert any(np.abs(one.params[f"lora.blocks.{part}.{n}.b"]).max() > 0 for n, part in PARTS.items())
    assert_close(eight.frozen, one.frozen, atol=0)


def test_stopped_and_resumed_is_uninterrupted(tmp_path):
    """With everything that saves memory at once: adapters on a bfloat16 model, bfloat16 moments, an average."""
    config = replace(LORA, optim={"frozen_dtype": "bfloat16", "moment_dtype": "bfloat16", "ema_decay": 0.9})
    initial = lambda: start(make_mesh(config.mesh))
    whole = train(config, tmp_path / "whole", rows, initial=initial, progress=False)

    def interrupted(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rows(step)

    assert train(config, tmp_path / "parts", interrupted, initial=initial, progress=False).step < 4
    resumed = train(config, tmp_path / "parts", rows, progress=False)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(whole.opt_state) if leaf.ndim} == {"bfloat16"}
    assert {str(v.dtype) for n, v in whole.frozen.items() if n != SCALE} == {"bfloat16"}
    assert {str(v.dtype) for v in merge(whole.params, whole.frozen).values()} == {"float32"}
    with pytest.raises(UserError, match="other optim settings"):
        train(replace(config, optim={"lora_alpha": 3.0}), tmp_path / "parts", rows, progress=False)


def rows(step):
    return data(step, LORA)


def test_a_run_writes_an_ordinary_model(world_store, tmp_path):
    config = replace(whole_run(world_store), optim={"trainable": "lora", "lora_rank": 3})
    model = run_training(config, tmp_path, progress=False)
    source = open_source(tmp_path / "model")
    written = flatten(load_decoder(source, dtype=None))
    optimizer = make_optimizer(config.optim, config.train.steps)
    with jax.set_mesh(mesh := make_mesh(config.mesh)):
        state = Checkpoints(tmp_path / "checkpoints").restore(config.train.steps, abstract_state(config, optimizer, mesh))
    want = merge(state.params, state.frozen)
    assert set(written) == set(want) and not any(n.startswith("lora") for n in written)
    for name, value in want.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
        np.testing.assert_array_equal(flatten(model.decoder)[name], value, err_msg=name)
    assert np.abs(written["blocks.mlp.up"] - np.asarray(state.frozen["blocks.mlp.up"])).max() > 0


@pytest.mark.parametrize("flags, told", [
    ({"lora_rank": 0}, "optim.lora_rank is 0"),
    ({"lora_alpha": -1.0}, "optim.lora_alpha is -1"),
    ({"lora_targets": ("q",)}, r"lora_targets \['q'\]: give one or more of wq, wk"),
    ({"lora_targets": ()}, "give one or more of wq"),
    ({"trainable": "all", "frozen_dtype": "bfloat16"}, "nothing is frozen"),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_refused(flags, told):
    with pytest.raises(UserError, match=told):
        OptimConfig(**({"trainable": "lora"} | flags))


def test_a_rank_that_saves_nothing_is_refused():
    with pytest.raises(UserError, match="optim.lora_rank 16 is not below 16, the smaller side of wk"):
        jax.eval_shape(lambda: new_state(replace(LORA, optim={"lora_rank": 16})))
    jax.eval_shape(lambda: new_state(replace(LORA, optim={"lora_rank": 16, "lora_targets": ("gate",)})))
    assert set(LORA_TARGETS) == set(PARTS)
