"""Meta's format: the same numbers as Meta's own conventions give, the same bits back, and lines that say what is wrong."""

import dataclasses
import hashlib
import json
import logging

import jax
import numpy as np
import pytest

from tests.convert.folders import meta_folder
from tests.convert.reference import logits as reference_logits
from tests.helpers import FP32, TINY, column, random_rows, segments, tiny_tokenizer
from xprompt_jax.config import PRESETS
from xprompt_jax.convert.adapt import Adaptation, Adapted
from xprompt_jax.convert.convert import Options, convert
from xprompt_jax.convert.formats import open_source
from xprompt_jax.convert.meta import wrong_checksums
from xprompt_jax.convert.names import LAYER, meta_decoder
from xprompt_jax.convert.torchfile import TorchFile
from xprompt_jax.convert.torchwriter import TorchWriter
from xprompt_jax.convert.verify import verify
from xprompt_jax.convert.weights import load_decoder, shapes_of
from xprompt_jax.errors import UserError
from xprompt_jax.model.attention import dense_mask
from xprompt_jax.model.chameleon import Chameleon
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.model.xp import place_by_role
from xprompt_jax.prompt import SlotShape
from xprompt_jax.sample.sampler import XPrompt


def draw_architecture(rng):
    ranks = int(rng.choice([1, 1, 2, 4]))
    kv = ranks * int(rng.choice([1, 2]))
    heads = kv * int(rng.choice([1, 2, 4]))
    k = 2 * int(rng.integers(1, 7))
    return {
        "ranks": ranks, "kv_heads": kv, "heads": heads, "dim": heads * k, "layers": int(rng.integers(1, 4)),
        "ffn": 4 * int(rng.integers(3, 20)), "vocab": 4 * int(rng.integers(105, 130)), "swin": bool(rng.integers(2)),
    }  # fmt: skip


# The 30B with its ratios (64 heads, 8 of keys, 4 ranks, swin-norm, F / D), 32 times narrower.
SMALL_30B = {"ranks": 4, "kv_heads": 8, "heads": 64, "dim": 256, "layers": 2, "ffn": 688, "vocab": 448, "swin": True}


@pytest.mark.parametrize("seed", range(21))
def test_logits_are_those_of_metas_conventions(tmp_path, seed):
    """Random architectures and ranks; the XP mask with overlaid positions, plain causal, and random positions."""
    rng = np.random.default_rng(seed)
    a = draw_architecture(rng) if seed < 20 else SMALL_30B
    checkpoint = meta_folder(tmp_path, rng, **a)
    source = Adapted(open_source(tmp_path / "models" / "tiny", num_xp_tokens=3), Adaptation(image_head="keep"))
    decoder = load_decoder(source, dtype=np.float32)

    @jax.jit
    def run(decoder, embed, xp, ids, roles, groups, positions, real):
        """Our logits; the mask and the embeddings for the reference."""
        ours = decoder.logits(ids, roles, groups, positions, real, FP32)
        return ours, dense_mask(roles, groups, real), place_by_role(embed[ids], xp, roles, groups, real)

    rows = random_rows(seed, SlotShape(2, 6, 3, 8), 1)
    ids, roles, groups, positions = (np.asarray(column(rows, n)) for n in ("ids", "roles", "groups", "positions"))
    real = np.asarray(segments(rows))
    causal = np.full_like(roles, 3), np.zeros_like(groups)
    cases = [
        (roles, groups, positions, real),
        (*causal, np.arange(ids.shape[1])[None], np.ones_like(real)),
        (*causal, np.sort(rng.choice(9000, ids.shape[1], replace=False))[None], np.ones_like(real)),
    ]
    embed = np.concatenate([r["tok_embeddings.weight"] for r in checkpoint], axis=1)
    xp = source.read("xp")
    for roles, groups, positions, real in cases:
        row = [array.astype(np.int32) for array in (ids, roles, groups, positions, real)]
        ours, mask, x = (np.array(out)[0] for out in run(decoder, embed, xp, *row))
        np.fill_diagonal(mask, True)  # padding sees itself, so that its softmax exists
        want = reference_logits(
            checkpoint, x, mask, positions[0],
            heads=a["heads"], kv_heads=a["kv_heads"], layers=a["layers"], swin=a["swin"],
        )  # fmt: skip
        kept = real[0].astype(bool)
        np.testing.assert_allclose(ours[kept], want[kept], atol=1e-4 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_there_and_back_is_bit_exact(tmp_path, dtype, ranks):
    import ml_dtypes  # noqa: F401

    checkpoint = meta_folder(tmp_path / "a", ranks=ranks, swin=ranks > 1, dtype=np.dtype(dtype))
    keep = {"image_head": "keep"}
    convert(open_source(tmp_path / "a/models/tiny"), tmp_path / "ours", Options(**keep), progress=False)
    convert(open_source(tmp_path / "ours"), tmp_path / "b", Options(to="meta", **keep), progress=False)
    files = sorted((tmp_path / "b").glob("*.pth"))
    assert [f.name for f in files] == (["consolidated.pth"] if ranks == 1 else [f"consolidated.{r:02d}.pth" for r in range(ranks)])
    for file, before in zip(files, checkpoint, strict=True):
        after = TorchFile(file)
        assert set(after) == set(before) - {"rope.freqs"}
        for name in after:
            assert after[name].dtype == before[name].dtype and after[name].shape == before[name].shape
            assert after[name].tobytes() == before[name].tobytes(), name
    first, again = TorchFile(tmp_path / "a/tokenizer/vqgan.ckpt"), TorchFile(tmp_path / "b/tokenizer/vqgan.ckpt")
    assert list(first) == list(again)
    assert all(first[n].tobytes() == again[n].tobytes() for n in first)
    assert (tmp_path / "a/tokenizer/vqgan.yaml").read_text() == (tmp_path / "b/tokenizer/vqgan.yaml").read_text()
    assert wrong_checksums(sorted((tmp_path / "b").glob("*.pth"))) == []


@pytest.mark.parametrize("change", [{"layout": "lumina"}, {"head_dim": 16}, {}], ids=str)
def test_what_metas_params_have_no_word_for_is_written_beside(tmp_path, change):
    config = dataclasses.replace(TINY, num_kv_heads=4, **change)
    XPrompt(Chameleon(config, jax.random.key(0)), VQGAN(config.vq, jax.random.key(1)), tiny_tokenizer()).save_pretrained(tmp_path / "ours")
    convert(open_source(tmp_path / "ours"), tmp_path / "meta", Options(to="meta", shards=1), progress=False)
    assert open_source(tmp_path / "meta").config == config
    told = json.loads((tmp_path / "meta/params.json").read_text())["model"]
    assert told.keys() & {"xprompt_layout", "head_dim"} == {{"layout": "xprompt_layout"}.get(name, name) for name in change}


def test_what_meta_cannot_hold_is_refused(tmp_path):
    meta_folder(tmp_path / "a", ranks=2)
    convert(open_source(tmp_path / "a/models/tiny"), tmp_path / "ours", Options(), progress=False)
    with pytest.raises(UserError, match="heads of a rank do not share one vector"):
        convert(open_source(tmp_path / "ours"), tmp_path / "b", Options(to="meta", shards=1), progress=False)
    with pytest.raises(UserError, match="--shards 3: vocab_size 448 is not a multiple"):
        convert(open_source(tmp_path / "ours"), tmp_path / "b", Options(to="meta", shards=3), progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "ours"]  # nothing half-written


def test_ranks_keep_their_own_norms(tmp_path):
    """Averaging them, or taking the first, would be silently wrong (trap 2)."""
    checkpoint = meta_folder(tmp_path, ranks=4, heads=8, kv_heads=4, dim=64)
    q = open_source(tmp_path / "models/tiny").read("blocks.1.attention.q_norm.bias")
    k = open_source(tmp_path / "models/tiny").read("blocks.1.attention.k_norm.scale")
    for rank in range(4):
        bias = checkpoint[rank]["layers.1.attention.q_normalization.bias"]
        halves = np.concatenate([bias[0::2], bias[1::2]])
        np.testing.assert_array_equal(q[2 * rank : 2 * rank + 2], [halves, halves])
        scale = checkpoint[rank]["layers.1.attention.k_normalization.weight"]
        np.testing.assert_array_equal(k[rank], np.concatenate([scale[0::2], scale[1::2]]))


def test_norms_that_drifted_apart_are_averaged_with_a_warning(tmp_path, caplog):
    checkpoint = meta_folder(tmp_path, ranks=2)
    checkpoint[1]["norm.weight"] = checkpoint[1]["norm.weight"] + 0.5
    with TorchWriter(tmp_path / "models/tiny/consolidated.01.pth") as out:
        for name, value in checkpoint[1].items():
            out.write(name, value)
    with caplog.at_level(logging.WARNING):
        norm = open_source(tmp_path / "models/tiny").read("norm")
    assert "norm.weight differs between ranks" in caplog.text
    np.testing.assert_allclose(norm, checkpoint[0]["norm.weight"] + 0.25, rtol=1e-6)


@pytest.mark.parametrize("name, ranks", [("7b", 1), ("30b", 4)])
def test_published_sizes_have_metas_shapes(name, ranks):
    """Shapes alone, at full size: every tensor of every rank, summed, is the fact sheet's parameter count (without XP)."""
    c = PRESETS[name]
    entries, ours = meta_decoder(c, ranks), shapes_of(c)
    theirs = {  # rank-local shapes as the fact sheet's table 1.5 splits them
        "tok_embeddings.weight": (65536, c.dim // ranks), "output.weight": (65536 // ranks, c.dim), "norm.weight": (c.dim,),
        "attention.wq.weight": (c.num_heads * 128 // ranks, c.dim), "attention.wk.weight": (c.num_kv_heads * 128 // ranks, c.dim),
        "attention.wv.weight": (c.num_kv_heads * 128 // ranks, c.dim), "attention.wo.weight": (c.dim, c.num_heads * 128 // ranks),
        "feed_forward.w1.weight": (c.ffn_dim // ranks, c.dim), "feed_forward.w3.weight": (c.ffn_dim // ranks, c.dim),
        "feed_forward.w2.weight": (c.dim, c.ffn_dim // ranks),
    }  # fmt: skip
    total = 0
    for entry in entries:
        short = entry.theirs.removeprefix(f"layers.{LAYER}.")
        times = c.num_layers if LAYER in entry.theirs else 1
        total += times * int(np.prod(ours[entry.ours if times == 1 else entry.ours.replace("blocks.", "blocks.0.")]))
        if short in theirs:
            local = theirs[short]
            assert isinstance(entry.join, int) == (short != "norm.weight")
            whole = [s * ranks if i == entry.join and isinstance(entry.join, int) else s for i, s in enumerate(local)]
            assert np.prod(whole) == np.prod(ours[entry.ours if times == 1 else entry.ours.replace("blocks.", "blocks.0.")]), short
    assert total == {"7b": 7_013_666_816, "30b": 34_294_308_864}[name]


def test_what_is_missing_is_named(tmp_path):
    meta_folder(tmp_path, ranks=4)
    model = tmp_path / "models/tiny"
    with pytest.raises(UserError, match=r"did you mean .*models/tiny\?"):
        open_source(tmp_path)
    (model / "consolidated.02.pth").rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"consolidated\.02\.pth is missing \(of 4 ranks\)"):
        open_source(model)
    (tmp_path / "aside").rename(model / "consolidated.02.pth")
    (tmp_path / "tokenizer/text_tokenizer.json").rename(tmp_path / "words")
    with pytest.raises(UserError, match="--tokenizer"):
        open_source(model)
    assert open_source(model, tokenizer=tmp_path / "words").config.num_layers == 2
    (tmp_path / "tokenizer/vqgan.ckpt").rename(tmp_path / "vqgan.ckpt")
    with pytest.raises(UserError, match="no VQGAN decoder.*--vqgan"):
        open_source(model, tokenizer=tmp_path / "words")
    source = open_source(model, tokenizer=tmp_path / "words", vqgan=tmp_path / "vqgan.ckpt")
    assert source.config.vq.image_size == 512  # no vqgan.yaml beside it
    (model / "params.json").write_text(json.dumps({"dim": 32}))
    with pytest.raises(UserError, match=r"params\.json: no number 'n_layers'"):
        open_source(model, vqgan=tmp_path / "vqgan.ckpt", tokenizer=tmp_path / "words")
    (model / "params.json").write_text("{")
    with pytest.raises(UserError, match=r"params\.json: not readable JSON"):
        open_source(model, vqgan=tmp_path / "vqgan.ckpt", tokenizer=tmp_path / "words")


@pytest.mark.parametrize("beside", [True, False])
def test_a_wrong_checksum_is_found(tmp_path, beside):
    """Meta's list lies at the root of the download, ours beside the files."""
    meta_folder(tmp_path / "a")
    source = open_source(tmp_path / "a/models/tiny")
    file = tmp_path / "a/models/tiny/consolidated.pth"
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    if beside:
        (file.parent / "checklist.chk").write_text(f"{md5}  consolidated.pth\n")
    else:
        (tmp_path / "a/checklist.chk").write_text(f"{md5}  ./models/tiny/consolidated.pth\n{'0' * 32}  models/other\n")
    convert(source, tmp_path / "b", Options(to="meta"), progress=False)
    verify(source, tmp_path / "b", Options(), progress=False)
    for damaged in (tmp_path / "b/consolidated.pth", file):
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
        with pytest.raises(UserError, match=f"{damaged}: its MD5 is not the one in checklist.chk"):
            verify(source, tmp_path / "b", Options(), progress=False)
        damaged.write_bytes(whole)
