"""Low-rank adapters (LoRA, arXiv 2106.09685) on the matrices of the blocks: W + alpha / rank * A B.

A takes a matrix's input dimensions to the rank, B the rank to its output dimensions; both are stacked over the layers like the matrix, and
lie on the mesh like it. B starts at zero, so that a run starts at the base model.

    wq, wk, wv   [N, D, heads, K]   a [N, D, rank]      b [N, rank, heads, K]
    wo           [N, H, K, D]       a [N, H, K, rank]   b [N, rank, D]
    gate, up     [N, D, F]          a [N, D, rank]      b [N, rank, F]
    down         [N, F, D]          a [N, F, rank]      b [N, rank, D]

The training pass merges one layer at a time, inside the layer; the export merges all of them by the same function, so what is trained is
what is written. Merging costs 2 rank operations a weight, and none a token. The gradient of a merged matrix is made on the way to A's and
B's, of one layer at a time. Under any `compute.remat` but none, what was merged is made again in the backward pass and not kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from xprompt_jax.config import Config
from xprompt_jax.errors import UserError
from xprompt_jax.model.chameleon import Attend, Block, Chameleon
from xprompt_jax.model.params import flatten, logical_axes, unflatten

Params = dict[str, jax.Array]

PREFIX = "lora."
SCALE = "lora.scale"
"""alpha / rank, a float32 scalar among the frozen parameters, so that a state says by itself how to merge it."""

_MATRICES = {"wq": "attention", "wk": "attention", "wv": "attention", "wo": "attention", "gate": "mlp", "up": "mlp", "down": "mlp"}


def _inputs(name: str) -> int:
    """How many dimensions of a matrix, after the layers, are its input."""
    return 2 if name.endswith("wo") else 1


def init_adapters(params: Mapping[str, jax.Array], config: Config) -> Params:
    """New adapters for the matrices that `optim.lora_targets` names, float32; A is drawn from `train.seed`, B is zero.

    Raises:
      UserError: the rank is not below a matrix's dimensions, so that adapters would be larger than what they adapt.
    """
    rank, adapters = config.optim.lora_rank, {}
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.train.seed), 1), len(_MATRICES))
    for key, (target, part) in zip(keys, _MATRICES.items(), strict=True):
        if target not in config.optim.lora_targets:
            continue
        name = f"blocks.{part}.{target}"
        layers, *shape = params[name].shape
        into, out = shape[: _inputs(name)], shape[_inputs(name) :]
        fan_in, least = math.prod(into), min(math.prod(into), math.prod(out))
        if rank >= least:
            raise UserError(f"optim.lora_rank {rank} is not below {least}, the smaller side of {target}; lower it or train all")
        adapters[f"{PREFIX}{name}.a"] = fan_in**-0.5 * jax.random.normal(key, (layers, *into, rank))
        adapters[f"{PREFIX}{name}.b"] = jnp.zeros((layers, rank, *out))
    return adapters


def adapter_axes(name: str) -> tuple[str | None, ...]:
    """Logical axes of `lora.NAME.a` (the matrix's input axes) and `lora.NAME.b` (its output axes); the rank is whole everywhere.

    Raises:
      KeyError: there is no such adapter.
    """
    if name == SCALE:
        return ()
    matrix, _, side = name.removeprefix(PREFIX).rpartition(".")
    layers, *axes = logical_axes(matrix)
    into, out = axes[: _inputs(matrix)], axes[_inputs(matrix) :]
    return {"a": (layers, *into, None), "b": (layers, None, *out)}[side]


def merged(name: str, matrix: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """matrix + scale A B, float32, for any number of stacked layers."""
    product = "nhkr,nrd->nhkd" if _inputs(name) == 2 else "nir,nr...->ni..."
    return matrix.astype(jnp.float32) + scale * jnp.einsum(product, a, b)


def merge_adapters(params: Mapping[str, jax.Array]) -> Params:
    """All parameters of the model, with the adapters among `params` merged into their matrices: what is written and drawn from."""
    rest = {name: value for name, value in params.items() if not name.startswith(PREFIX)}
    for name in [n for n in rest if f"{PREFIX}{n}.a" in params]:
        rest[name] = merged(name, rest[name], params[f"{PREFIX}{name}.a"], params[f"{PREFIX}{name}.b"], params[SCALE])
    return rest


class AdaptedBlock(nnx.Module):
    """A block and its adapters, stacked over all layers, that passes for a block."""

    def __init__(self, block: Block, params: Mapping[str, jax.Array]):
        self.block = block
        self.adapters = nnx.data({n: v for n, v in params.items() if n.startswith(PREFIX) and n != SCALE})
        # One for each layer, as everything in a stack.
        self.scale = nnx.Param(jnp.broadcast_to(params[SCALE], block.attention_norm[...].shape[:1]))

    def __call__(self, x: jax.Array, attend: Attend, rate: float = 0.0, key: jax.Array | None = None):
        """As `Block`, of one layer."""
        weights = flatten(self.block)
        for name in [n for n in weights if f"{PREFIX}blocks.{n}.a" in self.adapters]:
            # A stack of one layer: so its product has a batch axis, and remat = "dots" keeps the products without.
            a, b = (self.adapters[f"{PREFIX}blocks.{name}.{side}"][None] for side in "ab")
            weights[name] = merged(name, weights[name][None], a, b, self.scale[...])[0]
        return unflatten(self.block, weights)(x, attend, rate, key)


def attach(model: Chameleon, params: Mapping[str, jax.Array]) -> Chameleon:
    """The model with the adapters among `params` on its blocks; without any, the model."""
    if SCALE in params:
        model.blocks = AdaptedBlock(model.blocks, params)
    return model
