"""Loss, step and loop: exact where they must be exact."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import FP32, TINY, random_rows
from xprompt_jax.config import BucketConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from xprompt_jax.errors import UserError
from xprompt_jax.mesh import RULES, make_mesh, shard_batch, sharding_for
from xprompt_jax.model.chameleon import Chameleon
from xprompt_jax.model.params import flatten, logical_axes
from xprompt_jax.prompt import Role, stack
from xprompt_jax.train.loop import train
from xprompt_jax.train.loss import cross_entropy, gather_answers
from xprompt_jax.train.metrics import attention_pairs, read_metrics, row_flops
from xprompt_jax.train.optim import make_optimizer, merge, schedule, split_trainable
from xprompt_jax.train.state import abstract_state, init_state
from xprompt_jax.train.step import bucket_sums, make_eval_step, make_train_step, means, shapes_of

CONFIG = Config(
    model=TINY,
    compute=FP32,
    mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
    data=DataConfig(buckets=(
        BucketConfig("in_context", examples=1, context=8, todo=9, answer=9, rows=8),
        BucketConfig("text_to_image", examples=0, context=0, todo=12, answer=12, rows=16),
    )),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
    train=TrainConfig(steps=4, log_every=1, eval_every=2, eval_batches=2, save_every=2, loss_chunk=16),
)  # fmt: skip


def data(step, config=CONFIG):
    shapes = shapes_of(config)
    return {b.name: stack(random_rows(1000 * step + i, shapes[b.name], b.rows), b.answer) for i, b in enumerate(config.data.buckets)}


def replace(config=CONFIG, **parts):
    return dataclasses.replace(config, **{n: dataclasses.replace(getattr(config, n), **v) for n, v in parts.items()})


@functools.cache
def drawn():
    """Weights of `TINY`, drawn once: the program that draws them takes as long to compile as a training step."""
    return jax.device_get(jax.jit(lambda: flatten(Chameleon(TINY, jax.random.key(0))))())


def start(mesh):
    """`drawn` on a mesh, to be given away."""
    return {n: jax.device_put(v, sharding_for(mesh, logical_axes(n), v.shape), may_alias=False) for n, v in drawn().items()}


def run_steps(config, devices, steps=3, initial=start, seen=lambda state: None):
    """The last state and all metrics. `seen` gets each state before the next step reuses it; without `initial`, weights are born there."""
    mesh = make_mesh(config.mesh, devices)
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = init_state(config, optimizer, mesh, initial(mesh) if initial else None)
    step = make_train_step(config, optimizer, jax.tree.map(lambda a: a.sharding, abstract_state(config, optimizer, mesh)))
    history = []
    with jax.set_mesh(mesh):
        for i in range(steps):
            state, metrics = step(state, shard_batch(data(i, config), mesh))
            history.append(jax.device_get(metrics))
            seen(state)
    return jax.device_get(state), history


def assert_close(a, b, atol=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4)


@pytest.fixture(scope="module")
def one_device():
    return run_steps(CONFIG, jax.devices()[:1], initial=None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The state and the folder of a run of `CONFIG`; copy the folder to train on in it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return train(CONFIG, workdir, data, eval_data=data, progress=False), workdir


def test_chunked_loss_is_the_plain_loss():
    keys = jax.random.split(jax.random.key(0), 3)
    states, head = jax.random.normal(keys[0], (3, 7, 16)), jax.random.normal(keys[1], (16, 50))
    labels, weights = jax.random.randint(keys[2], (3, 7), 0, 50), jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 7)), float)

    def plain(states, head):
        log_p = jax.nn.log_softmax(states @ head)
        nll = -jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
        return jnp.sum(weights * nll) + 0.1 * jnp.sum(weights * jax.nn.logsumexp(states @ head, axis=-1) ** 2)

    def chunked(states, head, chunk):
        sums = cross_entropy(states, head, labels, weights, chunk=chunk)
        return sums.loss + 0.1 * sums.z

    want, want_grads = jax.jit(jax.value_and_grad(plain, (0, 1)))(states, head)
    for chunk in (1, 3, 7, 100):
        got, grads = jax.jit(jax.value_and_grad(functools.partial(chunked, chunk=chunk), (0, 1)))(states, head)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        assert_close(grads, want_grads)
    sums = cross_entropy(states, head, labels, weights, chunk=3)
    assert sums.weight == weights.sum()
    assert sums.correct == jnp.sum(weights * (jnp.argmax(states @ head, -1) == labels))


def test_groups_have_sums_of_their_own():
    keys = jax.random.split(jax.random.key(0), 3)
    states, head = jax.random.normal(keys[0], (2, 7, 16)), jax.random.normal(keys[1], (16, 50))
    labels = jax.random.randint(keys[2], (2, 7), 0, 50)
    groups = jnp.stack([jnp.zeros((2, 7)).at[:, :3].set(1.0), jnp.zeros((2, 7)).at[1, 4:].set(0.5)])
    together = cross_entropy(states, head, labels, groups, chunk=3)
    for i, weights in enumerate(groups):
        assert_close([s[i] for s in together], list(cross_entropy(states, head, labels, weights, chunk=3)))


def test_buckets_together_are_each_alone():
    """The step's sums and gradients against those of one bucket at a time."""
    params = flatten(Chameleon(TINY, jax.random.key(0)))
    batches = data(0)

    @jax.jit
    def gradient(params, batches):
        def loss(params):
            sums = bucket_sums(CONFIG, params, batches)
            return sum(s.loss for s in sums.values()), sums

        return jax.grad(loss, has_aux=True)(params)

    grads, together = gradient(params, batches)
    alone = {name: gradient(params, {name: batch}) for name, batch in batches.items()}
    assert set(together) == set(batches) == {"in_context", "text_to_image"}
    for name, (_, sums) in alone.items():
        assert_close(together[name], sums[name], atol=1e-3)
    assert_close(grads, jax.tree.map(jnp.add, *(g for g, _ in alone.values())), atol=2e-4)


def test_rows_without_weight_give_no_gradient_and_no_nan():
    states, head = jnp.ones((1, 4, 8)), jnp.ones((8, 5))
    grads = jax.grad(lambda s: cross_entropy(s, head, jnp.zeros((1, 4), int), jnp.zeros((1, 4)), chunk=2).loss)(states)
    assert (grads == 0).all()


def test_states_that_are_not_finite_do_no_harm_where_nothing_is_asked():
    weights = jnp.array([[1.0, 0.0, 1.0, 0.0]])
    clean = jax.random.normal(jax.random.key(0), (1, 4, 8))
    poisoned = clean.at[:, 1::2].set(jnp.nan)
    head = jax.random.normal(jax.random.key(1), (8, 5))

    def loss(states, head):
        return cross_entropy(states, head, jnp.zeros((1, 4), int), weights, chunk=2).loss

    want, wanted = jax.value_and_grad(loss, (0, 1))(clean, head)
    got, grads = jax.value_and_grad(loss, (0, 1))(poisoned, head)
    assert got == want
    assert_close(grads, wanted, atol=0)


def test_answers_are_predicted_from_the_slot_before():
    shape = shapes_of(CONFIG)["in_context"]
    rows = random_rows(0, shape, 2)
    batch = stack(rows, 9)
    hidden = np.arange(shape.length, dtype=np.float32)[None, :, None] * np.ones((2, 1, 1), np.float32)
    states, labels = gather_answers(hidden, batch)
    for b, row in enumerate(rows):
        (where,) = np.nonzero(row.weights)
        assert states[b, : len(where), 0].tolist() == (where - 1).tolist()
        assert labels[b, : len(where)].tolist() == row.ids[where].tolist()


@pytest.mark.parametrize("mesh", [MeshConfig(2, 4, 1), MeshConfig(1, 2, 4), MeshConfig(8, 1, 1)], ids=str)
def test_eight_devices_are_one(one_device, mesh):
    state, history = run_steps(dataclasses.replace(CONFIG, mesh=mesh), None, initial=None)
    assert_close(history, one_device[1])
    assert_close(state.params, one_device[0].params, atol=2e-3)  # Adam turns rounding of near-zero gradients into steps


def test_dropout_is_that_of_one_device_and_the_residual_stream_may_be_split(one_device, monkeypatch):
    """The random numbers do not depend on the mesh; nor does anything on the rule that docs/scaling.md offers."""
    config = replace(train={"dropout": 0.3})
    _, want = run_steps(config, jax.devices()[:1], steps=1)
    assert abs(want[0]["loss"] - one_device[1][0]["loss"]) > 1e-3
    monkeypatch.setitem(RULES, "act_embed", ("tensor",))
    assert_close(run_steps(dataclasses.replace(config, mesh=MeshConfig(1, 2, 4)), None, steps=1)[1], want)


def test_microbatches_are_one_batch(one_device):
    state, history = run_steps(replace(train={"accumulate": 4}), jax.devices()[:1])
    assert_close(history, one_device[1])
    assert_close(state.params, one_device[0].params, atol=2e-3)


def test_rows_must_divide_into_microbatches():
    with pytest.raises(UserError, match="train.accumulate 3"):
        run_steps(replace(train={"accumulate": 3}), jax.devices()[:1])


@pytest.mark.parametrize("rule, names", [("xp", {"xp"}), ("image_head", {"head.image"})])
def test_frozen_parameters_stay_and_cost_nothing(rule, names):
    config = replace(optim={"trainable": rule})
    state, _ = run_steps(config, jax.devices()[:1], steps=2)
    fresh, _ = run_steps(config, jax.devices()[:1], steps=0)
    start = merge(fresh.params, fresh.frozen)
    end = merge(state.params, state.frozen)
    assert set(state.params) == names
    size = sum(v.size for v in state.params.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * size
    changed = {name for name in start if not np.array_equal(start[name], end[name])}
    assert changed == {"xp" if rule == "xp" else "head"}
    if rule == "image_head":
        outside = np.delete(end["head"] - np.asarray(start["head"]), np.arange(4, 36), axis=1)
        assert (outside == 0).all()
    assert set(merge(*split_trainable(start, config))) == set(start)


def test_loop_resumes_exactly_and_onto_another_mesh(finished, tmp_path):
    # Stopped by SIGTERM in the middle: saves, returns early, and goes on from there.
    def interrupted(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return data(step)

    stopped = train(CONFIG, tmp_path / "parts", interrupted, eval_data=data, progress=False)
    assert 1 <= stopped.step < 4
    resumed = train(CONFIG, tmp_path / "parts", data, eval_data=data, progress=False)
    for a, b in zip(jax.tree.leaves(finished[0]), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = read_metrics(tmp_path / "parts")
    assert [m["step"] for m in lines if "loss" in m] == [1, 2, 3, 4]
    assert {"eval/loss", "eval/accuracy"} <= set(next(m for m in lines if "eval/loss" in m))
    assert list((tmp_path / "parts" / "tensorboard").iterdir())

    longer = replace(dataclasses.replace(CONFIG, mesh=MeshConfig(2, 2, 2)), train={"steps": 5})
    moved = train(longer, tmp_path / "parts", data, progress=False)
    assert moved.step == 5
    assert len(moved.params["embed"].sharding.device_set) == 8


@pytest.mark.parametrize("older", [False, True])
def test_a_damaged_checkpoint_is_moved_aside(finished, tmp_path, older, caplog):
    whole, workdir = finished
    checkpoints = shutil.copytree(workdir, tmp_path / "run") / "checkpoints"
    for file in (checkpoints / "4").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            os.truncate(file, file.stat().st_size // 2)
    if not older:
        shutil.rmtree(checkpoints / "2")
        with pytest.raises(UserError, match=r"none of the checkpoints \[4\] can be read"):
            train(CONFIG, tmp_path / "run", data, progress=False)
        return
    resumed = train(CONFIG, tmp_path / "run", data, progress=False)
    assert "checkpoint 4 is damaged" in caplog.text
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["2", "4", "4.damaged"]


def test_nothing_but_the_batch_crosses_to_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr("xprompt_jax.train.loop.shard_batch", lambda batch, mesh: batch)  # a batch left on the host
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(CONFIG, tmp_path, data, progress=False)


def test_another_model_is_not_resumed(finished):
    with pytest.raises(UserError, match="other model settings"):
        train(replace(model={"norm_eps": 1e-6}), finished[1], data, progress=False)
    for change, told in (({"name": "muon"}, "name adamw, not muon"), ({"ema_decay": 0.5}, "ema_decay 0.0, not 0.5")):
        with pytest.raises(UserError, match=rf"other optim settings \({told}\)"):
            train(replace(optim=change), finished[1], data, progress=False)


def test_a_run_may_go_on_at_another_learning_rate(finished, tmp_path, caplog):
    """As a run that has diverged is told to."""
    workdir = shutil.copytree(finished[1], tmp_path / "run")
    on = train(replace(train={"steps": 5}, optim={"learning_rate": 1e-7}), workdir, data, progress=False)
    assert on.step == 5 and "optim.learning_rate is 1e-07 from here on, and was" in caplog.text
    moved = lambda a, b: max(float(np.abs(a.params[n] - b.params[n]).max()) for n in a.params)
    assert 0 < moved(on, finished[0]) < 1e-6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_evaluation_is_a_steps_loss(accumulate):
    """On any mesh; and where the step is cut into microbatches, so is the evaluation."""
    config = replace(train={"accumulate": accumulate, "loss_chunk": 3})
    told = []
    for devices, mesh in ((jax.devices()[:1], MeshConfig(1, 1, 1)), (jax.devices(), MeshConfig(2, 2, 2))):
        config = dataclasses.replace(config, mesh=mesh)
        whole = replace(config, train={"accumulate": 1})
        on, optimizer = make_mesh(config.mesh, devices), make_optimizer(config.optim, config.train.steps)
        state = init_state(config, optimizer, on, start(on))
        shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, optimizer, on))
        with jax.set_mesh(on):
            batch = shard_batch(data(0, config), on)
            measure = make_eval_step(config, shardings)
            told.append(jax.device_get(means(config, measure(state, batch))))
            scans = [str(jax.make_jaxpr(f)(state, batch)).count("scan[") for f in (measure, make_eval_step(whole, shardings))]
            assert (scans[0] > scans[1]) == (accumulate > 1)
            _, told_by_training = make_train_step(config, optimizer, shardings)(state, batch)
        told.append({name: told_by_training[name] for name in told[-1]})
    for other in told[1:]:
        for name, value in told[0].items():
            np.testing.assert_allclose(other[name], value, rtol=1e-4, err_msg=name)


def test_held_out_losses_are_means_over_tokens(finished):
    """Of every bucket by itself, over all batches: those that have more of its tokens count for more."""
    state, workdir = finished
    mesh = make_mesh(CONFIG.mesh)
    with jax.set_mesh(mesh):
        batches = [jax.device_get(make_eval_step(CONFIG)(state, shard_batch(data(i), mesh))) for i in range(2)]
    (told,) = (m for m in read_metrics(workdir) if m["step"] == 4 and "eval/loss" in m)
    for bucket in CONFIG.data.buckets:
        parts = [sums[bucket.name] for sums in batches]
        want = sum(part.loss for part in parts) / sum(part.weight for part in parts)
        assert told[f"eval/loss/{bucket.name}"] == pytest.approx(want, rel=1e-5)
        assert len({float(part.weight) for part in parts}) == 2, "batches alike would not tell"


def test_a_start_that_is_refused_claims_no_folder(tmp_path):
    def refused():
        raise UserError("other weights")

    with pytest.raises(UserError, match="not a multiple of train.accumulate"):
        train(replace(train={"accumulate": 3}), tmp_path / "run", data, progress=False)
    assert not (tmp_path / "run").exists()
    for config in (CONFIG, replace(model={"norm_eps": 1e-6})):
        with pytest.raises(UserError, match="other weights"):
            train(config, tmp_path / "run", data, initial=refused, progress=False)


def test_the_best_checkpoint_stays(tmp_path):
    config = replace(train={"steps": 9, "keep": 1, "eval_batches": 1})
    train(config, tmp_path, data, eval_data=data, progress=False)
    held_out = {m["step"]: m["eval/loss"] for m in read_metrics(tmp_path) if "eval/loss" in m}
    best = min(held_out, key=held_out.get)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == sorted({best, 9})


def test_a_profile_of_the_named_steps(tmp_path):
    train(replace(train={"profile": (2, 3)}), tmp_path, data, progress=False)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_padding_is_told(finished):
    shapes, config = shapes_of(CONFIG), CONFIG.data
    rows = [row for i, b in enumerate(config.buckets) for row in random_rows(i, shapes[b.name], b.rows)]
    empty = sum(int((row.roles == Role.PAD).sum()) for row in rows)
    assert read_metrics(finished[1])[0]["padding"] == pytest.approx(empty / sum(len(row.roles) for row in rows))


def test_rows_must_divide_over_devices():
    with pytest.raises(UserError, match="not a multiple of the 8 devices"):
        run_steps(replace(train={"accumulate": 2}), None)


def test_a_torn_line_of_metrics_is_passed_over(finished, tmp_path):
    workdir = shutil.copytree(finished[1], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/4")
    with (workdir / "metrics.jsonl").open("a") as f:
        f.write('{"step": 1, "lo')
    train(CONFIG, workdir, data, progress=False)
    assert [m["step"] for m in read_metrics(workdir) if "loss" in m] == [1, 2, 3, 4]


def test_no_clipping_is_not_no_training():
    state, _ = run_steps(replace(optim={"clip_norm": 0.0}), jax.devices()[:1], steps=2)
    assert np.abs(state.params["norm"] - drawn()["norm"]).max() > 0


def test_schedule_shapes():
    rates = {s: schedule(dataclasses.replace(CONFIG.optim, schedule=s, final_fraction=0.1), 100) for s in ("cosine", "linear", "constant")}
    for name, rate in rates.items():
        assert rate(0) == 0 and rate(2) == pytest.approx(1e-2)
        assert rate(99) == pytest.approx(1e-2 if name == "constant" else 1e-3, rel=0.1)


def test_flops_count_the_real_mask():
    shape = shapes_of(CONFIG)["in_context"]
    assert attention_pairs(shape) < shape.length**2 / 2
    seven = Config()
    bucket = seven.data.buckets[0]
    shape = shapes_of(seven)["in_context"]
    flops = row_flops(seven.model, shape, bucket.answer)
    assert flops == pytest.approx(6 * 6.476e9 * shape.length, rel=0.15)


def test_config_is_written(finished):
    assert json.loads((finished[1] / "config.json").read_text())["train"]["steps"] == 4
