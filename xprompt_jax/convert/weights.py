"""Models as streams of tensors: the one interface between formats.

Every format is a `Source` (tensors under our names, one at a time, read when asked for) and a `Target` (parts, each written
whole or not at all). Converting is a walk over the parts of the target; loading is a walk over the layers of the source.
So memory is a few tensors, whatever the size of the model, and every byte is read once.

Names are ours with the layers apart: embed, head, norm, xp, blocks.3.mlp.up; those of the VQGAN stand behind "vqgan/".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xprompt_jax.config import ModelConfig, VQConfig
from xprompt_jax.errors import UserError
from xprompt_jax.mesh import place, sharding_for, whole_array
from xprompt_jax.model.chameleon import Chameleon, abstract_model
from xprompt_jax.model.params import flatten, layer_shapes, logical_axes, per_layer, stacked, unflatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.tokens import Tokenizer

VQGAN_PREFIX = "vqgan/"

Read = Callable[[str], np.ndarray]


class Source(Protocol):
    """A model in some format."""

    kind: str
    """xprompt, huggingface or meta."""
    config: ModelConfig
    tokenizer: Path
    """Its text_tokenizer.json or tokenizer.json."""
    has_xp: bool
    """Whether the files have XP embeddings; otherwise reading "xp" is a KeyError."""
    draws: bool
    """Whether the files come from someone who trained the image head (Meta's and Hugging Face's releases cannot draw)."""

    def read(self, name: str) -> np.ndarray:
        """One tensor in our layout and the files' type.

        Raises:
          UserError: it is missing or has another shape than `config` says.
        """
        ...

    def files(self) -> list[Path]:
        """All weight files, for checksums."""
        ...


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a target that is written whole or not at all."""

    name: str
    tensors: tuple[str, ...]


class Target(Protocol):
    """A folder being written in some format."""

    def parts(self) -> Sequence[Part]:
        """What there is to write, in order."""
        ...

    def write(self, part: Part, read: Read) -> None:
        """Writes one part; nothing of it stays behind when it fails."""
        ...

    def finish(self, tokenizer: Path) -> None:
        """Writes what is left when all parts are there."""
        ...


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model, under the names above."""
    vqgan = flatten(abstract_vqgan(config.vq))
    decoder = layer_shapes(abstract_model(config), config.num_layers)
    return decoder | {VQGAN_PREFIX + name: tuple(p.shape) for name, p in vqgan.items()}


def groups_of(config: ModelConfig) -> list[Part]:
    """The tensors in groups of one layer, as model folders keep them: outer, block_000, ..., vqgan."""
    names = list(shapes_of(config))
    outer = [n for n in names if not n.startswith(("blocks.", VQGAN_PREFIX))]
    blocks = [[n for n in names if n.startswith(f"blocks.{i}.")] for i in range(config.num_layers)]
    groups = [("outer", outer), *((f"block_{i:03d}", b) for i, b in enumerate(blocks))]
    return [Part(name, tuple(tensors)) for name, tensors in [*groups, ("vqgan", [n for n in names if n.startswith(VQGAN_PREFIX)])]]


def abstract_vqgan(config: VQConfig) -> VQGAN:
    """The VQGAN's shapes without its memory."""
    return jax.eval_shape(lambda: VQGAN(config, jax.random.key(0)))


def load_vqgan(source: Source) -> VQGAN:
    """The image tokenizer, float32: in less, codes flip."""
    like = abstract_vqgan(source.config.vq)
    return unflatten(like, {name: jnp.asarray(source.read(VQGAN_PREFIX + name).astype(np.float32)) for name in flatten(like)})


def tokenizer_of(source: Source) -> Tokenizer:
    """The text tokenizer of a model; words beyond its vocabulary are left out."""
    return Tokenizer.from_file(source.tokenizer, limit=source.config.vocab_size)


def load_decoder(source: Source, *, dtype, mesh: Mesh | None = None) -> Chameleon:
    """The decoder, straight into its place: a host holds one layer's tensor at a time, a device its shard alone.

    Args:
      dtype: of the weights; None takes the files'.
      mesh: weights are sharded over it by the rules of mesh.py; None keeps them on the first device.

    Raises:
      UserError: a tensor is missing or of another shape.
    """
    dtype = jnp.dtype(dtype or source.read("norm").dtype)
    model = abstract_model(source.config, dtype)
    placed: dict[str, jax.Array] = {}

    for name in (n for n in flatten(model) if not n.startswith("blocks.")):
        placed[name] = place(source.read(name).astype(dtype), logical_axes(name), mesh)
    blocks = {n: p for n, p in flatten(model).items() if n.startswith("blocks.")}
    for layer in range(source.config.num_layers):
        for name, target in blocks.items():
            value = place(source.read(per_layer(name, layer)).astype(dtype), logical_axes(name)[1:], mesh)
            if layer == 0:
                sharding = None if mesh is None else sharding_for(mesh, logical_axes(name), target.shape)
                placed[name] = jnp.zeros(target.shape, dtype, device=sharding)
            placed[name] = _insert(placed[name], value, layer)
    return unflatten(model, placed)


_insert = jax.jit(lambda stack, value, i: jax.lax.dynamic_update_index_in_dim(stack, value, i, 0), donate_argnums=0)


def reader_of(decoder: Chameleon, vqgan: VQGAN) -> Read:
    """Tensors of a model in memory, as a source gives them; where processes share it, all of them read in the same order."""
    params: Mapping[str, jax.Array] = flatten(decoder)
    images: Mapping[str, jax.Array] = flatten(vqgan)

    def read(name: str) -> np.ndarray:
        if name.startswith(VQGAN_PREFIX):
            return whole_array(images[name.removeprefix(VQGAN_PREFIX)])
        whole, layer = stacked(name)
        return whole_array(params[whole] if layer is None else params[whole][layer])

    return read


def checked(name: str, value: np.ndarray, shape: tuple[int, ...], where: object) -> np.ndarray:
    """`value`, if it has the shape that the configuration asks for."""
    if value.shape != shape:
        raise UserError(f"{where}: {name} has shape {value.shape}, the configuration asks for {shape}")
    return value
