"""Hugging Face folders <-> ours: safetensors and config.json of `ChameleonForConditionalGeneration`, tensor by tensor.

Files are read one tensor at a time and never unpickled. The VQGAN's decoder is in no file that Hugging Face's own
converter wrote (facts: chameleon.md 2.4); forks have it. A folder without it is refused with that reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import safetensors
import safetensors.numpy

from xprompt_jax.config import ModelConfig, VQConfig
from xprompt_jax.convert.names import HF_VQGAN_PREFIX, HF_XP, LAYER, hf_decoder, load_conv, save_conv
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path
from xprompt_jax.model.params import flatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.model.xp import init_xp

SHARD_BYTES = 5 * 2**30


class Tensors:
    """All safetensors of a folder as one read-only mapping that reads a tensor when it is asked for."""

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no *.safetensors files; give a folder with safetensors weights")
        index = folder / "model.safetensors.index.json"
        if index.exists():
            missing = set(json.loads(index.read_text())["weight_map"].values()) - {f.name for f in files}
            if missing:
                raise UserError(f"{folder}: {sorted(missing)[0]} is missing; download the folder again")
        self.folder = folder
        self._where: dict[str, Path] = {}
        for file in files:
            try:
                with safetensors.safe_open(file, "numpy") as f:
                    self._where |= dict.fromkeys(f.keys(), file)
            except (safetensors.SafetensorError, OSError) as e:
                raise UserError(f"{file}: not a readable safetensors file ({e}); download it again") from None

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> set[str]:
        """All names."""
        return set(self._where)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._where:
            raise UserError(f"{self.folder}: no tensor {name}; the weights and config.json do not belong together")
        with safetensors.safe_open(self._where[name], "numpy") as f:
            return f.get_tensor(name)


def read_config(folder: Path, *, num_xp_tokens: int = 64) -> ModelConfig:
    """The architecture in HF's config.json.

    Raises:
      UserError: the file is missing or is no Chameleon's.
    """
    path = folder / "config.json"
    try:
        c = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"{path}: cannot read ({e}); give a folder in Hugging Face's format") from None
    if c.get("model_type") != "chameleon":
        raise UserError(f"{path}: model_type is {c.get('model_type')!r}, not 'chameleon'")
    vq, heads = c.get("vq_config", {}), c.get("num_attention_heads", 32)
    rope = c.get("rope_parameters") or {}
    return ModelConfig(
        vocab_size=c.get("vocab_size", 65536), dim=c.get("hidden_size", 4096), num_layers=c.get("num_hidden_layers", 32),
        num_heads=heads, num_kv_heads=c.get("num_key_value_heads", heads),
        head_dim=c.get("head_dim") or c.get("hidden_size", 4096) // heads, ffn_dim=c.get("intermediate_size", 11008),
        swin_norm=c.get("swin_norm", False), norm_eps=c.get("rms_norm_eps", 1e-5),
        rope_theta=float(rope.get("rope_theta", c.get("rope_theta", 10000.0))), num_xp_tokens=num_xp_tokens,
        vq=VQConfig(
            channels=vq.get("base_channels", 128), channel_multipliers=tuple(vq.get("channel_multiplier", (1, 1, 2, 2, 4))),
            num_res_blocks=vq.get("num_res_blocks", 2), latent_channels=vq.get("latent_channels", 256),
            embed_dim=vq.get("embed_dim", 256), num_codes=vq.get("num_embeddings", 8192), image_size=vq.get("resolution", 512),
        ),
    )  # fmt: skip


def write_config(config: ModelConfig, vocab: Mapping[str, int]) -> dict[str, Any]:
    """HF's config.json for a model of ours.

    Args:
      vocab: ids of bos, eos and pad, and of every word (HF needs the image words in the file).
    """
    vq = config.vq
    return {
        "architectures": ["ChameleonForConditionalGeneration"], "model_type": "chameleon", "vocab_size": config.vocab_size,
        "hidden_size": config.dim, "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "intermediate_size": config.ffn_dim,
        "swin_norm": config.swin_norm, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "hidden_act": "silu",
        "max_position_embeddings": 8192, "attention_bias": False, "tie_word_embeddings": False,
        "bos_token_id": vocab["<s>"], "eos_token_id": vocab["</s>"], "pad_token_id": vocab["<pad>"],
        "vocabulary_map": {**dict(sorted(vocab.items(), key=lambda item: item[1])), "<image>": vocab.get("<reserved08707>", 0)},
        "vq_config": {
            "base_channels": vq.channels, "channel_multiplier": list(vq.channel_multipliers), "num_res_blocks": vq.num_res_blocks,
            "latent_channels": vq.latent_channels, "embed_dim": vq.embed_dim, "num_embeddings": vq.num_codes,
            "resolution": vq.image_size, "double_latent": False, "in_channels": 3, "attn_resolutions": [],
            "dropout": 0.0, "attn_type": "vanilla",
        },
    }  # fmt: skip


def load_decoder(tensors: Tensors, config: ModelConfig, *, seed: int = 0) -> dict[str, np.ndarray]:
    """The decoder's parameters under our names, in the files' type; XP rows are drawn if the files have none.

    Raises:
      UserError: a tensor is missing or of another shape.
    """
    params: dict[str, np.ndarray] = {}
    for entry in hf_decoder(config):
        if LAYER not in entry.theirs:
            params[entry.ours] = entry.load(tensors[entry.theirs])
            continue
        for layer in range(config.num_layers):
            value = _shaped(entry, tensors[entry.theirs.replace(LAYER, str(layer))])
            if layer == 0:
                params[entry.ours] = np.empty((config.num_layers, *value.shape), value.dtype)
            params[entry.ours][layer] = value
    if HF_XP in tensors:
        params["xp"] = tensors[HF_XP]
    else:
        embed = jnp.asarray(params["embed"][: min(65536, config.vocab_size)], jnp.float32)
        params["xp"] = np.asarray(init_xp(jax.random.key(seed), embed, config.num_xp_tokens)).astype(params["embed"].dtype)
    return params


def _shaped(entry, value: np.ndarray) -> np.ndarray:
    try:
        return entry.load(value)
    except ValueError as e:
        raise UserError(f"{entry.theirs}: shape {value.shape} does not fit config.json ({e})") from None


def load_vqgan(tensors: Tensors, config: VQConfig) -> dict[str, np.ndarray]:
    """The VQGAN's parameters under our names, float32.

    Raises:
      UserError: there is no pixel decoder in the files, or a tensor is missing.
    """
    names = flatten(jax.eval_shape(lambda: VQGAN(config, jax.random.key(0))))
    if HF_VQGAN_PREFIX + "decoder.conv_in.weight" not in tensors:
        raise UserError(f"{tensors.folder}: no VQGAN decoder (Hugging Face's own conversion leaves it out): images cannot be drawn; "
                        "use a folder that has model.vqmodel.decoder.*")  # fmt: skip
    return {n: load_conv(tensors[HF_VQGAN_PREFIX + n]).astype(np.float32) for n in names}


def export(folder: str | Path, config: ModelConfig, decoder: Mapping[str, Any], vqgan: Mapping[str, Any], vocab: Mapping[str, int]) -> None:
    """Writes a folder that `ChameleonForConditionalGeneration.from_pretrained` loads, in shards of 5 GiB, whole or not at all."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        shards: list[dict[str, np.ndarray]] = [{}]
        for name, value in _their_tensors(config, decoder, vqgan):
            if shards[-1] and sum(v.nbytes for v in shards[-1].values()) + value.nbytes > SHARD_BYTES:
                shards.append({})
            shards[-1][name] = value
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        names = ["model.safetensors"] if len(shards) == 1 else names
        for name, shard in zip(names, shards, strict=True):
            safetensors.numpy.save_file(shard, temporary / name, metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            size = sum(v.nbytes for shard in shards for v in shard.values())
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index))
        (temporary / "config.json").write_text(json.dumps(write_config(config, vocab), indent=2))


def _their_tensors(config: ModelConfig, decoder, vqgan) -> Iterator[tuple[str, np.ndarray]]:
    for entry in hf_decoder(config):
        value = np.asarray(decoder[entry.ours])
        if LAYER in entry.theirs:
            for layer in range(config.num_layers):
                yield entry.theirs.replace(LAYER, str(layer)), np.ascontiguousarray(entry.save(value[layer]))
        else:
            yield entry.theirs, np.ascontiguousarray(entry.save(value))
    yield HF_XP, np.asarray(decoder["xp"])
    for name, value in vqgan.items():
        yield HF_VQGAN_PREFIX + name, save_conv(np.asarray(value))
