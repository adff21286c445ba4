"""Activations times a weight, whatever the weight is: an array, rounded to int8, or an array with a low-rank adapter beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from xprompt_jax.model.quantize import Int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """matrix + scale A B, which is never added up. It may stand in a parameter where an array does, if `product` is what reads it."""

    matrix: jax.Array
    """[inputs ..., outputs ...]; like the others, with all layers in front where it stands in a stack."""
    a: jax.Array
    """[inputs ..., rank]."""
    b: jax.Array
    """[rank, outputs ...]."""
    scale: jax.Array
    """A number."""

    def __getitem__(self, index: Any) -> LowRank:
        """Some layers of a stack, or all of them."""
        return LowRank(self.matrix[index], self.a[index], self.b[index], self.scale[index])


def product(equation: str, x: jax.Array, weight: jax.Array | Int8 | LowRank, dtype: Any = None) -> jax.Array:
    """einsum of activations and a weight, which is read in their type.

    Args:
      equation: the weight's input dimensions lead, its output dimensions come last in the result.
      x: with at least as many leading dimensions as the weight has inputs.
      dtype: of the result, and of its sums where it is wider than x; None is x's.
    """
    if isinstance(weight, LowRank):
        given, of_weight, of_result = equation.replace("->", ",").split(",")
        inputs = "".join(c for c in of_weight if c not in of_result)
        outputs = of_weight.removeprefix(inputs)
        kept = of_result.removesuffix(outputs)
        inner = jnp.einsum(f"{given},{inputs}r->{kept}r", x, weight.a.astype(x.dtype))
        added = jnp.einsum(f"{kept}r,r{outputs}->{of_result}", inner, weight.b.astype(x.dtype))
        return product(equation, x, weight.matrix, dtype) + weight.scale.astype(added.dtype) * added
    if not isinstance(weight, Int8):
        return jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=dtype)
    values, x = jax.lax.optimization_barrier((weight.values, x))  # x is of this step, so the conversion is as well
    out = jnp.einsum(equation, x, values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (out * weight.scale).astype(dtype or x.dtype)
