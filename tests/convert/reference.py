"""Chameleon in numpy float64, in Meta's own layout and conventions, written from the fact sheet and from nothing of ours.

Tensors [out, in] under Meta's names, rotary pairs of neighbours (2i, 2i + 1), one QK-norm vector for the heads of a rank.
"""

from __future__ import annotations

import numpy as np


def random_checkpoint(rng, *, dim, layers, heads, kv_heads, ffn, vocab, ranks, dtype=np.float32) -> list[dict[str, np.ndarray]]:
    """One dictionary for each tensor-parallel rank, as consolidated.NN.pth holds them; norms and biases are random too."""
    k = dim // heads
    out: list[dict[str, np.ndarray]] = [{} for _ in range(ranks)]

    def split(name, shape, axis, scale):
        whole = (scale * rng.standard_normal(shape)).astype(dtype)
        for rank, piece in enumerate(np.split(whole, ranks, axis=axis)):
            out[rank][name] = np.ascontiguousarray(piece)

    def same(name, size):
        value = (1 + 0.3 * rng.standard_normal(size)).astype(dtype)
        for rank in out:
            rank[name] = value

    split("tok_embeddings.weight", (vocab, dim), 1, 1.0)
    split("output.weight", (vocab, dim), 0, dim**-0.5)
    same("norm.weight", dim)
    for i in range(layers):
        p = f"layers.{i}."
        split(p + "attention.wq.weight", (heads * k, dim), 0, dim**-0.5)
        split(p + "attention.wk.weight", (kv_heads * k, dim), 0, dim**-0.5)
        split(p + "attention.wv.weight", (kv_heads * k, dim), 0, dim**-0.5)
        split(p + "attention.wo.weight", (dim, heads * k), 1, dim**-0.5)
        split(p + "feed_forward.w1.weight", (ffn, dim), 0, dim**-0.5)
        split(p + "feed_forward.w3.weight", (ffn, dim), 0, dim**-0.5)
        split(p + "feed_forward.w2.weight", (dim, ffn), 1, ffn**-0.5)
        same(p + "attention_norm.weight", dim)
        same(p + "ffn_norm.weight", dim)
        for rank in out:
            for side in ("q", "k"):
                rank[f"{p}attention.{side}_normalization.weight"] = (1 + 0.5 * rng.standard_normal(k)).astype(dtype)
                rank[f"{p}attention.{side}_normalization.bias"] = (0.5 * rng.standard_normal(k)).astype(dtype)
    for rank in out:
        rank["rope.freqs"] = (10000.0 ** (-np.arange(0, k, 2) / k)).astype(np.float32)  # in Meta's files; nobody needs it
    return out


def logits(ranks, x, mask, positions, *, heads, kv_heads, layers, swin, eps=1e-5, theta=10000.0) -> np.ndarray:
    """Next-token logits, float64 [L, V].

    Args:
      ranks: as `random_checkpoint` makes them.
      x: embedded tokens [L, D].
      mask: bool [L, L], True where the query (row) sees the key.
      positions: int [L].
    """
    get = lambda name: [r[name].astype(np.float64) for r in ranks]
    join = lambda name, axis: np.concatenate(get(name), axis)

    def rms(v, name):
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + eps) * get(name)[0]

    def head_norm(v, name):
        """[L, heads, K]: rank r normalises its own share of the heads with its own vectors."""
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5)
        share = v.shape[1] // len(ranks)
        weight, bias = get(name + ".weight"), get(name + ".bias")
        return np.concatenate([v[:, r * share : (r + 1) * share] * weight[r] + bias[r] for r in range(len(ranks))], axis=1)

    def rotate(v):
        """[L, heads, K] as complex numbers of neighbouring entries."""
        k = v.shape[-1]
        angle = positions[:, None] * theta ** (-np.arange(0, k, 2) / k)
        turned = (v[..., 0::2] + 1j * v[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(v.shape)

    x = x.astype(np.float64)
    for i in range(layers):
        p = f"layers.{i}."
        h = x if swin else rms(x, p + "attention_norm.weight")
        q, k, v = (h @ join(f"{p}attention.w{n}.weight", 0).T for n in "qkv")
        q, k, v = q.reshape(len(x), heads, -1), k.reshape(len(x), kv_heads, -1), v.reshape(len(x), kv_heads, -1)
        q, k = rotate(head_norm(q, p + "attention.q_normalization")), rotate(head_norm(k, p + "attention.k_normalization"))
        k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
        scores = np.einsum("qhk,lhk->hql", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(mask, scores, -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        h = np.einsum("hql,lhk->qhk", weights, v).reshape(len(x), -1) @ join(p + "attention.wo.weight", 1).T
        x = x + (rms(h, p + "attention_norm.weight") if swin else h)
        h = x if swin else rms(x, p + "ffn_norm.weight")
        gate, up = h @ join(p + "feed_forward.w1.weight", 0).T, h @ join(p + "feed_forward.w3.weight", 0).T
        h = (gate / (1 + np.exp(-gate)) * up) @ join(p + "feed_forward.w2.weight", 1).T
        x = x + (rms(h, p + "ffn_norm.weight") if swin else h)
    return rms(x, "norm.weight") @ join("output.weight", 0).T
