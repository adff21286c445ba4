"""Other people's names for our parameters, as tables. Nothing else in the project knows them.

Ours is [in, out] with heads apart; theirs is [out, in]. Ours and Hugging Face's rotate halves: dimension i of a head pairs
with i + K/2. Meta's rotates neighbours: 2i pairs with 2i + 1. So the rows of wq and wk, and the QK-norms' scale *and* bias,
change places on the way from Meta (facts: chameleon.md 1.4). Every entry can be undone to the last bit.

    ours, one layer              Hugging Face               Meta, all ranks joined
    wq [D, H, K]                 [H K, D]                   [H K, D], rows of a head interleaved
    q_norm [H, K]                [H, K], older [ranks, K]   [ranks, K], interleaved; rank r holds heads r H/ranks ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from xprompt_jax.config import ModelConfig
from xprompt_jax.errors import UserError

LAYER = "{layer}"
"""Stands for the layer's number in a name of theirs; such an entry is one slice of a stacked parameter of ours."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: ours, theirs, and the way there and back for one layer's tensor."""

    ours: str
    theirs: str
    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]
    join: int | Literal["same", "stack"] = "same"
    """How Meta's tensor-parallel ranks make one tensor: an axis to join, copies of one, or a row each."""


def transpose(x: np.ndarray) -> np.ndarray:
    """x.T as a contiguous array, a strip at a time (numpy's own way misses the cache at every element)."""
    out = np.empty(x.shape[::-1], x.dtype)
    for i in range(0, len(x), 64):
        out[:, i : i + 64] = x[i : i + 64].T
    return out


def hf_decoder(c: ModelConfig) -> list[Entry]:
    """Hugging Face `ChameleonForConditionalGeneration` (facts: chameleon.md 1.5)."""
    d, h, g, k = c.dim, c.num_heads, c.num_kv_heads, c.head_dim
    same = lambda x: x

    def split_out(heads: int) -> tuple[Callable, Callable]:
        """[heads K, D] <-> [D, heads, K]."""
        return (
            lambda w: transpose(w).reshape(d, heads, k),
            lambda w: transpose(w.reshape(d, heads * k)),
        )

    def per_head(heads: int) -> Callable:
        """Older files share one vector between the heads of a tensor-parallel rank: (K,), (1, K), (ranks, K)."""

        def load(x: np.ndarray) -> np.ndarray:
            x = x.reshape(-1, k)
            if heads % len(x):
                raise UserError(f"a QK-norm of shape {x.shape} does not fit {heads} heads")
            return np.repeat(x, heads // len(x), axis=0)

        return load

    block = "model.layers." + LAYER + "."
    attention = block + "self_attn."
    return [
        Entry("embed", "model.embed_tokens.weight", same, same),
        Entry("head", "lm_head.weight", transpose, transpose),
        Entry("norm", "model.norm.weight", same, same),
        Entry("blocks.attention_norm", block + "input_layernorm.weight", same, same),
        Entry("blocks.mlp_norm", block + "post_attention_layernorm.weight", same, same),
        Entry("blocks.attention.wq", attention + "q_proj.weight", *split_out(h)),
        Entry("blocks.attention.wk", attention + "k_proj.weight", *split_out(g)),
        Entry("blocks.attention.wv", attention + "v_proj.weight", *split_out(g)),
        Entry(
            "blocks.attention.wo",
            attention + "o_proj.weight",
            lambda w: transpose(w).reshape(h, k, d),
            lambda w: transpose(w.reshape(h * k, d)),
        ),
        Entry("blocks.attention.q_norm.scale", attention + "q_norm.weight", per_head(h), same),
        Entry("blocks.attention.q_norm.bias", attention + "q_norm.bias", per_head(h), same),
        Entry("blocks.attention.k_norm.scale", attention + "k_norm.weight", per_head(g), same),
        Entry("blocks.attention.k_norm.bias", attention + "k_norm.bias", per_head(g), same),
        Entry("blocks.mlp.gate", block + "mlp.gate_proj.weight", transpose, transpose),
        Entry("blocks.mlp.up", block + "mlp.up_proj.weight", transpose, transpose),
        Entry("blocks.mlp.down", block + "mlp.down_proj.weight", transpose, transpose),
    ]


def meta_decoder(c: ModelConfig, ranks: int) -> list[Entry]:
    """Meta's `consolidated.pth` (facts: chameleon.md 1.5), in terms of Hugging Face's.

    Args:
      ranks: tensor-parallel ranks of the files; the QK-norms have one vector each.
    """
    h, g, k = c.num_heads, c.num_kv_heads, c.head_dim
    block = "layers." + LAYER + "."
    attention, mlp = block + "attention.", block + "feed_forward."
    theirs: dict[str, tuple[str, int | Literal["same", "stack"]]] = {
        "embed": ("tok_embeddings.weight", 1), "head": ("output.weight", 0), "norm": ("norm.weight", "same"),
        "blocks.attention_norm": (block + "attention_norm.weight", "same"), "blocks.mlp_norm": (block + "ffn_norm.weight", "same"),
        "blocks.attention.wq": (attention + "wq.weight", 0), "blocks.attention.wk": (attention + "wk.weight", 0),
        "blocks.attention.wv": (attention + "wv.weight", 0), "blocks.attention.wo": (attention + "wo.weight", 1),
        "blocks.attention.q_norm.scale": (attention + "q_normalization.weight", "stack"),
        "blocks.attention.q_norm.bias": (attention + "q_normalization.bias", "stack"),
        "blocks.attention.k_norm.scale": (attention + "k_normalization.weight", "stack"),
        "blocks.attention.k_norm.bias": (attention + "k_normalization.bias", "stack"),
        "blocks.mlp.gate": (mlp + "w1.weight", 0), "blocks.mlp.up": (mlp + "w3.weight", 0), "blocks.mlp.down": (mlp + "w2.weight", 1),
    }  # fmt: skip
    halves = np.concatenate([np.arange(0, k, 2), np.arange(1, k, 2)])  # where Meta keeps each of our dimensions
    neighbours = np.argsort(halves)

    def rotary(entry: Entry, heads: int) -> Entry:
        def permute(x: np.ndarray, order: np.ndarray) -> np.ndarray:
            return np.take(x.reshape(-1, k, x.shape[-1]), order, axis=1).reshape(x.shape)

        return dataclasses.replace(
            entry, load=lambda w: entry.load(permute(w, halves)), save=lambda w: permute(entry.save(w), neighbours)
        )  # fmt: skip

    def per_rank(entry: Entry, heads: int) -> Entry:
        def save(x: np.ndarray) -> np.ndarray:
            x = np.take(entry.save(x), neighbours, axis=1)
            first = np.ascontiguousarray(x[:: heads // ranks])
            if heads % ranks or not np.array_equal(np.repeat(first, heads // ranks, axis=0).view(np.uint8), x.view(np.uint8)):
                raise UserError(f"{entry.ours}: the heads of a rank do not share one vector; Meta's layout of {ranks} file(s) cannot hold "
                                "it (QK-norms have been trained apart); export to huggingface")  # fmt: skip
            return first

        return dataclasses.replace(entry, load=lambda x: entry.load(np.take(x, halves, axis=1)), save=save)

    special = {
        "blocks.attention.wq": (rotary, h), "blocks.attention.wk": (rotary, g),
        "blocks.attention.q_norm.scale": (per_rank, h), "blocks.attention.q_norm.bias": (per_rank, h),
        "blocks.attention.k_norm.scale": (per_rank, g), "blocks.attention.k_norm.bias": (per_rank, g),
    }  # fmt: skip
    entries = []
    for entry in hf_decoder(c):
        change, heads = special.get(entry.ours, (lambda e, _: e, 0))
        name, join = theirs[entry.ours]
        entries.append(dataclasses.replace(change(entry, heads), theirs=name, join=join))
    return entries


HF_VQGAN_PREFIX = "model.vqmodel."
"""Stands before the VQGAN's names, which are Meta's and ours."""
HF_XP = "xprompt.xp_embeddings"
"""Our own tensor in exported files; HF's loader reports it as unexpected and goes on."""


def load_conv(value: np.ndarray) -> np.ndarray:
    """[out, in, height, width] -> [height, width, in, out]; other tensors as they are."""
    return np.ascontiguousarray(value.transpose(2, 3, 1, 0)) if value.ndim == 4 else value


def save_conv(value: np.ndarray) -> np.ndarray:
    """The way back."""
    return np.ascontiguousarray(value.transpose(3, 2, 0, 1)) if value.ndim == 4 else value
