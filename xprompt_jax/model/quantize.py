"""Eight bits a number: the decoder's matrices and the key-value cache, for decoding.

Decoding reads all weights and the whole cache for every pass, so its time on an accelerator is their size over the memory's bandwidth.
Both can be kept as int8 with a float32 scale for each output channel of a matrix, or each token and head of the cache:

    array ~ values * scale,    scale = max |array| / 127,    |error| <= scale / 2

Weights are rounded alone: activations and the arithmetic stay in the compute type, which holds every int8 exactly. The scale is taken out
of the sum, (x @ values) * scale, so that between memory and matrix unit there is a conversion and nothing else, which a compiler can do
on the way. It is tied to the loop that decodes, or it would be moved out of it and a wide copy of all weights be read as before; that
none is made is tested on a CPU. What the bytes are worth in time on a GPU has not been measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xprompt_jax.model.params import Module, flatten, unflatten

_MATRICES = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "gate": 1, "up": 1, "down": 1, "head": 1}
"""What `quantized` rounds, with the number of its input dimensions; they lead."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """An array as values * scale. It may stand in a parameter where an array does, if product.py is what reads it."""

    values: jax.Array
    """int8."""
    scale: jax.Array
    """float32, of the same rank: 1 along the axes that share a scale."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.values.shape

    def __getitem__(self, index: Any) -> Int8:
        """Part of it, by an index that leaves the axes that share a scale whole."""
        return Int8(self.values[index], self.scale[index])


def quantize(array: jax.Array, axes: int | Sequence[int]) -> Int8:
    """Rounds to int8, with one scale for all numbers along `axes`; what is not finite makes its scale so."""
    array = array.astype(jnp.float32)
    scale = jnp.max(jnp.abs(array), axis=axes, keepdims=True) / 127
    return Int8(jnp.round(array / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale)


def quantized_parameter(name: str, value: jax.Array) -> jax.Array | Int8:
    """A decoder's parameter as an int8 model keeps it: matrices by output channel, the rest as it is.

    Args:
      name: with the layers apart: blocks.3.mlp.up.
    """
    inputs = _MATRICES.get(name.rpartition(".")[2])
    return value if inputs is None else quantize(value, tuple(range(inputs)))


def quantized(model: Module) -> Module:
    """The decoder, its layers apart, with int8 matrices. Works inside jit."""
    params: dict[str, Any] = {name: quantized_parameter(name, value) for name, value in flatten(model).items()}
    return unflatten(model, params)
