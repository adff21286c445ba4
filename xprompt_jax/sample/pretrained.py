"""Model folders: what `from_pretrained` reads and `save_pretrained` writes.

    config.json           ModelConfig
    text_tokenizer.json   words and special ids
    params/               Orbax: the decoder, flat names
    vqgan/                Orbax: the image tokenizer, flat names
    vqgan.json            VQConfig

A token store carries the last two and the text tokenizer too (`save_tokenizers`), so that it explains itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xprompt_jax.checkpoint import load_params, save_params
from xprompt_jax.config import ComputeConfig, ModelConfig, VQConfig, load_json, to_json
from xprompt_jax.convert import huggingface
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path
from xprompt_jax.mesh import sharding_for
from xprompt_jax.model.chameleon import abstract_model
from xprompt_jax.model.params import flatten, logical_axes, unflatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.sample.sampler import XPrompt
from xprompt_jax.tokens import Tokenizer


def save(model: XPrompt, folder: str | Path) -> None:
    """Writes a model folder, whole or not at all."""
    with atomic_path(folder) as temporary:
        save_tokenizers(temporary, model.vqgan, model.tokenizer)
        (temporary / "config.json").write_text(to_json(model.config))
        save_params(temporary / "params", flatten(model.decoder))


def save_tokenizers(folder: str | Path, vqgan: VQGAN, tokenizer: Tokenizer) -> None:
    """Writes the text and the image tokenizer into a new folder."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    tokenizer.save(folder / "text_tokenizer.json")
    (folder / "vqgan.json").write_text(to_json(vqgan.config))
    save_params(folder / "vqgan", flatten(vqgan))


def load_tokenizers(folder: str | Path) -> tuple[VQGAN, Tokenizer]:
    """Reads what `save_tokenizers` wrote.

    Raises:
      UserError: a file is missing or damaged.
    """
    folder = Path(folder)
    abstract = jax.eval_shape(lambda: VQGAN(load_json(VQConfig, folder / "vqgan.json"), jax.random.key(0)))
    vqgan = unflatten(abstract, load_params(folder / "vqgan", flatten(abstract)))
    return vqgan, Tokenizer.from_file(folder / "text_tokenizer.json")


def load(folder: str | Path, *, compute: ComputeConfig | None = None, mesh: jax.sharding.Mesh | None = None, dtype=None) -> XPrompt:
    """Loads a model folder.

    Args:
      folder: of our own format, or of Hugging Face's (see `load_huggingface`).
      compute: how to compute; the default is float32 on CPU and bfloat16 elsewhere.
      mesh: decoder weights are sharded over it by the rules of mesh.py; None keeps them on one device.
      dtype: of the decoder's weights; None takes the compute type. The VQGAN stays in float32, or codes would flip.

    Raises:
      UserError: the folder is missing, incomplete or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    if any(folder.glob("*.safetensors")):
        return load_huggingface(folder, compute=compute, dtype=dtype)
    for name in ("config.json", "text_tokenizer.json", "params", "vqgan", "vqgan.json"):
        if not (folder / name).exists():
            raise UserError(f"{folder}: no {name}: not a complete model folder of ours; train one, or copy it again")
    config = load_json(ModelConfig, folder / "config.json")
    compute = compute or ComputeConfig(dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    decoder = abstract_model(config, jnp.dtype(dtype or compute.dtype))

    def placed(name: str, value: Any) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else sharding_for(mesh, logical_axes(name), value.shape)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    params = load_params(folder / "params", {name: placed(name, value) for name, value in flatten(decoder).items()})
    return XPrompt(unflatten(decoder, params), *load_tokenizers(folder), compute=compute)


def load_huggingface(folder: str | Path, *, num_xp_tokens: int = 64, compute: ComputeConfig | None = None, dtype=None) -> XPrompt:
    """Loads a folder of Hugging Face's format: config.json, *.safetensors, and tokenizer.json or text_tokenizer.json.

    Args:
      num_xp_tokens: S, for files that have no XP embeddings; they are drawn around the mean word embedding.
      dtype: of the decoder's weights; None takes the files'.

    Raises:
      UserError: the folder is incomplete or not a Chameleon, or lacks the VQGAN's decoder.
    """
    folder = Path(folder)
    config, tensors = huggingface.read_config(folder, num_xp_tokens=num_xp_tokens), huggingface.Tensors(folder)
    if huggingface.HF_XP in tensors:
        config = dataclasses.replace(config, num_xp_tokens=tensors[huggingface.HF_XP].shape[0])
    words = next((folder / n for n in ("text_tokenizer.json", "tokenizer.json") if (folder / n).exists()), folder / "text_tokenizer.json")
    tokenizer = Tokenizer.from_file(words)
    vqgan = jax.eval_shape(lambda: VQGAN(config.vq, jax.random.key(0)))
    vqgan = unflatten(vqgan, {n: jnp.asarray(v) for n, v in huggingface.load_vqgan(tensors, config.vq).items()})
    params = {n: jnp.asarray(v, dtype) for n, v in huggingface.load_decoder(tensors, config).items()}
    compute = compute or ComputeConfig(dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    return XPrompt(unflatten(abstract_model(config), params), vqgan, tokenizer, compute=compute)


def export_huggingface(model: XPrompt, folder: str | Path) -> None:
    """Writes a folder that Hugging Face's `ChameleonForConditionalGeneration` loads, with our tokenizer and XP rows in it."""
    words = model.tokenizer.words()
    huggingface.export(folder, model.config, flatten(model.decoder), flatten(model.vqgan), words)
    model.tokenizer.save(Path(folder) / "tokenizer.json")


def fingerprint(config: ModelConfig, params: Mapping[str, jax.Array], tokenizer: Tokenizer) -> str:
    """16 hex digits over the configuration, the tokenizer, the XP table and a slice of every weight, in bfloat16."""
    digest = hashlib.sha256(to_json(config).encode() + tokenizer.fingerprint.encode())
    for name in sorted(params):
        value = params[name] if name == "xp" else params[name].reshape(-1)[:256]
        digest.update(name.encode() + np.asarray(value.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:16]
