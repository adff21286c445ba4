"""One training step: buckets and microbatches summed, divided once, applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xprompt_jax.config import Config
from xprompt_jax.errors import UserError
from xprompt_jax.model.chameleon import Rows, abstract_model, pack
from xprompt_jax.model.params import unflatten
from xprompt_jax.prompt import SlotShape
from xprompt_jax.train.lora import adapted
from xprompt_jax.train.loss import Sums, cross_entropy, gather_answers
from xprompt_jax.train.optim import Params, assemble, schedule
from xprompt_jax.train.state import TrainState

Batches = Mapping[str, Mapping[str, jax.Array]]
"""Bucket name -> batch, as `prompt.stack` makes it."""


def shapes_of(config: Config) -> dict[str, SlotShape]:
    """The slot shape of every bucket of a run."""
    return {b.name: SlotShape.of(b, config.model.num_xp_tokens, config.data.mode) for b in config.data.buckets}


def bucket_sums(config: Config, params: Params, batches: Batches, shards: int = 1, key: jax.Array | None = None) -> dict[str, Sums]:
    """Sums over the loss tokens of every bucket. All of them go through the layers and the head together (see `Chameleon.hidden`).

    Args:
      params: of the whole model, perhaps with adapters; see `optim.assemble`.
      shards: devices of data x fsdp, each of which takes its part of `train.loss_chunk`.
      key: of dropout; without one there is none.
    """
    shapes = shapes_of(config)
    model = unflatten(abstract_model(config.model), adapted(params))
    parts = [Rows(b["ids"], b["positions"], b["example_lengths"], shapes[name]) for name, b in batches.items()]
    hidden = model.hidden(parts, config.compute, rate=config.train.dropout, key=key)
    asked = [gather_answers(h, b) for h, b in zip(hidden, batches.values(), strict=True)]
    states, labels = (pack(part) for part in zip(*asked, strict=True))
    weights = [b["weights"] for b in batches.values()]
    owned = jnp.stack([pack([w if i == own else jnp.zeros_like(w) for i, w in enumerate(weights)]) for own in range(len(weights))])
    chunk = max(1, config.train.loss_chunk * shards // len(states))
    sums = cross_entropy(states, params["head"], labels, owned, chunk=chunk)
    return {name: Sums(*(of_each[i] for of_each in sums)) for i, name in enumerate(batches)}


def means(config: Config, sums: Mapping[str, Sums]) -> dict[str, jax.Array]:
    """Metrics of the sums of every bucket: means over tokens, and the number of tokens."""
    total = jax.tree.map(lambda *s: sum(s), *sums.values())
    weight = jnp.maximum(total.weight, 1.0)
    per_bucket = {f"loss/{name}": s.loss / jnp.maximum(s.weight, 1.0) for name, s in sums.items()} if len(sums) > 1 else {}
    return {
        "loss": total.loss / weight,
        "z_loss": config.train.z_loss * total.z / weight,
        "accuracy": total.correct / weight,
        "tokens": total.weight,
        **per_bucket,
    }


def make_train_step(config: Config, optimizer: optax.GradientTransformation, shardings: TrainState | None = None) -> Callable:
    """The compiled step: (state, batches) -> (state, metrics). The old state's memory is reused.

    Raises:
      UserError: a bucket's rows are not a multiple of `train.accumulate`.
    """
    parts = config.train.accumulate
    for bucket in config.data.buckets:
        if bucket.rows % parts:
            raise UserError(f"bucket {bucket.name!r} has {bucket.rows} rows, not a multiple of train.accumulate {parts}")
    rate, shards = schedule(config.optim, config.train.steps), _row_shards(shardings)
    for bucket in config.data.buckets:
        if bucket.rows // parts % shards:
            rows = f"{bucket.rows // parts} rows a microbatch"
            raise UserError(f"bucket {bucket.name!r}: {rows}, not a multiple of the {shards} devices of data x fsdp; change rows or --mesh")

    def loss(trainable: Params, frozen: Params, batches: Batches, key, total_weight: jax.Array):
        sums = bucket_sums(config, assemble(trainable, frozen), batches, shards, key if config.train.dropout else None)
        return sum(s.loss + config.train.z_loss * s.z for s in sums.values()) / total_weight, sums

    def gradient(state: TrainState, batches: Batches) -> tuple[Params, dict[str, Sums]]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        weight = jnp.maximum(sum(jnp.sum(batch["weights"]) for batch in batches.values()), 1.0)
        grad = jax.grad(loss, has_aux=True)
        if parts == 1:
            return grad(state.params, state.frozen, batches, key, weight)
        micro = _microbatches(batches, parts)

        def body(total, part):
            i, batches = part
            new = grad(state.params, state.frozen, batches, jax.random.fold_in(key, i), weight)
            return jax.tree.map(jnp.add, total, new), None

        first = jax.tree.map(lambda a: a[0], micro)
        shapes_only = jax.eval_shape(grad, state.params, state.frozen, first, key, weight)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes_only)
        return jax.lax.scan(body, zero, (jnp.arange(parts), micro))[0]

    def step(state: TrainState, batches: Batches) -> tuple[TrainState, dict[str, Any]]:
        grads, sums = gradient(state, batches)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Short at first, or the random weights of the start would stay in the average for thousands of steps.
        decay = jnp.minimum(config.optim.ema_decay, (1 + state.step) / (10 + state.step))
        ema = {name: decay * state.ema[name] + (1 - decay) * params[name] for name in state.ema}
        metrics = means(config, sums) | {"grad_norm": optax.tree.norm(grads), "learning_rate": rate(state.step)}
        return TrainState(params, state.frozen, opt_state, ema, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def make_eval_step(config: Config, shardings: TrainState | None = None) -> Callable:
    """The compiled measurement without dropout: (state, batches) -> `Sums` of every bucket, on the averaged weights where they exist.

    Sums, for they add up over batches (`means` divides them). In the training step's microbatches: what can be trained can be measured.
    """
    parts, shards = config.train.accumulate, _row_shards(shardings)

    def step(state: TrainState, batches: Batches) -> dict[str, Sums]:
        params = assemble(state.ema or state.params, state.frozen)
        sums_of = lambda batches: bucket_sums(config, params, batches, shards)
        if parts == 1:
            return sums_of(batches)
        sums = jax.lax.map(sums_of, _microbatches(batches, parts))
        return jax.tree.map(lambda each: jnp.sum(each, axis=0), sums)

    return jax.jit(step)


def _row_shards(shardings: TrainState | None) -> int:
    """Devices of data x fsdp."""
    if shardings is None:
        return 1
    mesh = jax.tree.leaves(shardings)[0].mesh
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _microbatches(batches: Batches, parts: int) -> Batches:
    """[rows, ...] -> [parts, rows / parts, ...]; strided, so that every device keeps rows of every microbatch."""
    return jax.tree.map(lambda a: jnp.swapaxes(a.reshape(len(a) // parts, parts, *a.shape[1:]), 0, 1), batches)
