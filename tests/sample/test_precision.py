"""What sampling keeps in memory: one copy of the weights, in pieces what is long, int8 on request."""

import gc
import hashlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import FP32, TINY, tiny_tokenizer
from xprompt_jax.config import MeshConfig, to_json
from xprompt_jax.errors import UserError
from xprompt_jax.mesh import make_mesh
from xprompt_jax.model.chameleon import Chameleon, unstacked
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.model.quantize import Int8
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.sample import prefill as prefill_module
from xprompt_jax.sample.prefill import prefill
from xprompt_jax.sample.sampler import Example, XPrompt

IDS = np.random.default_rng(5).integers(2, 400, (2, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, sharper than random: windows agree at times, and what is rounded draws other images at times."""
    decoder = Chameleon(TINY, jax.random.key(0))
    decoder = unflatten(decoder, {n: w * 12 if n == "head" else w for n, w in flatten(decoder).items()})
    path = tmp_path_factory.mktemp("precision") / "model"
    XPrompt(decoder, VQGAN(TINY.vq, jax.random.key(1)), tiny_tokenizer()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return XPrompt.from_pretrained(folder, compute=FP32)


@pytest.fixture(scope="module")
def small(folder):
    return XPrompt.from_pretrained(folder, compute=FP32, weights="int8", cache="int8")


def images(seed, count):
    return list(np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("piece", [8, 20])
@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_a_prompt_in_pieces_is_the_prompt_at_once(model, piece, cache_dtype):
    """Rows of all lengths, some done before the last piece, some with an example and some without."""
    rng, task = np.random.default_rng(0), model.compile([Example(*images(1, 2), "add rain")])
    prompts = [rng.integers(2, 400, n).astype(np.int32) for n in (100, 64, 7, 0)]
    fill = lambda piece: prefill(
        model.layers_apart, TINY, [task, None, task, None], prompts, 0, room=4, dtype="float32", cache_dtype=cache_dtype, piece=piece
    )
    want, got = fill(1024), fill(piece)
    for name in ("length", "position"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    wide = lambda buffer: np.asarray(buffer.values * buffer.scale if isinstance(buffer, Int8) else buffer)
    for side in ("k", "v"):
        for a, b in zip(getattr(got, side), getattr(want, side), strict=True):
            for row, length in enumerate(want.length):
                # A number on the edge between two steps of int8 may fall to either side.
                np.testing.assert_allclose(
                    wide(a)[row, :, :length], wide(b)[row, :, :length], atol=2e-6 if cache_dtype == "float32" else 0.03
                )


def test_images_of_a_prompt_in_pieces(model, monkeypatch):
    prompt = ["remove the rain " * 12, "add rain"]
    want = model.text_to_image(prompt, seed=1)
    monkeypatch.setattr(prefill_module.prefill, "__kwdefaults__", prefill_module.prefill.__kwdefaults__ | {"piece": 24})
    assert same(model.text_to_image(prompt, seed=1), want)


def test_pieces_bound_the_memory_of_a_long_prompt():
    abstract = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
    decoder = jax.eval_shape(lambda: unstacked(Chameleon(TINY, jax.random.key(0))))
    xp = abstract(TINY.num_layers, 4, 0, TINY.num_kv_heads, TINY.head_dim, dtype=jnp.float32)

    def temporary(piece: int) -> int:
        lowered = prefill_module._prefill.lower(
            decoder, xp, xp, abstract(4, 0), abstract(4), abstract(4), abstract(4, 1024), abstract(4), abstract(),
            slots=1100, piece=piece, dtype=jnp.dtype("float32"), cache_dtype=jnp.dtype("float32"), config=TINY,
        )  # fmt: skip
        return lowered.compile().memory_analysis().temp_size_in_bytes

    scores = 4 * TINY.num_heads * 1024 * 1100 * 4
    assert temporary(1024) > scores
    assert temporary(128) < scores / 3


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_int8_draws_the_same_at_every_window(folder, model, weights):
    """The law of drawing holds for whatever model there is; a prompt compiled by the float model fits."""
    task, inputs = model.compile([Example(*images(2, 2), "remove the rain")]), images(3, 2)
    small = XPrompt.from_pretrained(folder, compute=FP32, weights=weights, cache="int8")
    draw = lambda m, **options: m.generate(task, inputs, num_images=4, seed=4, guidance=1.5, **options)
    want = draw(small, decoding="sequential")
    for window in (3, 16):
        assert same(draw(small, window=window), want)
    assert not same(draw(model), want), "nothing was rounded"


def test_int8_weights_are_the_model_a_little_off(folder, model, small):
    want, got = model.logits(IDS), small.logits(IDS)
    error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    assert 1e-4 < error < 0.03
    assert small.fingerprint == model.fingerprint
    task = Example(*images(6, 2), "add rain")
    ours, theirs = small.compile([task]), model.compile([task])
    assert 0 < np.abs(ours.k - theirs.k).max() < 0.2
    floats = [v for n, v in flatten(small.layers_apart).items() if n.endswith(("embed", "norm", "xp", "bias", "norm.scale"))]
    assert len(floats) == 3 + 6 * TINY.num_layers and all(v.dtype == jnp.float32 for v in floats)
    assert small.image_head.values.dtype == jnp.int8 and small.image_head.shape == (TINY.dim, TINY.vq.num_codes)


def test_int8_writes(small):
    written = small.interleave(["add rain"], max_tokens=40, seed=1, guidance=2.0)
    assert written == small.interleave(["add rain"], max_tokens=40, seed=1, guidance=2.0)
    assert isinstance(small.describe([Example(*images(2, 2))], max_tokens=8), str)


def test_int8_weights_lie_on_the_mesh(folder, small):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    spread = XPrompt.from_pretrained(folder, mesh=mesh, compute=FP32, weights="int8")
    up = spread.layers_apart.blocks[0].mlp.up[...].values
    assert up.sharding.spec == jax.P("fsdp", "tensor") and up.dtype == jnp.int8
    np.testing.assert_allclose(spread.logits(IDS), small.logits(IDS), atol=1e-3)


def test_bfloat16_computes_with_int8(folder, small):
    half = XPrompt.from_pretrained(folder, compute=type(FP32)(dtype="bfloat16"), weights="int8", cache="int8")
    np.testing.assert_allclose(half.logits(IDS), small.logits(IDS), atol=1.2)
    (image,) = half.text_to_image(["add rain"], seed=1)
    assert image.size == (16, 16)


def test_mistakes_are_told(folder, small, tmp_path):
    for options in ({"weights": "int4"}, {"cache": "fp8"}):
        with pytest.raises(UserError, match="is unknown; use float or int8"):
            XPrompt.from_pretrained(folder, **options)
    with pytest.raises(UserError, match="rounded to int8"):
        small.save_pretrained(tmp_path / "m")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("weights, most", [("float", 1.1), ("int8", 0.58)])
def test_a_model_keeps_one_copy_of_its_weights(folder, weights, most):
    """After everything it can do. The embedding stays wide: a third of the tiny model's numbers, 4 % of a 7B model's."""

    def live() -> int:
        gc.collect()
        return sum(a.nbytes for a in jax.live_arrays())

    before = live()
    fresh = XPrompt.from_pretrained(folder, compute=FP32, weights=weights)
    task = fresh.compile([Example(*images(2, 2))])
    fresh.generate(task, images(3, 1))
    fresh.describe(task, max_tokens=4)
    fresh.logits(IDS)
    assert re.fullmatch("[0-9a-f]{16}", fresh.fingerprint)
    wide = 4 * sum(math.prod(w.shape) for w in flatten(fresh.layers_apart).values())
    vqgan = sum(w.nbytes for w in flatten(fresh.vqgan).values())
    used = live() - before - vqgan
    assert used < most * wide, f"{used / wide:.3f} of the float32 weights"


def test_the_decoder_is_stacked_when_asked(folder, model):
    original = Chameleon(TINY, jax.random.key(0))
    again = XPrompt(model.decoder, model.vqgan, model.tokenizer, compute=FP32)
    for name, value in flatten(original).items():
        np.testing.assert_array_equal(flatten(model.decoder)[name], value * 12 if name == "head" else value)
    assert again.fingerprint == model.fingerprint
    del model.fingerprint
    assert again.fingerprint == model.fingerprint, "read from files = read from memory"
    np.testing.assert_allclose(again.logits(IDS), model.logits(IDS), atol=1e-5)

    mark = hashlib.sha256(to_json(TINY).encode() + model.tokenizer.fingerprint.encode())
    for name, value in sorted(flatten(model.decoder).items()):
        mark.update(name.encode() + np.asarray((value if name == "xp" else value.reshape(-1)[:256]).astype(jnp.bfloat16)).tobytes())
    assert mark.hexdigest()[:16] == model.fingerprint, "it is that of the stacks, as files that were made before have it"
