"""Modules as flat dictionaries: 'blocks.attention.wq' -> array. What checkpoints, conversion and freezing work on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import jax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)

# Logical axes of every decoder parameter, by name; mesh.py maps them to mesh axes. The VQGAN is small and replicated.
_AXES: dict[str, tuple[str | None, ...]] = {
    "embed": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "norm": (None,),
    "xp": ("xp", None),
    "blocks.attention_norm": ("layers", None),
    "blocks.mlp_norm": ("layers", None),
    "blocks.attention.wq": ("layers", "embed", "heads", "head_dim"),
    "blocks.attention.wk": ("layers", "embed", "kv_heads", "head_dim"),
    "blocks.attention.wv": ("layers", "embed", "kv_heads", "head_dim"),
    "blocks.attention.wo": ("layers", "heads", "head_dim", "embed"),
    "blocks.attention.q_norm.scale": ("layers", "heads", "head_dim"),
    "blocks.attention.q_norm.bias": ("layers", "heads", "head_dim"),
    "blocks.attention.k_norm.scale": ("layers", "kv_heads", "head_dim"),
    "blocks.attention.k_norm.bias": ("layers", "kv_heads", "head_dim"),
    "blocks.mlp.gate": ("layers", "embed", "ffn"),
    "blocks.mlp.up": ("layers", "embed", "ffn"),
    "blocks.mlp.down": ("layers", "ffn", "embed"),
}


def logical_axes(name: str) -> tuple[str | None, ...]:
    """Logical axes of a decoder parameter, one per dimension.

    Raises:
      KeyError: the decoder has no such parameter.
    """
    return _AXES[name]


def flatten(module: nnx.Module) -> dict[str, jax.Array]:
    """All parameters of a module (concrete or abstract), by dotted path."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def unflatten(like: Module, params: Mapping[str, jax.Array]) -> Module:
    """A module of the same structure as `like` (concrete or abstract) that holds `params`. Works inside jit.

    Raises:
      KeyError: `params` lacks a parameter of `like`.
    """
    graph, state = nnx.split(like)
    flat = [(path, leaf.replace(params[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def count(module: nnx.Module) -> int:
    """Number of scalars in a module, concrete or abstract."""
    return sum(leaf.size for leaf in flatten(module).values())


def per_layer(name: str, layer: int) -> str:
    """The name of one layer's slice of a stacked parameter: blocks.mlp.up, 3 -> blocks.3.mlp.up."""
    return name.replace("blocks.", f"blocks.{layer}.", 1)


def stacked(name: str) -> tuple[str, int | None]:
    """The way back: blocks.3.mlp.up -> (blocks.mlp.up, 3); other names -> (name, None)."""
    first, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    return (f"{first}.{rest}", int(layer)) if first == "blocks" and layer.isdigit() else (name, None)


def layer_shapes(module: nnx.Module, num_layers: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter with the layers apart: what model folders hold and converters move, in their order."""
    flat = flatten(module)
    shapes = {name: tuple(p.shape) for name, p in flat.items() if not name.startswith("blocks.")}
    for layer in range(num_layers):
        shapes |= {per_layer(name, layer): tuple(p.shape[1:]) for name, p in flat.items() if name.startswith("blocks.")}
    return shapes
