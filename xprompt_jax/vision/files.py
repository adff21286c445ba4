"""Checkpoints of CLIP and DINO as they are published -> parameters of our modules.

    *.safetensors        Hugging Face, open_clip
    flax_model.msgpack   Hugging Face's Flax models: arrays in msgpack, which holds data only
    *.bin, *.pth, *.pt   PyTorch, through `TorchFile`: read, and never unpickled

Each kind becomes a mapping of names and layouts as PyTorch has them; a table says where the parts of a block lie.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization

from xprompt_jax.convert.safetensors import Tensors
from xprompt_jax.convert.torchfile import TorchFile
from xprompt_jax.errors import UserError
from xprompt_jax.model.params import flatten, unflatten

Module = TypeVar("Module", bound=nnx.Module)
Params = dict[str, np.ndarray]

_TORCH = (".bin", ".pth", ".pt")


class Weights:
    """A checkpoint's tensors by name, as float32.

    Args:
      place: a folder with weights, or a PyTorch or msgpack file.

    Raises:
      UserError: nothing is there, or it cannot be read.
    """

    def __init__(self, place: Path):
        self.place = place
        self._tensors = _open(place)
        self._names = {_plain(name): name for name in self._tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise UserError(f"{self.place}: no tensor {name}; the file is of another model, or incomplete: fetch it again")
        return np.asarray(self._tensors[self._names[name]], np.float32)

    def kernel(self, name: str) -> np.ndarray:
        """A linear layer's [out, in], as [in, out]."""
        return self[name].T

    def patches(self, name: str) -> tuple[np.ndarray, int]:
        """A convolution's [out, 3, P, P] as [P * P * 3, out], and P."""
        kernel = self[name]
        return kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0]), kernel.shape[-1]

    def norm(self, name: str, ours: str) -> Params:
        """A LayerNorm."""
        return {f"{ours}.scale": self[f"{name}.weight"], f"{ours}.bias": self[f"{name}.bias"]}

    def blocks(self, prefix: str, table: Mapping[str, str], ours: str = "blocks") -> Params:
        """All layers `prefix`0, `prefix`1, ... stacked.

        Args:
          table: part of `vit.Blocks` -> its name below a layer; "qkv" is query, key and value in one.
        """
        count = 0
        while f"{prefix}{count}.{table['norm1']}.weight" in self:
            count += 1
        if not count:
            raise UserError(f"{self.place}: no tensor {prefix}0.{table['norm1']}.weight; the file is of another model")
        found: Params = {}
        for part, name in table.items():
            weight, bias = (np.stack([self[f"{prefix}{i}.{name}.{kind}"] for i in range(count)]) for kind in ("weight", "bias"))
            if part.startswith("norm"):
                found |= {f"{ours}.{part}.scale": weight, f"{ours}.{part}.bias": bias}
                continue
            parts = ("query", "key", "value") if part == "qkv" else (part,)
            for one, w, b in zip(parts, np.split(weight, len(parts), 1), np.split(bias, len(parts), 1), strict=True):
                found |= {f"{ours}.{one}.kernel": w.swapaxes(1, 2), f"{ours}.{one}.bias": b}
        return found


def _plain(name: str) -> str:
    """open_clip's fused projection, written as other layers are."""
    return name.replace(".in_proj_", ".in_proj.")


def _open(place: Path) -> Mapping[str, np.ndarray]:
    if not place.is_dir():
        if not place.is_file():
            raise UserError(f"{place}: no such folder or file; fetch one with `hf download ORG/NAME --local-dir DIR`")
        if place.suffix in _TORCH:
            return TorchFile(place)
        if place.suffix == ".msgpack":
            return _flax(place)
        raise UserError(f"{place}: not a kind of weights known here; give the folder it lies in")
    if any(place.glob("*.safetensors")):
        return Tensors(place)
    if (place / "flax_model.msgpack").is_file():
        return _flax(place / "flax_model.msgpack")
    torch = sorted(file for file in place.iterdir() if file.suffix in _TORCH)
    if not torch:
        raise UserError(f"{place}: no weights; give a folder with *.safetensors, flax_model.msgpack, pytorch_model.bin or a .pth file")
    return TorchFile(torch[0])


def _flax(path: Path) -> dict[str, np.ndarray]:
    """A Flax model's parameters under PyTorch's names and in its layouts. Arrays only: the format has no way to name code."""
    found: dict[str, np.ndarray] = {}

    def collect(tree: Mapping[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                collect(value, f"{prefix}{name}.")
                continue
            array = np.asarray(value)
            if name == "kernel":
                array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
            found[prefix + {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(name, name)] = array

    try:
        collect(serialization.msgpack_restore(path.read_bytes()), "")
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as e:
        raise UserError(f"{path}: not a readable Flax checkpoint ({type(e).__name__}: {e}); fetch it again") from None
    return found


def read_config(path: Path) -> dict[str, Any]:
    """A small JSON file, {} where there is none.

    Raises:
      UserError: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable ({e}); fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    return found


@contextlib.contextmanager
def shapes_of(place: Path) -> Iterator[None]:
    """Says in one line that tensors have shapes that cannot be."""
    try:
        yield
    except (ValueError, IndexError) as e:
        raise UserError(f"{place}: tensors of unexpected shapes ({e}); the file is of another model, or damaged") from None


def heads_of(dim: int, given: Any, place: Path) -> int:
    """Attention heads: what a configuration says, else one for 64 dimensions, as in all published CLIP and DINO models.

    Raises:
      UserError: they do not divide `dim`.
    """
    heads = given if given is not None else dim // 64
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise UserError(f"{place}: {heads} attention heads do not divide a width of {dim}; put the model's config.json beside the weights")
    return heads


def side_of(positions: int, patch: int, place: Path) -> int:
    """Image size in pixels, from the number of positions: one for each patch of a square, and one for the class token.

    Raises:
      UserError: the patches make no square.
    """
    side = round((positions - 1) ** 0.5)
    if side < 1 or side * side + 1 != positions:
        raise UserError(f"{place}: {positions} positions are no square of patches and a class token")
    return side * patch


def build(make: Callable[[], Module], params: Mapping[str, np.ndarray], place: Path) -> Module:
    """The module that `make` describes, with `params`.

    Raises:
      UserError: a parameter has another shape.
    """
    like = nnx.eval_shape(make)
    for name, leaf in flatten(like).items():
        if tuple(leaf.shape) != params[name].shape:
            raise UserError(f"{place}: {name} has shape {list(params[name].shape)}, and {list(leaf.shape)} is needed; the file is damaged")
    return unflatten(like, {name: jnp.asarray(value) for name, value in params.items()})


def fingerprint(*modules: nnx.Module, more: bytes = b"") -> str:
    """16 hex digits over all parameters: equal for equal weights, whatever file they came from."""
    digest = hashlib.blake2b(more, digest_size=8)
    for module in modules:
        for name, value in sorted(flatten(module).items()):
            digest.update(f"{name}{value.shape}".encode())
            digest.update(np.asarray(value).tobytes())
    return digest.hexdigest()
