"""CLIP: texts and images as unit vectors of one space (Radford et al. 2021), from files of OpenAI's ViT-B/32 and its kin.

    clip = CLIP.load("clip-vit-base-patch32")     a folder with weights and tokenizer
    clip(["remove the rain"])                     float32 [1, 512], rows of length 1
    clip.images([image, "b.png"])                 float32 [2, 512]

Retrieval and the editing scores of the paper use B/32. A text is pooled at its end token, an image at its class token.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xprompt_jax.errors import UserError
from xprompt_jax.vision.files import Params, Weights, build, fingerprint, heads_of, read_config, shapes_of, side_of
from xprompt_jax.vision.hub import locate
from xprompt_jax.vision.preprocess import clip_pixels
from xprompt_jax.vision.tokenizer import ClipTokenizer
from xprompt_jax.vision.vit import Activation, Blocks, ImageConfig, ImageTower, LayerNorm, Linear, TransformerConfig, in_batches, unit

LENGTHS = (16, 32)
"""Texts are padded to these lengths, or to the longest there is: attention is causal, so features do not change."""
IMAGES_AT_ONCE = 32

_HF = {
    "norm1": "layer_norm1", "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
    "out": "self_attn.out_proj", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
}  # fmt: skip
_OPEN_CLIP = {"norm1": "ln_1", "qkv": "attn.in_proj", "out": "attn.out_proj", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}


class TextTower(nnx.Module):
    """Token ids to one vector.

    Args:
      c: of the blocks.
      vocab_size: V.
      context: most tokens.
      out: dimensions of the space of texts and images.
    """

    def __init__(self, c: TransformerConfig, vocab_size: int, context: int, out: int):
        self.tokens, self.positions = nnx.Param(jnp.zeros((vocab_size, c.dim))), nnx.Param(jnp.zeros((context, c.dim)))
        self.blocks, self.norm, self.projection = Blocks(c), LayerNorm(c.dim, eps=c.eps), Linear(c.dim, out, bias=False)

    def __call__(self, ids: jax.Array, ends: jax.Array) -> jax.Array:
        """Ids int [B, L] and places of the end tokens int [B] -> [B, out], of any length."""
        x = self.blocks(self.tokens[...][ids] + self.positions[...][: ids.shape[1]])
        return self.projection(self.norm(jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]))


class ProjectedImageTower(nnx.Module):
    """An image tower and its way into the space of texts and images."""

    def __init__(self, c: ImageConfig, out: int):
        self.tower, self.projection = ImageTower(c), Linear(c.blocks.dim, out, bias=False)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B, S, S, 3] -> [B, out], of any length."""
        return self.projection(self.tower(pixels))


_text_features = jax.jit(lambda tower, ids, ends: tower(ids, ends))
_image_features = jax.jit(lambda tower, pixels: tower(pixels))


class CLIP:
    """Both towers, the tokenizer and the preprocessing; an `Encoder` of texts for retrieval."""

    def __init__(self, text: TextTower, image: ProjectedImageTower, tokenizer: ClipTokenizer):
        self.text, self.image, self.tokenizer = text, image, tokenizer
        self.dim = text.projection.kernel.shape[-1]

    @classmethod
    def load(cls, folder: str | Path) -> CLIP:
        """Reads a folder with weights (files.py), tokenizer files and config.json or open_clip_config.json; or org/name on the hub.

        Sizes come from the tensors; the number of heads, the activation and the norms' epsilon from the configuration, else as
        OpenAI's.

        Raises:
          UserError: a file is missing, damaged, or of another model.
        """
        folder = locate(folder)
        if folder.is_file():
            raise UserError(f"{folder}: a file; give the folder it lies in, with the tokenizer's files")
        weights = Weights(folder)
        with shapes_of(folder):
            if "text_model.embeddings.token_embedding.weight" in weights:
                params, patch = _from_huggingface(weights)
                config = read_config(folder / "config.json")
            elif "token_embedding.weight" in weights:
                params, patch = _from_open_clip(weights)
                config = _as_huggingface(read_config(folder / "open_clip_config.json"))
            else:
                raise UserError(f"{folder}: its weights are not CLIP's; give openai/clip-vit-base-patch32 or a model like it")
            text, image = (_part(params, side) for side in ("text.", "image."))
            blocks = _blocks(text, config.get("text_config"), folder, causal=True)
            vocab_size, context, out = len(text["tokens"]), len(text["positions"]), text["projection.kernel"].shape[-1]
            tower = ImageConfig(
                _blocks(_part(image, "tower."), config.get("vision_config"), folder),
                side_of(len(image["tower.positions"]), patch, folder), patch, patch_bias=False, pre_norm=True,
            )  # fmt: skip
        tokenizer = ClipTokenizer(folder, context)
        if tokenizer.vocab_size > vocab_size:
            raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; give the model's own")
        return cls(
            build(lambda: TextTower(blocks, vocab_size, context, out), text, folder),
            build(lambda: ProjectedImageTower(tower, out), image, folder), tokenizer,
        )  # fmt: skip

    @functools.cached_property
    def name(self) -> str:
        """Equal for equal weights, whatever file they came from."""
        return f"clip-{self.dim}-{fingerprint(self.text, self.image)}"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim], rows of length 1."""
        tokens = self.tokenizer(texts)
        out = np.zeros((len(tokens), self.dim), np.float32)
        lengths = [n for n in LENGTHS if n < len(self.text.positions[...])] + [len(self.text.positions[...])]
        fits = np.array([next(n for n in lengths if n >= len(row)) for row in tokens], int)
        for length in np.unique(fits):
            (rows,) = np.nonzero(fits == length)
            ids = np.stack([np.pad(tokens[i], (0, length - len(tokens[i])), constant_values=self.tokenizer.end) for i in rows])
            # A text may spell the end token: the first one counts, as in OpenAI's code.
            ends = np.argmax(ids == self.tokenizer.end, axis=1)
            out[rows] = unit(in_batches(functools.partial(_text_features, self.text), ids, ends))
        return out

    def images(self, images: Sequence[Any]) -> np.ndarray:
        """Whatever `images.open_image` takes -> float32 [n, dim], rows of length 1.

        Raises:
          UserError: not a readable image.
        """
        size = self.image.tower.config.image_size
        parts = [images[i : i + IMAGES_AT_ONCE] for i in range(0, len(images), IMAGES_AT_ONCE)]
        encode = functools.partial(_image_features, self.image)
        done = [unit(in_batches(encode, np.stack([clip_pixels(image, size) for image in part]))) for part in parts]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *done])


def _part(params: Mapping[str, np.ndarray], prefix: str) -> Params:
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def _blocks(params: Mapping[str, np.ndarray], config: Mapping[str, Any] | None, place: Path, causal: bool = False) -> TransformerConfig:
    """Sizes from the tensors, the rest from a part of config.json."""
    n, dim, ffn = params["blocks.fc1.kernel"].shape
    config = config or {}
    activation: Activation = config.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(f"{place}: activation {activation!r} is not known here; CLIP's are quick_gelu and gelu")
    heads = heads_of(dim, config.get("num_attention_heads"), place)
    return TransformerConfig(dim, n, heads, ffn, config.get("layer_norm_eps", 1e-5), activation, causal)


def _from_huggingface(w: Weights) -> tuple[Params, int]:
    text, image = "text_model.", "vision_model."
    patches, size = w.patches(f"{image}embeddings.patch_embedding.weight")
    return {
        "text.tokens": w[f"{text}embeddings.token_embedding.weight"],
        "text.positions": w[f"{text}embeddings.position_embedding.weight"],
        **w.blocks(f"{text}encoder.layers.", _HF, "text.blocks"),
        **w.norm(f"{text}final_layer_norm", "text.norm"),
        "text.projection.kernel": w.kernel("text_projection.weight"),
        "image.tower.patches.kernel": patches,
        "image.tower.class_token": w[f"{image}embeddings.class_embedding"],
        "image.tower.positions": w[f"{image}embeddings.position_embedding.weight"],
        **w.norm(f"{image}pre_layrnorm", "image.tower.pre_norm"),  # their spelling
        **w.blocks(f"{image}encoder.layers.", _HF, "image.tower.blocks"),
        **w.norm(f"{image}post_layernorm", "image.tower.norm"),
        "image.projection.kernel": w.kernel("visual_projection.weight"),
    }, size


def _from_open_clip(w: Weights) -> tuple[Params, int]:
    patches, size = w.patches("visual.conv1.weight")
    return {
        "text.tokens": w["token_embedding.weight"],
        "text.positions": w["positional_embedding"],
        **w.blocks("transformer.resblocks.", _OPEN_CLIP, "text.blocks"),
        **w.norm("ln_final", "text.norm"),
        "text.projection.kernel": w["text_projection"],  # [in, out] already
        "image.tower.patches.kernel": patches,
        "image.tower.class_token": w["visual.class_embedding"],
        "image.tower.positions": w["visual.positional_embedding"],
        **w.norm("visual.ln_pre", "image.tower.pre_norm"),
        **w.blocks("visual.transformer.resblocks.", _OPEN_CLIP, "image.tower.blocks"),
        **w.norm("visual.ln_post", "image.tower.norm"),
        "image.projection.kernel": w["visual.proj"],
    }, size


def _as_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip_config.json in the words of config.json; without one, the weights are taken for OpenAI's."""
    model = config.get("model_cfg", {})
    activation = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu"} if model else {}
    text, image = model.get("text_cfg", {}), model.get("vision_cfg", {})
    per_head = image.get("head_width", 64)
    return {
        "text_config": activation | ({"num_attention_heads": text["heads"]} if "heads" in text else {}),
        "vision_config": activation | ({"num_attention_heads": image["width"] // per_head} if "width" in image else {}),
    }
