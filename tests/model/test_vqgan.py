"""The VQGAN against transformers' encoder and decoder, its published size, and its codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TINY_VQ
from xprompt_jax.config import VQConfig
from xprompt_jax.errors import UserError
from xprompt_jax.model.params import count, flatten, unflatten
from xprompt_jax.model.vqgan import VQGAN

# 32 channels or a multiple: the widths that transformers can build.
CONFIG = VQConfig(
    channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=1, latent_channels=12, embed_dim=8, num_codes=1100, image_size=16
)  # fmt: skip


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


def test_codes_are_transformers():
    torch = pytest.importorskip("torch")
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    theirs = randomised(torch, ChameleonVQVAE(ChameleonVQVAEConfig(
        base_channels=CONFIG.channels, channel_multiplier=list(CONFIG.channel_multipliers), num_res_blocks=CONFIG.num_res_blocks,
        latent_channels=CONFIG.latent_channels, embed_dim=CONFIG.embed_dim, num_embeddings=CONFIG.num_codes, resolution=16,
    )))  # fmt: skip
    ours = to_ours(dict(theirs.named_parameters()))
    # transformers has no decoder; every other name is Meta's.
    assert set(ours) == {n for n in flatten(abstract(CONFIG)) if not n.startswith("decoder.")}
    model = with_params(CONFIG, ours)

    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 24, 16, 3)).astype(np.float32)
    with torch.no_grad():
        want = theirs.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        latent = theirs.quant_conv(want.last_hidden_state).numpy().transpose(0, 2, 3, 1)
    got = jax.jit(VQGAN.encode_latent)(model, pixels)
    np.testing.assert_allclose(got, latent, atol=2e-5, rtol=2e-5)
    codes = np.asarray(jax.jit(VQGAN.encode)(model, pixels))
    np.testing.assert_array_equal(codes, want.image_tokens.numpy().reshape(3, 6, 4))
    assert len(np.unique(codes)) > 20
    np.testing.assert_array_equal(model.quantize(got)[1], np.asarray(model.quantize.rows)[codes])


def test_decoder_is_transformers():
    """Janus' decoder is Chameleon's with attention added at the coarsest level, and stores `up` in the order it runs."""
    torch = pytest.importorskip("torch")
    from transformers import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

    theirs = randomised(torch, JanusVQVAEDecoder(JanusVQVAEConfig(
        base_channels=CONFIG.channels, channel_multiplier=list(CONFIG.channel_multipliers), num_res_blocks=CONFIG.num_res_blocks,
        latent_channels=CONFIG.latent_channels, out_channels=3,
    )))  # fmt: skip
    for level in theirs.up:
        level.attn = torch.nn.ModuleList()
    last = len(CONFIG.channel_multipliers) - 1
    turned = {
        ".".join([*parts[:1], str(last - int(parts[1])), *parts[2:]] if (parts := name.split("."))[0] == "up" else parts): p
        for name, p in theirs.named_parameters()
    }
    decoder = abstract(CONFIG).decoder
    params = to_ours(turned)
    assert set(params) == set(flatten(decoder))
    decoder = unflatten(decoder, params)
    latent = np.random.default_rng(1).normal(size=(2, 6, 4, CONFIG.latent_channels)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(latent.transpose(0, 3, 1, 2).copy())).numpy().transpose(0, 2, 3, 1)
    assert want.shape == (2, 24, 16, 3)
    np.testing.assert_allclose(jax.jit(lambda d, z: d(z))(decoder, latent), want, atol=1e-4, rtol=1e-4)


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
