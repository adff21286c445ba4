"""Other people's names for our parameters, as tables. Nothing else in the project knows them.

Ours is [in, out] with heads apart and layers stacked; theirs is [out, in], one tensor a layer. Both rotate halves
(HF's convention), so no rotary permutation is needed here. Every entry can be undone exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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


def hf_decoder(c: ModelConfig) -> list[Entry]:
    """Hugging Face `ChameleonForConditionalGeneration` (facts: chameleon.md 1.5)."""
    d, h, g, k = c.dim, c.num_heads, c.num_kv_heads, c.head_dim
    same = lambda x: x
    transpose = lambda x: np.ascontiguousarray(x.T)

    def split_out(heads: int) -> tuple[Callable, Callable]:
        """[heads K, D] <-> [D, heads, K]."""
        return (
            lambda w: np.ascontiguousarray(w.T).reshape(d, heads, k),
            lambda w: np.ascontiguousarray(w.reshape(d, heads * k).T),
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
            lambda w: np.ascontiguousarray(w.T).reshape(h, k, d),
            lambda w: np.ascontiguousarray(w.reshape(h * k, d).T),
        ),
        Entry("blocks.attention.q_norm.scale", attention + "q_norm.weight", per_head(h), same),
        Entry("blocks.attention.q_norm.bias", attention + "q_norm.bias", per_head(h), same),
        Entry("blocks.attention.k_norm.scale", attention + "k_norm.weight", per_head(g), same),
        Entry("blocks.attention.k_norm.bias", attention + "k_norm.bias", per_head(g), same),
        Entry("blocks.mlp.gate", block + "mlp.gate_proj.weight", transpose, transpose),
        Entry("blocks.mlp.up", block + "mlp.up_proj.weight", transpose, transpose),
        Entry("blocks.mlp.down", block + "mlp.down_proj.weight", transpose, transpose),
    ]


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
