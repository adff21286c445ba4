"""Hugging Face folders: the same numbers, the same bits back, and every published variant of the format."""

import dataclasses
import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.convert.folders import random_tensors, same_bits, vqgan_tensors, write_huggingface
from tests.helpers import FP32, TINY, TINY_VQ, column, random_rows, segments, tiny_tokenizer
from xprompt_jax import XPrompt
from xprompt_jax.convert.formats import open_source
from xprompt_jax.convert.names import hf_decoder
from xprompt_jax.convert.safetensors import INDEX, Tensors
from xprompt_jax.convert.vqgan import write_vqgan
from xprompt_jax.convert.weights import load_decoder, shapes_of
from xprompt_jax.errors import UserError
from xprompt_jax.model.attention import dense_mask
from xprompt_jax.model.xp import place_by_role
from xprompt_jax.prompt import Role, SlotShape

# HF's VQGAN has 32 groups in every norm, so 32 channels at least.
HF_VQ = dataclasses.replace(TINY_VQ, channels=32, channel_multipliers=(1, 2), latent_channels=32)


@pytest.fixture
def folder(tmp_path):
    """A folder of one file, and the tensors in it."""
    tensors = random_tensors(TINY, np.random.default_rng(0))
    return write_huggingface(tmp_path / "hf", TINY, tensors), tensors


def rewrite(path, change):
    """Applies `change` to the dictionary of tensors of a one-file folder."""
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


def read_all(path):
    source = open_source(path)
    return {name: source.read(name) for name in shapes_of(source.config)}


def edit_config(path, **values):
    (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **values}))


@pytest.mark.parametrize("dtype, vqgan_dtype", [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("shard_bytes", [None, 40_000])
def test_what_is_written_is_read_bit_for_bit(tmp_path, dtype, vqgan_dtype, shard_bytes):
    tensors = random_tensors(TINY, np.random.default_rng(0), np.dtype(dtype), np.dtype(vqgan_dtype))
    write_huggingface(tmp_path, TINY, tensors, shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes is None else len(files) > 2
    source = open_source(tmp_path)
    assert source.config == TINY and source.has_xp and source.draws
    for name, value in tensors.items():
        assert same_bits(source.read(name), value), name
    if shard_bytes:  # the index tells the truth, and no shard is larger than asked (one tensor may be)
        index = json.loads((tmp_path / INDEX).read_text())
        for file in files:
            held = safetensors.numpy.load_file(file)
            assert {n for n, f in index["weight_map"].items() if f == file.name} == set(held)
            assert sum(v.nbytes for v in held.values()) <= shard_bytes or len(held) == 1


def draw_architecture(rng):
    """Layers, heads, kv heads, head and feed-forward sizes, norm placement and vocabulary at random."""
    kv, k = int(rng.choice([1, 2, 3, 4])), 2 * int(rng.integers(2, 10))
    heads = kv * int(rng.choice([1, 2, 4]))
    return dataclasses.replace(
        TINY, num_layers=int(rng.integers(1, 4)), num_kv_heads=kv, num_heads=heads, head_dim=k, dim=heads * k,
        ffn_dim=int(rng.integers(20, 90)), vocab_size=int(rng.integers(420, 520)), swin_norm=bool(rng.integers(2)), vq=HF_VQ,
        rope_theta=float(rng.choice([10000.0, 100.0])),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_logits_are_those_of_hugging_faces_model(tmp_path, seed):
    """Random architectures, loaded by transformers from our files; the role table's mask, plain causal, random positions."""
    torch = pytest.importorskip("torch")
    from transformers import ChameleonForConditionalGeneration

    rng = np.random.default_rng(seed)
    config = draw_architecture(rng)
    tensors = random_tensors(config, rng)
    write_huggingface(tmp_path, config, tensors)
    theirs, told = ChameleonForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["mismatched_keys"]
    theirs.eval()
    body = theirs.model.language_model if hasattr(theirs.model, "language_model") else theirs.model
    decoder = load_decoder(open_source(tmp_path), dtype=np.float32)

    @jax.jit
    def run(decoder, embed, xp, ids, roles, groups, positions, real):
        """Our logits; and, as HF has no XP table, what to give it: the mask and the embeddings."""
        ours = decoder.logits(ids, roles, groups, positions, real, FP32)
        return ours, dense_mask(roles, groups, real), place_by_role(embed[ids], xp, roles, groups, real)

    rows = random_rows(seed, SlotShape(2, 6, 3, 8), 2)
    ids, roles, groups, positions = (np.asarray(column(rows, n)) for n in ("ids", "roles", "groups", "positions"))
    real = np.asarray(segments(rows))
    causal = np.full_like(roles, Role.TD), np.zeros_like(groups)
    upwards = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    scattered = np.sort(rng.choice(4096, ids.shape, replace=False), axis=1)
    cases = [
        (roles, groups, positions, real),  # XP mask, overlaid positions, padding
        (*causal, upwards, np.ones_like(real)),
        (*causal, scattered, np.ones_like(real)),
        (rng.permuted(roles, axis=1), groups, scattered, real),  # any table of roles at all
    ]
    for case, (roles, groups, positions, real) in enumerate(cases):
        row = [array.astype(np.int32) for array in (ids, roles, groups, positions, real)]
        ours, mask, x = map(np.asarray, run(decoder, tensors["embed"], tensors["xp"], *row))
        with torch.no_grad():
            hidden = body(
                inputs_embeds=torch.tensor(x), position_ids=torch.tensor(positions, dtype=torch.long),
                attention_mask=torch.tensor(np.where(mask[:, None], 0.0, np.finfo(np.float32).min), dtype=torch.float32),
            ).last_hidden_state  # fmt: skip
            want = theirs.lm_head(hidden).numpy()
        seen = mask.any(axis=-1)  # a token that sees nothing, not even itself, is padding
        np.testing.assert_allclose(ours[seen], want[seen], atol=1e-4 * np.abs(want).max(), rtol=0, err_msg=f"case {case}")


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


def test_a_lumina_folder(folder, tmp_path, caplog):
    """Shared QK-norms of shape (1, K), a bare VQGAN file in original_tokenizers, added words beyond the vocabulary, bf16."""
    path, tensors = folder
    bf16 = np.dtype(ml_dtypes.bfloat16)

    def change(t):
        for name in [n for n in t if n.startswith("model.vqmodel.") or n.startswith("xprompt.")]:
            del t[name]
        for name in t:
            t[name] = (t[name][:1] if "_norm." in name and "self_attn" in name else t[name]).astype(bf16)

    rewrite(path, change)
    (path / "original_tokenizers").mkdir()
    write_vqgan(path / "original_tokenizers", TINY_VQ, vqgan_tensors())
    words = json.loads((path / "tokenizer.json").read_text())
    words["added_tokens"].append({**words["added_tokens"][0], "id": TINY.vocab_size, "content": "<pad_added>"})
    (path / "tokenizer.json").write_text(json.dumps(words))
    told = json.loads((path / "config.json").read_text())
    del told["xprompt_layout"]  # which we alone write
    (path / "config.json").write_text(json.dumps(told))
    with caplog.at_level(logging.WARNING):
        source = open_source(path, num_xp_tokens=5)
    assert "taken for a Lumina-mGPT" in caplog.text
    assert (source.config.num_xp_tokens, source.has_xp, source.draws) == (5, False, True)
    assert source.config.layout == "lumina" and open_source(path, layout="plain").config.layout == "plain"
    scale = source.read("blocks.1.attention.q_norm.scale")
    np.testing.assert_array_equal(scale, np.repeat(tensors["blocks.1.attention.q_norm.scale"][:1].astype(bf16), 4, axis=0))
    model = XPrompt.from_pretrained(path, num_xp_tokens=5, compute=FP32)
    assert "no XP embeddings" in caplog.text
    assert model.xp_embeddings.shape == (5, TINY.dim)
    np.testing.assert_array_equal(model.decoder.head[...], tensors["head"].astype(bf16).astype(np.float32))  # what it learned to draw
    assert "<pad_added>" not in model.tokenizer.words()
    np.testing.assert_array_equal(model.vqgan.quantize.embedding.weight[...], vqgan_tensors()["quantize.embedding.weight"])


def test_anole_keeps_the_head_it_trained(folder):
    """A folder with the VQGAN's decoder comes from someone who draws; its image head stays, without a word."""
    path, tensors = folder
    model = XPrompt.from_pretrained(path, compute=FP32)
    np.testing.assert_array_equal(model.decoder.head[...], tensors["head"])
    image = np.zeros((16, 16, 3), np.uint8)
    assert np.asarray(model.encode_images([image])).shape == (1, TINY.vq.grid, TINY.vq.grid)


def test_hugging_faces_own_release(folder, tmp_path):
    """No VQGAN decoder in it: told, and cured with --vqgan; its image head cannot draw and is zeroed."""
    path, _ = folder

    def change(t):
        for name in [n for n in t if n.startswith(("model.vqmodel.decoder", "model.vqmodel.post_quant", "xprompt."))]:
            del t[name]

    rewrite(path, change)
    with pytest.raises(UserError, match="no VQGAN decoder.*--vqgan FILE"):
        open_source(path)
    write_vqgan(tmp_path, TINY_VQ, vqgan_tensors())
    model = XPrompt.from_pretrained(path, vqgan=tmp_path / "vqgan.ckpt", compute=FP32)
    head = np.asarray(model.decoder.head[...])
    assert not head[:, 4:36].any() and head[:, 36:].any()


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        Tensors(tmp_path)
    path = write_huggingface(tmp_path / "m", TINY, random_tensors(TINY, np.random.default_rng(0)), 40_000)
    shard = next(path.glob("model-00002*"))
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="model-00002.*not a readable"):
        open_source(path)
    shard.unlink()
    with pytest.raises(UserError, match="model-00002.*is missing"):
        open_source(path)
    (path / INDEX).unlink()
    with pytest.raises(UserError, match="no tensor"):
        read_all(path)


def test_the_index_says_which_file_a_tensor_is_in(tmp_path):
    """Other files, of a moving average say, only add what it lacks."""
    tensors = random_tensors(TINY, np.random.default_rng(0))
    path = write_huggingface(tmp_path / "m", TINY, tensors, 40_000)
    name = "model.norm.weight"
    true = Tensors(path)[name]
    for file in ("a.safetensors", "z.safetensors"):
        safetensors.numpy.save_file({name: np.zeros_like(true)}, path / file)
    np.testing.assert_array_equal(Tensors(path)[name], true)
    told = json.loads((path / INDEX).read_text())
    (path / INDEX).write_text(json.dumps({"weight_map": told["weight_map"] | {name: "model-00001-of-" + told["weight_map"][name][-17:]}}))
    with pytest.raises(UserError, match=f"model-00001.*has no tensor {name}, which {INDEX} says"):
        Tensors(path)
    (path / INDEX).unlink()
    with pytest.raises(UserError, match=f"a.safetensors and .* both hold {name}; remove"):
        Tensors(path)


@pytest.mark.parametrize("kind", ["I8", "F8_E4M3"])
def test_quantised_weights_are_refused(tmp_path, kind):
    header = json.dumps({"w": {"dtype": kind, "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=f"w is of type {kind}; quantised weights are not read"):
        Tensors(tmp_path)["w"]


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llama"}, "'llama', not 'chameleon'"),
    ({"attention_bias": True}, "attention_bias is set; no Chameleon"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rotary positions of type 'linear'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary positions of type 'yarn'"),
    ({"hidden_act": "gelu"}, "activation 'gelu'"),
    ({"hidden_size": "32"}, "config.json: bad value for 'dim'"),
    ({"vq_config": []}, r"config.json: \[\] stands where an object should"),
    ({"intermediate_size": 40}, "has shape .* the configuration asks for"),
    ({"num_attention_heads": 8}, "does not fit|has shape"),
])  # fmt: skip
def test_a_config_that_does_not_belong_is_told(folder, change, message):
    path, _ = folder
    edit_config(path, **change)
    with pytest.raises(UserError, match=message):
        read_all(path)


def test_null_says_nothing(folder):
    path, tensors = folder
    edit_config(path, head_dim=None, rope_scaling=None, rope_parameters={"rope_theta": None})
    assert all(same_bits(value, tensors[name]) for name, value in read_all(path).items())


def test_words_are_those_of_the_tokenizer(folder):
    """HF finds the image words in config.json; our reader finds the same ids in tokenizer.json."""
    path, _ = folder
    words = json.loads((path / "config.json").read_text())["vocabulary_map"]
    assert {k: v for k, v in words.items() if k != "<image>"} == tiny_tokenizer().words()
    assert XPrompt.from_pretrained(path, compute=FP32).tokenizer.fingerprint == tiny_tokenizer().fingerprint
