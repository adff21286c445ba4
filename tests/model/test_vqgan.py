"""The VQGAN against transformers' encoder and decoder, its published size, its codes, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import FP32, TINY, TINY_VQ, tiny_tokenizer
from xprompt_jax.config import VQConfig
from xprompt_jax.data.images import open_image, postprocess, preprocess
from xprompt_jax.errors import UserError
from xprompt_jax.model import vqgan
from xprompt_jax.model.chameleon import Chameleon
from xprompt_jax.model.params import count, flatten, unflatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.sample.sampler import XPrompt

# Chameleon's levels, narrower: 32 channels or a multiple are the widths that transformers can build.
CONFIG = VQConfig(channels=32, num_res_blocks=1, latent_channels=12, embed_dim=8, num_codes=1100, image_size=32)


def abstract(config):
    return jax.eval_shape(lambda: VQGAN(config, jax.random.key(0)))


def with_params(config, params):
    """A model that holds `params` and random numbers elsewhere."""
    rng, like = np.random.default_rng(0), abstract(config)
    rest = {n: rng.normal(size=a.shape, scale=np.prod(a.shape[:-1]) ** -0.5).astype(np.float32) for n, a in flatten(like).items()}
    return unflatten(like, rest | params)


def test_default_is_chameleons_size():
    model = abstract(VQConfig())
    assert count(model) == 68_718_467
    assert count(model.encoder) == 27_194_880
    assert count(model.decoder) == 39_294_851
    assert count(model.quantize) == 2_097_152
    assert count(model.quant_conv) == count(model.post_quant_conv) == 65_792
    names = flatten(model)
    assert len(names) == 293
    assert all(leaf.dtype == jnp.float32 for leaf in names.values())
    assert {n.split(".block.")[0] for n in names if "nin_shortcut" in n} == {
        "encoder.down.2", "encoder.down.4", "decoder.up.3", "decoder.up.1",
    }  # fmt: skip
    resampled = {n.rsplit(".conv.", 1)[0] for n in names if "sample" in n}
    assert resampled == {f"encoder.down.{i}.downsample" for i in range(4)} | {f"decoder.up.{i}.upsample" for i in range(1, 5)}
    pixels = jax.ShapeDtypeStruct((2, 768, 512, 3), jnp.float32)
    codes = jax.eval_shape(VQGAN.encode, model, pixels)
    assert (codes.shape, codes.dtype) == ((2, 48, 32), jnp.int32)
    assert jax.eval_shape(VQGAN.decode, model, codes).shape == pixels.shape


def to_ours(tensors):
    """Torch tensors under Meta's names -> ours."""
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    return {name: a.transpose(2, 3, 1, 0) if a.ndim == 4 else a for name, a in arrays.items()}


def randomised(torch, module):
    """No weight left at one or zero, so that a forgotten or exchanged one shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "embedding" in name:
                p.normal_()
            elif p.ndim == 1:
                p.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.2 * torch.randn_like(p))
            else:
                p.normal_(std=p[0].numel() ** -0.5)
    return module.eval()


@pytest.fixture(scope="module")
def trio():
    """transformers' encoder with its codebook, its Janus decoder, and ours with the weights of both.

    Janus' decoder is Chameleon's with attention added at the coarsest level, and stores `up` in the order it runs.
    """
    torch = pytest.importorskip("torch")
    from transformers import ChameleonVQVAEConfig, JanusVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
    from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

    sizes = dict(
        base_channels=CONFIG.channels, channel_multiplier=list(CONFIG.channel_multipliers), num_res_blocks=CONFIG.num_res_blocks,
        latent_channels=CONFIG.latent_channels, embed_dim=CONFIG.embed_dim, num_embeddings=CONFIG.num_codes,
    )  # fmt: skip
    encoder = randomised(torch, ChameleonVQVAE(ChameleonVQVAEConfig(**sizes, resolution=CONFIG.image_size)))
    decoder = randomised(torch, JanusVQVAEDecoder(JanusVQVAEConfig(**sizes, out_channels=3)))
    for level in decoder.up:
        level.attn = torch.nn.ModuleList()

    ours = dict(encoder.named_parameters())
    # transformers' Chameleon has no decoder; every other name is Meta's.
    assert set(ours) == {n for n in flatten(abstract(CONFIG)) if not n.startswith("decoder.")}
    last = len(CONFIG.channel_multipliers) - 1
    for name, p in decoder.named_parameters():
        if (parts := name.split("."))[0] == "up":
            parts[1] = str(last - int(parts[1]))
        ours[".".join(["decoder", *parts])] = p
    assert set(ours) == set(flatten(abstract(CONFIG)))

    def encode(pixels):
        with torch.no_grad():
            found = encoder.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
            return encoder.quant_conv(found.last_hidden_state).numpy().transpose(0, 2, 3, 1), found.image_tokens.numpy()

    def decode(codes):
        with torch.no_grad():
            rows = encoder.quantize.embedding(torch.from_numpy(codes).long()).permute(0, 3, 1, 2)
            return decoder(encoder.post_quant_conv(rows)).numpy().transpose(0, 2, 3, 1)

    return encode, decode, unflatten(abstract(CONFIG), to_ours(ours))


# Any multiple of 16: one code high, one code wide, a large one, and one at random.
SIZES = [(16, 80), (48, 16), (96, 128), tuple(16 * int(n) for n in np.random.default_rng(0).integers(1, 6, 2))]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_codes_and_pixels_are_transformers(trio, height, width):
    encode, decode, model = trio
    rng = np.random.default_rng(height * 1000 + width)
    # Contrast that grows from left to right: an even texture has nearly the same code everywhere.
    pixels = (rng.uniform(-1, 1, (2, height, width, 3)) * np.linspace(0, 1, width)[:, None]).astype(np.float32)
    latent, tokens = encode(pixels)
    ours, codes = map(np.asarray, jax.jit(lambda m, x: (m.encode_latent(x), m.encode(x)))(model, pixels))
    np.testing.assert_allclose(ours, latent, atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(codes, tokens.reshape(2, height // 16, width // 16))
    assert len(np.unique(codes)) > codes.size // 4

    codes = rng.integers(0, CONFIG.num_codes, codes.shape).astype(np.int32)
    drawn = np.asarray(jax.jit(VQGAN.decode)(model, codes))
    assert drawn.shape == pixels.shape
    np.testing.assert_allclose(drawn, decode(codes), atol=1e-4, rtol=1e-4)


def test_nearest_code_and_ties():
    rows = np.random.default_rng(0).normal(size=(CONFIG.num_codes, CONFIG.embed_dim)).astype(np.float32)
    rows[[700, 1050]] = rows[3]  # in the same slice of the codebook, and in the next
    rows[1060] = rows[1030]
    book = unflatten(abstract(CONFIG).quantize, {"embedding.weight": jnp.asarray(rows)})
    asked = np.array([3, 700, 1050, 1060, 1023, 1024, 1099])
    codes, near = jax.jit(lambda b, z: b(z))(book, rows[asked])
    np.testing.assert_array_equal(codes, [3, 3, 3, 1030, 1023, 1024, 1099])
    np.testing.assert_array_equal(near, rows[asked])
    latent = np.random.default_rng(1).normal(size=(2, 3, 5, CONFIG.embed_dim)).astype(np.float32)
    distance = ((latent[..., None, :].astype(np.float64) - rows) ** 2).sum(-1)
    np.testing.assert_array_equal(book(latent)[0], distance.argmin(-1))


def test_any_multiple_of_the_factor_and_nothing_else():
    model = abstract(TINY_VQ)
    codes = jax.eval_shape(VQGAN.encode, model, jnp.zeros((1, 20, 8, 3)))
    assert codes.shape == (1, 5, 2)
    assert jax.eval_shape(VQGAN.decode, model, codes).shape == (1, 20, 8, 3)
    for h, w in ((18, 16), (16, 18), (0, 16)):
        with pytest.raises(UserError, match=f"{w} x {h} pixels: both sides must be multiples of 4"):
            jax.eval_shape(VQGAN.encode, model, jnp.zeros((1, h, w, 3)))
    with pytest.raises(UserError, match=r"vq\.channels 10 must be a multiple of 4"):
        abstract(VQConfig(channels=10))


def test_images_of_a_batch_do_not_meet():
    model = with_params(TINY_VQ, {})
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    together, alone = jax.jit(VQGAN.encode_latent)(model, pixels), jax.jit(VQGAN.encode_latent)(model, pixels[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)
    assert jnp.abs(together[0] - together[1]).max() > 0.1


@pytest.mark.parametrize(("count", "limit"), [(5, 512), (4, 512), (3, 1)])
def test_slices_of_a_batch_are_the_batch(monkeypatch, count, limit):
    """Two images at a time, with one left over or none, and one at a time, also where one exceeds the limit."""
    model = with_params(TINY_VQ, {})
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, 16, 16, 3)).astype(np.float32)
    calls = []
    draw = VQGAN.decode_latent
    monkeypatch.setattr(VQGAN, "decode_latent", lambda self, x: calls.append(x.shape[0]) or draw(self, x))
    both = lambda: jax.jit(lambda m, p: (c := m.encode(p), m.decode(c)))(model, pixels)
    codes, drawn = both()
    monkeypatch.setattr(vqgan, "_PIXELS_AT_ONCE", limit)
    sliced, redrawn = both()
    assert calls == [count, 2 if limit == 512 else 1]
    np.testing.assert_array_equal(sliced, codes)
    np.testing.assert_allclose(redrawn, drawn, atol=1e-5)
    assert len({c.tobytes() for c in np.asarray(codes)}) == count


def test_memory_of_a_batch_is_bounded():
    """Chameleon's VQGAN, 32 images of 512 x 512: without slices, 12 GB of activations."""
    model = abstract(VQConfig())
    pixels, codes = jax.ShapeDtypeStruct((32, 512, 512, 3), jnp.float32), jax.ShapeDtypeStruct((32, 32, 32), jnp.int32)
    for compute, given in ((VQGAN.encode, pixels), (VQGAN.decode, codes)):
        memory = jax.jit(compute).lower(model, given).compile({"xla_backend_optimization_level": 0}).memory_analysis()  # never run
        assert memory.temp_size_in_bytes < 2 * 2**30


@pytest.fixture(scope="module")
def tokenizers():
    """A model with real tokenizers; its decoder is not used."""
    return XPrompt(Chameleon(TINY, jax.random.key(0)), with_params(TINY_VQ, {}), tiny_tokenizer(), compute=FP32)


def test_images_to_codes_and_back(tokenizers):
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 20, 31, 3), dtype=np.uint8))
    for recipe in ("meta", "hf"):
        pixels = np.stack([preprocess(open_image(p, recipe), 16, recipe) for p in pictures])
        codes = tokenizers.encode_images(pictures, recipe)
        np.testing.assert_array_equal(codes, jax.jit(VQGAN.encode)(tokenizers.vqgan, pixels))
        assert codes.dtype == np.int32
    assert (codes != tokenizers.encode_images(pictures)).any()  # 31 * 16 / 20 = 24.8: another width
    assert tokenizers.encode_images([]).shape == (0, 4, 4)
    with pytest.raises(UserError, match="recipe 'janus' is unknown"):
        tokenizers.encode_images(pictures, "janus")

    wide = np.random.default_rng(0).integers(0, 32, (2, 2, 5))
    drawn = tokenizers.decode_images(wide)
    assert [d.size for d in drawn] == [(20, 8)] * 2
    alone = [jax.jit(VQGAN.decode)(tokenizers.vqgan, codes[None])[0] for codes in wide]
    np.testing.assert_array_equal(np.stack(drawn), postprocess(np.stack(alone)))
    for wrong in (wide + 4, wide - 32, wide[0], wide / 2):
        with pytest.raises(UserError, match=r"codes must be int \[n, rows, columns\] in 0\.\.31"):
            tokenizers.decode_images(wrong)


@pytest.mark.parametrize("channels", [8, 16, 24, 48])
def test_narrow_models_see_brightness(channels):
    """A normalisation of one channel a group would turn every flat picture into zeros."""
    norm = abstract(VQConfig(channels=channels)).decoder.norm_out
    norm = unflatten(norm, {"weight": jnp.ones(channels), "bias": jnp.zeros(channels)})
    colors = np.random.default_rng(0).normal(size=(1, 1, 1, channels)).astype(np.float32)
    flat = np.broadcast_to(colors, (1, 4, 4, channels))
    grouped = colors.reshape(-1, 4)
    want = (grouped - grouped.mean(1, keepdims=True)) / grouped.std(1, keepdims=True)
    np.testing.assert_allclose(norm(flat)[0, 2, 2], want.reshape(-1), atol=1e-3)
