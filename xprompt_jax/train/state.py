"""The training state: plain arrays in flat dictionaries, born sharded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xprompt_jax.config import Config
from xprompt_jax.mesh import sharding_for
from xprompt_jax.model.chameleon import Chameleon
from xprompt_jax.model.params import flatten
from xprompt_jax.train.lora import SCALE
from xprompt_jax.train.optim import Params, parameter_axes, split_trainable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on."""

    params: Params
    """Trainable parameters, float32 masters."""
    frozen: Params
    """The rest of the model, in `optim.frozen_dtype`; no gradient, no optimizer state."""
    opt_state: Any
    ema: Params
    """Moving average of `params`; empty when it is off."""
    step: jax.Array
    """int32, finished steps."""


def make_state(config: Config, optimizer: optax.GradientTransformation, key: jax.Array, initial: Params | None = None) -> TrainState:
    """A new state, from random weights or from `initial` (a flat dictionary of the whole decoder)."""
    params = flatten(Chameleon(config.model, key)) if initial is None else initial
    trainable, frozen = split_trainable({n: v.astype(jnp.float32) for n, v in params.items()}, config)
    stored = jnp.dtype(config.optim.frozen_dtype)
    frozen = {n: v if n == SCALE else v.astype(stored) for n, v in frozen.items()}
    ema = trainable if config.optim.ema_decay else {}
    return TrainState(trainable, frozen, optimizer.init(trainable), dict(ema), jnp.zeros((), jnp.int32))


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """The sharding of every leaf: optimizer moments lie like the parameter they belong to, scalars everywhere."""

    def place(path, leaf) -> NamedSharding:
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey) and _known(k.key)), None)
        if name is None or leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        return sharding_for(mesh, parameter_axes(name), leaf.shape)

    return jax.tree_util.tree_map_with_path(place, state)


def _known(name: Any) -> bool:
    try:
        parameter_axes(name)
    except KeyError:
        return False
    return True


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of a state, without its memory; what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda key: make_state(config, optimizer, key), jax.random.key(0))
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, state_shardings(shapes, mesh))


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh, initial: Params | None = None) -> TrainState:
    """A new state on the mesh. Every array is made where it lives: no device ever holds the whole model.

    `initial` lies on the mesh already; its memory is reused.
    """
    make: Callable[..., TrainState] = lambda key, initial: make_state(config, optimizer, key, initial)
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, optimizer, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=shardings, donate_argnums=1)(jax.random.key(config.train.seed), initial)
