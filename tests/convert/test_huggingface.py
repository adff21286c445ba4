"""Hugging Face folders: the same numbers, and the same bits back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.helpers import FP32, TINY, TINY_VQ, column, random_rows, segments, tiny_tokenizer
from xprompt_jax.convert import huggingface as hf
from xprompt_jax.convert.names import hf_decoder
from xprompt_jax.errors import UserError
from xprompt_jax.model.attention import dense_mask
from xprompt_jax.model.chameleon import Chameleon, abstract_model
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.prompt import SlotShape

# HF's VQGAN has 32 groups in every norm, so 32 channels at least.
HF_VQ = dataclasses.replace(TINY_VQ, channels=32, channel_multipliers=(1, 2), latent_channels=32)


def vocab():
    return tiny_tokenizer().words()


def moved(config, seed=0, dtype="float32"):
    """Random parameters, norms and biases too."""
    params = flatten(Chameleon(config, jax.random.key(seed)))
    return {n: np.asarray(v + 0.2 * jax.random.normal(jax.random.key(i), v.shape)).astype(dtype) for i, (n, v) in enumerate(params.items())}


@pytest.fixture(scope="module")
def vqgan():
    return flatten(VQGAN(TINY_VQ, jax.random.key(1)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip_is_bit_exact(tmp_path, vqgan, dtype, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)  # several shards and an index
    params = moved(TINY, dtype=dtype)
    hf.export(tmp_path / "a", TINY, params, vqgan, vocab())
    tensors, config = hf.Tensors(tmp_path / "a"), hf.read_config(tmp_path / "a", num_xp_tokens=3)
    assert config == TINY
    again = hf.load_decoder(tensors, config)
    for name, value in params.items():
        assert again[name].dtype == value.dtype
        np.testing.assert_array_equal(again[name].view(np.uint8), value.view(np.uint8), err_msg=name)
    for name, value in hf.load_vqgan(tensors, config.vq).items():
        np.testing.assert_array_equal(value, vqgan[name], err_msg=name)
    hf.export(tmp_path / "b", config, again, hf.load_vqgan(tensors, config.vq), vocab())
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("seed", range(6))
def test_logits_are_hugging_faces(tmp_path, seed):
    """Random architectures, the XP mask and overlaid positions, against torch."""
    torch = pytest.importorskip("torch")
    from transformers import ChameleonForConditionalGeneration

    rng = np.random.default_rng(seed)
    kv = int(rng.choice([1, 2, 4]))
    config = dataclasses.replace(
        TINY, num_layers=int(rng.integers(1, 4)), num_kv_heads=kv, num_heads=kv * int(rng.choice([1, 2])), swin_norm=bool(seed % 2),
        head_dim=16, dim=64, ffn_dim=int(rng.integers(20, 90)),
    )  # fmt: skip
    config = dataclasses.replace(config, head_dim=config.dim // config.num_heads, vq=HF_VQ)
    params, vqgan = moved(config, seed), flatten(VQGAN(HF_VQ, jax.random.key(1)))
    hf.export(tmp_path, config, params, vqgan, vocab())
    theirs = ChameleonForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()

    shape = SlotShape(2, 6, 3, 8)
    rows = random_rows(seed, shape, 2)
    ids, roles, groups, positions = (column(rows, n) for n in ("ids", "roles", "groups", "positions"))
    ours = unflatten(abstract_model(config), params).logits(ids, roles, groups, positions, segments(rows), FP32)
    # HF has no XP table: give it the embeddings.
    from xprompt_jax.model.xp import place_by_role

    embedded = place_by_role(params["embed"][np.asarray(ids)], params["xp"], roles, groups, segments(rows))
    mask = np.where(np.asarray(dense_mask(roles, groups, segments(rows)))[:, None], 0.0, np.finfo(np.float32).min)
    with torch.no_grad():
        out = theirs.model.language_model if hasattr(theirs.model, "language_model") else theirs.model
        hidden = out(
            inputs_embeds=torch.tensor(np.asarray(embedded)), attention_mask=torch.tensor(mask, dtype=torch.float32),
            position_ids=torch.tensor(np.asarray(positions), dtype=torch.long),
        ).last_hidden_state  # fmt: skip
        want = theirs.lm_head(hidden).numpy()
    real = np.asarray(segments(rows))[..., None].astype(bool)
    scale = np.abs(want).max()
    np.testing.assert_allclose(np.where(real, ours, 0) / scale, np.where(real, want, 0) / scale, atol=1e-4)


def test_older_norm_shapes_are_expanded():
    """(K,), (1, K) and (ranks, K) become one row per head; rank r covers heads of its own."""
    config = dataclasses.replace(TINY, num_heads=4, num_kv_heads=2)
    load = {e.ours: e.load for e in hf_decoder(config)}
    two = np.arange(16.0).reshape(2, 8)
    np.testing.assert_array_equal(load["blocks.attention.q_norm.scale"](two), two[[0, 0, 1, 1]])
    np.testing.assert_array_equal(load["blocks.attention.k_norm.bias"](two), two)
    for one in (two[0], two[:1]):
        np.testing.assert_array_equal(load["blocks.attention.q_norm.scale"](one), two[[0, 0, 0, 0]])
    with pytest.raises(UserError, match="does not fit 4 heads"):
        load["blocks.attention.q_norm.scale"](np.zeros((3, 8)))


def test_damaged_folders_are_named(tmp_path, vqgan, monkeypatch):
    with pytest.raises(UserError, match="safetensors"):
        hf.Tensors(tmp_path)
    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    hf.export(tmp_path / "m", TINY, moved(TINY), vqgan, vocab())
    shard = tmp_path / "m" / "model-00002-of-00003.safetensors"
    shard = shard if shard.exists() else sorted((tmp_path / "m").glob("model-00002*"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="model-00002.*not a readable"):
        hf.Tensors(tmp_path / "m")
    shard.unlink()
    with pytest.raises(UserError, match="model-00002.*is missing"):
        hf.Tensors(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="'llama', not 'chameleon'"):
        hf.read_config(tmp_path / "m")


def test_a_missing_pixel_decoder_is_told(tmp_path):
    safetensors.numpy.save_file({"model.vqmodel.encoder.conv_in.weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no VQGAN decoder"):
        hf.load_vqgan(hf.Tensors(tmp_path), TINY_VQ)


def test_from_pretrained_reads_both_formats(tmp_path, vqgan):
    from xprompt_jax import XPrompt
    from xprompt_jax.sample.pretrained import export_huggingface

    model = XPrompt(Chameleon(TINY, jax.random.key(0)), VQGAN(TINY_VQ, jax.random.key(1)), tiny_tokenizer(), compute=FP32)
    model.save_pretrained(tmp_path / "ours")
    export_huggingface(model, tmp_path / "theirs")
    one, two = XPrompt.from_pretrained(tmp_path / "ours"), XPrompt.from_pretrained(tmp_path / "theirs")
    assert one.fingerprint == two.fingerprint == model.fingerprint
    image = np.zeros((16, 16, 3), np.uint8)
    np.testing.assert_array_equal(one.encode_images([image]), two.encode_images([image]))
