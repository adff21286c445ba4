"""Low-rank adapters (LoRA, arXiv 2106.09685) on the matrices of the blocks: W + alpha / rank * A B.

A takes a matrix's input dimensions to the rank, B the rank to its output dimensions; both are stacked over the layers like the matrix, and
lie on the mesh like it. B starts at zero, so that a run starts at the base model.

    wq, wk, wv   [N, D, heads, K]   a [N, D, rank]      b [N, rank, heads, K]
    wo           [N, H, K, D]       a [N, H, K, rank]   b [N, rank, D]
    gate, up     [N, D, F]          a [N, D, rank]      b [N, rank, F]
    down         [N, F, D]          a [N, F, rank]      b [N, rank, D]

The training pass computes x W + scale (x A) B: no merged matrix exists, no gradient of one is made, and devices sum the gradients of A and
B alone. The export merges (`merge_adapters`): up to rounding, what is written is what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xprompt_jax.config import Config
from xprompt_jax.errors import UserError
from xprompt_jax.model.params import logical_axes
from xprompt_jax.model.product import LowRank

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


def merge_adapters(params: Mapping[str, jax.Array]) -> Params:
    """All parameters of the model, adapters merged into their matrices (which are then float32): what is written and drawn from."""
    rest = {name: value for name, value in params.items() if not name.startswith(PREFIX)}
    for name in [n for n in rest if f"{PREFIX}{n}.a" in params]:
        product = "nhkr,nrd->nhkd" if _inputs(name) == 2 else "nir,nr...->ni..."
        added = jnp.einsum(product, params[f"{PREFIX}{name}.a"], params[f"{PREFIX}{name}.b"])
        rest[name] = rest[name].astype(jnp.float32) + params[SCALE] * added
    return rest


def adapted(params: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Parameters of the model for the training pass: the matrices that have adapters among `params` are `LowRank`."""
    rest: dict[str, Any] = {name: value for name, value in params.items() if not name.startswith(PREFIX)}
    for name in [n for n in rest if f"{PREFIX}{n}.a" in params]:
        scale = jnp.broadcast_to(params[SCALE], rest[name].shape[:1])  # one for each layer, as everything in a stack
        rest[name] = LowRank(rest[name], params[f"{PREFIX}{name}.a"], params[f"{PREFIX}{name}.b"], scale)
    return rest
