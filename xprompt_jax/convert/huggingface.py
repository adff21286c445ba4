"""Hugging Face folders: safetensors and config.json of `ChameleonForConditionalGeneration`.

Read: sharded with an index or in one file; QK-norms per head, per tensor-parallel rank or shared; Lumina-mGPT's and Anole's
folders, whose VQGAN lies under model.vqmodel with its decoder, or beside the weights as vqgan.ckpt. Hugging Face's own
conversion leaves the VQGAN's decoder out (facts: chameleon.md 2.4); then `--vqgan` names a file that has it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.config import ModelConfig, from_json
from xprompt_jax.convert.names import HF_VQGAN_PREFIX, HF_XP, LAYER, hf_decoder, load_conv, save_conv
from xprompt_jax.convert.safetensors import INDEX, Tensors, Writer
from xprompt_jax.convert.vqgan import VQGANFile
from xprompt_jax.convert.weights import VQGAN_PREFIX, Part, Read, checked, shapes_of
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path
from xprompt_jax.model.params import stacked
from xprompt_jax.tokens import Tokenizer

log = logging.getLogger(__name__)


def read_config(path: Path, *, num_xp_tokens: int) -> ModelConfig:
    """The architecture in HF's config.json.

    Raises:
      UserError: the file is missing or is no Chameleon's.
    """
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot read ({e}); give a folder in Hugging Face's format") from None
    c = _told(told, path)
    if c.get("model_type") != "chameleon":
        raise UserError(f"{path}: model_type is {c.get('model_type')!r}, not 'chameleon'")
    vq, rope, scaling = (_told(c.get(name, {}), path) for name in ("vq_config", "rope_parameters", "rope_scaling"))
    # What would change the numbers, and what no Chameleon has.
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings", "quantization_config"):
        if c.get(name):
            raise UserError(f"{path}: {name} is set; no Chameleon that can be read has it")
    kind, act = rope.get("rope_type", scaling.get("rope_type", scaling.get("type", "default"))), c.get("hidden_act", "silu")
    if kind != "default" or act != "silu":
        raise UserError(f"{path}: rotary positions of type {kind!r} and activation {act!r}; Chameleon's are 'default' and 'silu'")
    dim, heads = c.get("hidden_size", 4096), c.get("num_attention_heads", 32)
    head_dim = dim // heads if isinstance(dim, int) and isinstance(heads, int) and heads else 0
    # Through JSON, so that a value of a wrong type is one line.
    return from_json(ModelConfig, json.dumps({
        "vocab_size": c.get("vocab_size", 65536), "dim": dim, "num_layers": c.get("num_hidden_layers", 32),
        "num_heads": heads, "num_kv_heads": c.get("num_key_value_heads", heads),
        "head_dim": c.get("head_dim", head_dim), "ffn_dim": c.get("intermediate_size", 11008),
        "swin_norm": c.get("swin_norm", False), "norm_eps": c.get("rms_norm_eps", 1e-5),
        "rope_theta": rope.get("rope_theta", c.get("rope_theta", 10000.0)), "num_xp_tokens": num_xp_tokens,
        "layout": c.get("xprompt_layout", "plain"),
        "vq": {
            "channels": vq.get("base_channels", 128), "channel_multipliers": vq.get("channel_multiplier", [1, 1, 2, 2, 4]),
            "num_res_blocks": vq.get("num_res_blocks", 2), "latent_channels": vq.get("latent_channels", 256),
            "embed_dim": vq.get("embed_dim", 256), "num_codes": vq.get("num_embeddings", 8192), "image_size": vq.get("resolution", 512),
        },
    }), source=str(path))  # fmt: skip


def _told(value: Any, path: Path) -> dict[str, Any]:
    """What a JSON object says; null says nothing."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: {value!r:.60} stands where an object should; give a folder in Hugging Face's format")
    return {name: v for name, v in value.items() if v is not None}


def write_config(config: ModelConfig, vocab: Mapping[str, int], dtype: str) -> dict[str, Any]:
    """HF's config.json for a model of ours.

    Args:
      vocab: ids of bos, eos and pad, and of every word (HF needs the image words in the file).
      dtype: of the weights, by name.
    """
    vq = config.vq
    return {
        "architectures": ["ChameleonForConditionalGeneration"], "model_type": "chameleon", "vocab_size": config.vocab_size,
        "hidden_size": config.dim, "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "intermediate_size": config.ffn_dim,
        "swin_norm": config.swin_norm, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "hidden_act": "silu",
        "max_position_embeddings": 8192, "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": dtype,
        "bos_token_id": vocab["<s>"], "eos_token_id": vocab["</s>"], "pad_token_id": vocab["<pad>"],
        "vocabulary_map": {**dict(sorted(vocab.items(), key=lambda item: item[1])), "<image>": vocab.get("<reserved08707>", 0)},
        "xprompt_layout": config.layout,
        "vq_config": {
            "base_channels": vq.channels, "channel_multiplier": list(vq.channel_multipliers), "num_res_blocks": vq.num_res_blocks,
            "latent_channels": vq.latent_channels, "embed_dim": vq.embed_dim, "num_embeddings": vq.num_codes,
            "resolution": vq.image_size, "double_latent": False, "in_channels": 3, "attn_resolutions": [],
            "dropout": 0.0, "attn_type": "vanilla",
        },
    }  # fmt: skip


class HuggingFaceSource:
    """A folder in Hugging Face's format, as a `Source`."""

    kind = "huggingface"

    def __init__(self, folder: Path, *, num_xp_tokens: int, vqgan: Path | None = None, tokenizer: Path | None = None):
        self.folder, self._tensors = folder, Tensors(folder)
        config = read_config(folder / "config.json", num_xp_tokens=num_xp_tokens)
        self.has_xp = HF_XP in self._tensors
        if self.has_xp:
            config = dataclasses.replace(config, num_xp_tokens=self._tensors[HF_XP].shape[0])
        told = "xprompt_layout" in json.loads((folder / "config.json").read_text())
        whole = HF_VQGAN_PREFIX + "decoder.conv_in.weight" in self._tensors
        # Hugging Face's conversion of the released weights has the VQGAN's encoder inside, a Lumina-mGPT nothing of it.
        lumina = not any(name.startswith(HF_VQGAN_PREFIX) for name in self._tensors)
        self.draws = whole or lumina
        if lumina and not told:
            log.warning("%s: nothing of a VQGAN inside, so it is taken for a Lumina-mGPT: its image head is kept, images are framed its "
                        "way; otherwise give the layout plain and the image head zero", folder)  # fmt: skip
            config = dataclasses.replace(config, layout="lumina")
        self._vqgan = None if whole and vqgan is None else VQGANFile.find(folder, vqgan)
        self.config = config if self._vqgan is None else dataclasses.replace(config, vq=self._vqgan.config)
        self.tokenizer = tokenizer or next((folder / n for n in TOKENIZERS if (folder / n).exists()), folder / TOKENIZERS[0])
        self._entries = {entry.ours: entry for entry in hf_decoder(self.config)}
        self._shapes = shapes_of(self.config)

    def files(self) -> list[Path]:
        """All weight files."""
        return self._tensors.files + ([] if self._vqgan is None else [self._vqgan.path])

    def read(self, name: str) -> np.ndarray:
        """One tensor under our name."""
        if name.startswith(VQGAN_PREFIX):
            theirs = name.removeprefix(VQGAN_PREFIX)
            value = self._vqgan[theirs] if self._vqgan is not None else load_conv(self._tensors[HF_VQGAN_PREFIX + theirs])
        elif name == "xp":
            if not self.has_xp:
                raise KeyError(name)
            value = self._tensors[HF_XP]
        else:
            whole, layer = stacked(name)
            entry = self._entries[whole]
            theirs = entry.theirs.replace(LAYER, str(layer))
            value = self._tensors[theirs]
            try:
                value = entry.load(value)
            except ValueError:
                raise UserError(f"{self.folder}: {theirs} has shape {value.shape}, which does not fit config.json") from None
        return checked(name, value, self._shapes[name], self.folder)


TOKENIZERS = ("text_tokenizer.json", "tokenizer.json")


class HuggingFaceTarget:
    """A folder that `ChameleonForConditionalGeneration.from_pretrained` loads, in shards of 5 GiB; our XP rows ride along."""

    def __init__(self, folder: Path, config: ModelConfig, itemsize: Mapping[str, int], *, shard_bytes: int = 5 * 2**30):
        self.folder, self.config = folder, config
        self._entries = {entry.ours: entry for entry in hf_decoder(config)}
        shards: list[list[str]] = [[]]
        room = shard_bytes
        for name, shape in shapes_of(config).items():
            size = int(np.prod(shape)) * itemsize[name]
            if shards[-1] and size > room:
                shards.append([])
                room = shard_bytes
            shards[-1].append(name)
            room -= size
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        files = ["model.safetensors"] if len(shards) == 1 else files
        self._parts = [Part(file, tuple(names)) for file, names in zip(files, shards, strict=True)]

    def parts(self) -> Sequence[Part]:
        """The shards."""
        return self._parts

    def write(self, part: Part, read: Read) -> None:
        """One shard."""
        theirs = tuple(map(self._theirs, part.tensors))
        with atomic_path(self.folder / part.name) as temporary, Writer(temporary, theirs) as out:
            for name, their_name in zip(part.tensors, theirs, strict=True):
                out.write(their_name, self._save(name, read(name)))

    def finish(self, tokenizer: Path) -> None:
        """config.json, the index and tokenizer.json."""
        words = Tokenizer.from_file(tokenizer, limit=self.config.vocab_size)
        tensors = Tensors(self.folder)
        if len(self._parts) > 1:
            weight_map = {self._theirs(name): part.name for part in self._parts for name in part.tensors}
            size = sum(file.stat().st_size for file in tensors.files)
            (self.folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1))
        dtype = tensors["model.norm.weight"].dtype.name
        (self.folder / "config.json").write_text(json.dumps(write_config(self.config, words.words(), dtype), indent=2))
        words.save(self.folder / "tokenizer.json")

    def _theirs(self, name: str) -> str:
        if name.startswith(VQGAN_PREFIX):
            return HF_VQGAN_PREFIX + name.removeprefix(VQGAN_PREFIX)
        whole, layer = stacked(name)
        return HF_XP if name == "xp" else self._entries[whole].theirs.replace(LAYER, str(layer))

    def _save(self, name: str, value: np.ndarray) -> np.ndarray:
        if name.startswith(VQGAN_PREFIX):
            return save_conv(value)
        return value if name == "xp" else self._entries[stacked(name)[0]].save(value)
