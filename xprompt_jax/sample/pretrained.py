"""Model folders and hub names: what `from_pretrained` reads and `save_pretrained` writes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xprompt_jax.config import ComputeConfig, ModelConfig, to_json
from xprompt_jax.convert.adapt import Adaptation, Adapted
from xprompt_jax.convert.formats import open_source
from xprompt_jax.convert.native import save_folder
from xprompt_jax.convert.weights import load_decoder, load_vqgan, reader_of, tokenizer_of
from xprompt_jax.sample.sampler import XPrompt
from xprompt_jax.tokens import Tokenizer

log = logging.getLogger(__name__)


def load(
    model: str | Path, *, compute: ComputeConfig | None = None, mesh: jax.sharding.Mesh | None = None, dtype: Any = None, **options: Any
) -> XPrompt:
    """Loads a model.

    Args:
      model: a folder of ours, Hugging Face's or Meta's, or org/name on the hub (see `convert.formats.open_source`).
      compute: how to compute; the default is float32 on CPU and bfloat16 elsewhere.
      mesh: decoder weights are sharded over it by the rules of mesh.py, tensor by tensor; None keeps them on one device.
      dtype: of the decoder's weights; None takes the compute type. The VQGAN stays in float32, or codes would flip.
      options: num_xp_tokens, vqgan, tokenizer, format of `open_source`.

    Raises:
      UserError: the model is missing, incomplete or damaged.
    """
    found = open_source(model, **options)
    if not found.has_xp:
        log.warning("%s has no XP embeddings: new ones are drawn, which carry nothing until they are trained", model)
    source = Adapted(found, Adaptation())
    compute = compute or ComputeConfig(dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    decoder = load_decoder(source, dtype=dtype or compute.dtype, mesh=mesh)
    return XPrompt(decoder, load_vqgan(source), tokenizer_of(source), compute=compute)


def save(model: XPrompt, folder: str | Path) -> None:
    """Writes a model folder, whole or not at all."""
    save_folder(folder, model.config, reader_of(model.decoder, model.vqgan), model.tokenizer)


def fingerprint(config: ModelConfig, params: Mapping[str, jax.Array], tokenizer: Tokenizer) -> str:
    """16 hex digits over the configuration, the tokenizer, the XP table and a slice of every weight, in bfloat16."""
    digest = hashlib.sha256(to_json(config).encode() + tokenizer.fingerprint.encode())
    for name in sorted(params):
        value = params[name] if name == "xp" else params[name].reshape(-1)[:256]
        digest.update(name.encode() + np.asarray(value.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:16]
