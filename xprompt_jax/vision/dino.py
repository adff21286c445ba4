"""DINO ViT-S/16: images as unit vectors that say what stands where (Caron et al. 2021). Its cosine is a score of image editing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xprompt_jax.errors import UserError
from xprompt_jax.vision.files import Params, Weights, build, fingerprint, heads_of, read_config, shapes_of, side_of
from xprompt_jax.vision.hub import locate
from xprompt_jax.vision.preprocess import dino_pixels
from xprompt_jax.vision.vit import ImageConfig, ImageTower, TransformerConfig, in_batches, unit

IMAGES_AT_ONCE = 32

_HF = {
    "norm1": "layernorm_before", "query": "attention.attention.query", "key": "attention.attention.key",
    "value": "attention.attention.value", "out": "attention.output.dense", "norm2": "layernorm_after",
    "fc1": "intermediate.dense", "fc2": "output.dense",
}  # fmt: skip
_META = {"norm1": "norm1", "qkv": "attn.qkv", "out": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}

_features = jax.jit(lambda tower, pixels: tower(pixels))


class DINO:
    """The tower and its preprocessing."""

    def __init__(self, tower: ImageTower):
        self.tower, self.dim = tower, tower.config.blocks.dim

    @classmethod
    def load(cls, place: str | Path) -> DINO:
        """Reads a folder of Hugging Face, org/name on the hub (facebook/dino-vits16), or Meta's file (dino_deitsmall16_pretrain.pth).

        Raises:
          UserError: a file is missing, damaged, or of another model.
        """
        place = locate(place)
        weights = Weights(place)
        with shapes_of(place):
            if "embeddings.cls_token" in weights:
                params, patch = _from_huggingface(weights)
                config = read_config((place if place.is_dir() else place.parent) / "config.json")
                eps = config.get("layer_norm_eps", 1e-12)  # of transformers' ViT
            elif "cls_token" in weights:
                (params, patch), config, eps = _from_meta(weights), {}, 1e-6
            else:
                raise UserError(f"{place}: its weights are not DINO's; give facebook/dino-vits16 or dino_deitsmall16_pretrain.pth")
            n, dim, ffn = params["blocks.fc1.kernel"].shape
            blocks = TransformerConfig(dim, n, heads_of(dim, config.get("num_attention_heads"), place), ffn, eps, "gelu")
            size = side_of(len(params["positions"]), patch, place)
        tower = ImageConfig(blocks, size, patch, patch_bias=True, pre_norm=False)
        return cls(build(lambda: ImageTower(tower), params, place))

    @functools.cached_property
    def name(self) -> str:
        """Equal for equal weights, whatever file they came from."""
        return f"dino-{self.dim}-{fingerprint(self.tower)}"

    def images(self, images: Sequence[Any]) -> np.ndarray:
        """Whatever `images.open_image` takes -> float32 [n, dim], rows of length 1.

        Raises:
          UserError: not a readable image.
        """
        size = self.tower.config.image_size
        parts = [images[i : i + IMAGES_AT_ONCE] for i in range(0, len(images), IMAGES_AT_ONCE)]
        encode = functools.partial(_features, self.tower)
        done = [unit(in_batches(encode, np.stack([dino_pixels(image, size) for image in part]))) for part in parts]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *done])


def _from_huggingface(w: Weights) -> tuple[Params, int]:
    patches, size = w.patches("embeddings.patch_embeddings.projection.weight")
    return {
        "patches.kernel": patches, "patches.bias": w["embeddings.patch_embeddings.projection.bias"],
        "class_token": w["embeddings.cls_token"].reshape(-1), "positions": w["embeddings.position_embeddings"][0],
        **w.blocks("encoder.layer.", _HF), **w.norm("layernorm", "norm"),
    }, size  # fmt: skip


def _from_meta(w: Weights) -> tuple[Params, int]:
    patches, size = w.patches("patch_embed.proj.weight")
    return {
        "patches.kernel": patches, "patches.bias": w["patch_embed.proj.bias"],
        "class_token": w["cls_token"].reshape(-1), "positions": w["pos_embed"][0],
        **w.blocks("blocks.", _META), **w.norm("norm", "norm"),
    }, size  # fmt: skip
