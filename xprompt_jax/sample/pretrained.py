"""Model folders and hub names: what `from_pretrained` reads and `save_pretrained` writes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xprompt_jax.config import ComputeConfig, ModelConfig, to_json
from xprompt_jax.convert.adapt import Adaptation, Adapted, ImageHead
from xprompt_jax.convert.formats import open_source
from xprompt_jax.convert.native import save_folder
from xprompt_jax.convert.weights import VQGAN_PREFIX, Source, load_vqgan, tokenizer_of
from xprompt_jax.errors import UserError
from xprompt_jax.mesh import place, whole_array
from xprompt_jax.model.chameleon import Chameleon, unstacked
from xprompt_jax.model.params import flatten, logical_axes, stacked, unflatten
from xprompt_jax.model.quantize import Int8, quantized_parameter
from xprompt_jax.sample.sampler import XPrompt
from xprompt_jax.tokens import Tokenizer

log = logging.getLogger(__name__)

_TELLING = 256
"""Numbers of a parameter that go into a model's fingerprint."""


def load(
    model: str | Path, *, compute: ComputeConfig | None = None, mesh: Mesh | None = None, dtype: Any = None, weights: str = "float",
    cache: str = "float", image_head: ImageHead = "auto", **options: Any,
) -> XPrompt:  # fmt: skip
    """Loads a model.

    Args:
      model: a folder of ours, Hugging Face's or Meta's, or org/name on the hub (see `convert.formats.open_source`).
      compute: how to compute; the default is float32 on CPU and bfloat16 elsewhere.
      mesh: decoder weights are sharded over it by the rules of mesh.py, tensor by tensor; None keeps them on one device.
      dtype: of the decoder's weights; None takes the compute type. The VQGAN stays in float32, or codes would flip.
      weights: "float", or "int8" to keep the decoder's matrices in a byte a number (model/quantize.py): half the memory of bfloat16, for a
        little of the quality. Compiled prompts fit both.
      cache: "float", or "int8" for the keys and values of what is being drawn.
      image_head: auto, keep, zero or he; see `convert.adapt.Adaptation`. Anole in Meta's format needs keep.
      options: num_xp_tokens, vqgan, tokenizer, format, layout of `open_source`.

    Raises:
      UserError: the model is missing, incomplete or damaged; dtype, weights, cache, image_head or layout is unknown.
    """
    if weights not in ("float", "int8"):
        raise UserError(f"weights {weights!r} is unknown; use float or int8")
    if image_head not in get_args(ImageHead):
        raise UserError(f"image_head {image_head!r} is unknown; use {', '.join(get_args(ImageHead))}")
    try:
        dtype = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        raise UserError(f"dtype {dtype!r} is unknown; use float32, bfloat16 or float16") from None
    found = open_source(model, **options)
    if not found.has_xp:
        log.warning("%s has no XP embeddings: new ones are drawn, which carry nothing until they are trained", model)
    source = Adapted(found, Adaptation(image_head=image_head))
    compute = compute or ComputeConfig(dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    decoder, beginnings = load_apart(source, dtype=dtype or jnp.dtype(compute.dtype), mesh=mesh, int8=weights == "int8")
    loaded = XPrompt(decoder, load_vqgan(source), tokenizer_of(source), compute=compute, cache=cache)
    loaded.fingerprint = fingerprint(loaded.config, beginnings, loaded.tokenizer)
    return loaded


def load_apart(source: Source, *, dtype, mesh: Mesh | None, int8: bool) -> tuple[Chameleon, dict[str, np.ndarray]]:
    """The decoder with its layers apart, rounded tensor by tensor: no device ever holds more than the model and one wide tensor.

    Returns:
      The decoder, and of each parameter as much as `fingerprint` looks at, from before the rounding: int8 is a precision of the same
      model, as bfloat16 is.
    """
    like = jax.eval_shape(lambda: unstacked(Chameleon(source.config, jax.random.key(0), dtype)))
    params: dict[str, Any] = {}
    beginnings: dict[str, np.ndarray] = {}
    for name in flatten(like):
        value = source.read(name)
        beginnings[name] = np.array(value if name == "xp" else value.reshape(-1)[:_TELLING])  # no rounding before bfloat16's
        value = value.astype(dtype)
        whole, layer = stacked(name)
        placed = place(value, logical_axes(whole)[layer is not None :], mesh)
        params[name] = quantized_parameter(name, placed) if int8 else placed
    return unflatten(like, params), beginnings


def save(model: XPrompt, folder: str | Path) -> None:
    """Writes a model folder, whole or not at all.

    Raises:
      UserError: the weights are int8.
    """
    params = flatten(model.layers_apart)
    if any(isinstance(value, Int8) for value in params.values()):
        raise UserError("save_pretrained: these weights were rounded to int8 when they were loaded; load the model without weights='int8'")
    params |= {VQGAN_PREFIX + name: value for name, value in flatten(model.vqgan).items()}
    save_folder(folder, model.config, lambda name: whole_array(params[name]), model.tokenizer)


def fingerprint(config: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """16 hex digits over the configuration, the tokenizer, the XP table and the beginning of every weight, in bfloat16.

    Args:
      params: arrays by name, with the layers apart; of each, its first 256 numbers are enough. What counts is the beginning of the stack.
    """
    stacks: dict[str, list[np.ndarray]] = {}
    for name in sorted(params, key=lambda name: stacked(name)[1] or 0):
        known = stacks.setdefault(stacked(name)[0], [])
        if sum(part.size for part in known) < _TELLING:
            value = params[name] if name == "xp" else params[name].reshape(-1)[:_TELLING]
            known.append(np.asarray(value.astype(jnp.bfloat16)).reshape(-1))
    digest = hashlib.sha256(to_json(config).encode() + tokenizer.fingerprint.encode())
    for name in sorted(stacks):
        value = np.concatenate(stacks[name])
        digest.update(name.encode() + (value if name == "xp" else value[:_TELLING]).tobytes())
    return digest.hexdigest()[:16]
