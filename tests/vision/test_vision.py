"""CLIP and DINO from every kind of file beside PyTorch's, their tokenizer and preprocessing beside transformers', and damaged files."""

import json
import pickle

import msgpack
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import transformers
from flax import serialization

from tests.vision import made
from xprompt_jax.errors import UserError
from xprompt_jax.vision.clip import CLIP
from xprompt_jax.vision.dino import DINO
from xprompt_jax.vision.preprocess import IMAGENET_MEAN, IMAGENET_STD, clip_pixels, dino_pixels
from xprompt_jax.vision.tokenizer import ClipTokenizer
from xprompt_jax.vision.vit import in_batches

TEXTS = ["remove the rain", "Make it NIGHT!", "", "add 12 red balls; a photo's " * 5, "x", "don't café &amp; no   space\n\tthe end"]


def picture(seed, width=45, height=37):
    low = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(low).resize((width, height), PIL.Image.Resampling.BICUBIC)


PICTURES = [picture(0), picture(1, 32, 64), picture(2, 33, 32)]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def randomise(torch, model):
    """Norms and biases too, or a swap of them would go unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + ("norm" in name and "weight" in name))
    return model.eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIPModel of transformers, in a folder that it saved."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("clip")
    vocab, _ = made.bpe(folder)
    config = {**made.CLIP_CONFIG, "text_config": {**made.CLIP_CONFIG["text_config"], "eos_token_id": vocab["<|endoftext|>"]}}
    config["text_config"]["bos_token_id"] = vocab["<|startoftext|>"]
    model = randomise(torch, transformers.CLIPModel(transformers.CLIPConfig(**config)))
    model.save_pretrained(folder)
    return torch, folder, model


def features(torch, model, folder, texts, pictures):
    """transformers' own features, of its own tokenizer's ids."""
    vocab, merges = made.bpe(folder)
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
    pixels = np.stack([clip_pixels(p, 32) for p in pictures]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        found = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], pixel_values=torch.tensor(pixels))
    return found.text_embeds.numpy(), found.image_embeds.numpy()


@pytest.mark.parametrize("kind", ["huggingface", "bin", "flax", "open_clip"])
def test_clip_features_are_those_of_torch(clip, kind, tmp_path):
    torch, folder, model = clip
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    if kind == "huggingface":
        made.bpe(folder)
        ours = CLIP.load(folder)  # what save_pretrained wrote
    elif kind == "bin":
        made.write_clip(tmp_path, tensors=tensors)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        ours = CLIP.load(tmp_path)
    else:
        ours = CLIP.load(made.write_clip(tmp_path, kind, tensors))
    texts = [t for t in TEXTS if "&" not in t]
    text, image = features(torch, model, folder, texts, PICTURES)
    np.testing.assert_allclose(ours(texts), text, atol=1e-4)
    np.testing.assert_allclose(ours.images(PICTURES), image, atol=1e-4)
    assert ours.dim == 24 and ours(texts).dtype == np.float32 and ours.images([]).shape == (0, 24)
    assert ours.name == CLIP.load(made.write_clip(tmp_path / "again", "flax", tensors)).name, "a name belongs to weights, not to a file"


def test_clip_without_config_takes_openai_s_choices(tmp_path):
    """64 dimensions a head and QuickGELU; open_clip's own configuration without quick_gelu means GELU."""
    folder = made.write_clip(tmp_path, "open_clip")
    with_config = CLIP.load(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert with_config.text.blocks.config.activation == "quick_gelu" and with_config.text.blocks.config.num_heads == 4
    assert with_config.image.tower.blocks.config.num_heads == 5
    del config["model_cfg"]["quick_gelu"]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert CLIP.load(folder).text.blocks.config.activation == "gelu"
    assert not np.allclose(CLIP.load(folder)(["rain"]), with_config(["rain"]), atol=1e-3)
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match="0 attention heads do not divide a width of 32"):
        CLIP.load(folder)


def test_a_text_has_the_same_features_alone_and_among_others(tmp_path):
    clip = CLIP.load(made.write_clip(tmp_path))
    together = clip(TEXTS)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(clip([text])[0], together[i], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    rows = np.arange(15.0).reshape(5, 3)
    seen = []
    np.testing.assert_array_equal(in_batches(lambda x: seen.append(x.shape) or 2 * x, rows, most=3), 2 * rows)
    assert seen == [(4, 3), (2, 3)]


@pytest.mark.parametrize("kind", ["huggingface", "meta"])
def test_dino_features_are_those_of_torch(kind, tmp_path):
    torch = pytest.importorskip("torch")
    eps = {"huggingface": 1e-12, "meta": 1e-6}[kind]
    config = {**made.DINO_CONFIG, "layer_norm_eps": eps}
    if kind == "meta":  # no configuration beside it: 64 dimensions a head
        config |= {"hidden_size": 128, "num_attention_heads": 2}
    model = randomise(torch, transformers.ViTModel(transformers.ViTConfig(**config)))
    model.save_pretrained(tmp_path / "hf")
    place = tmp_path / "hf"
    if kind == "meta":
        tensors = safetensors.numpy.load_file(place / "model.safetensors")
        tensors = {name: value for name, value in tensors.items() if not name.startswith("pooler")}
        place = tmp_path / "dino_deitsmall16_pretrain.pth"
        torch.save({name: torch.tensor(value) for name, value in made.as_meta(tensors).items()}, place)
    pixels = np.stack([dino_pixels(p, 32) for p in PICTURES]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        wanted = model(torch.tensor(pixels)).last_hidden_state[:, 0].numpy()
    dino = DINO.load(place)
    np.testing.assert_allclose(dino.images(PICTURES), unit(wanted), atol=1e-4)
    assert dino.tower.blocks.config.eps == eps and dino.images([]).shape == (0, dino.dim)


def test_tokens_are_those_of_transformers(tmp_path):
    vocab, merges = made.bpe(tmp_path)
    theirs = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    plain = ClipTokenizer(tmp_path, 20)
    theirs.save_pretrained(tmp_path)
    whole = ClipTokenizer(tmp_path, 20)
    assert (tmp_path / "tokenizer.json").is_file() and plain.vocab_size == len(vocab) == whole.vocab_size
    texts = [t for t in TEXTS if "&" not in t] + ["日本 ÀÉ", "it's we'll'stuff 1,234.5_x", "🙂 ok", "<|endoftext|> rain"]
    for text in texts:
        wanted = theirs(text, truncation=True, max_length=20)["input_ids"]
        assert plain([text]) == whole([text]) == [wanted], text
    assert plain(["remove the rain"])[0][1:-1] == [vocab[f"{w}</w>"] for w in ("remove", "the", "rain")]
    assert plain(["a &amp;amp; b"]) == plain(["a & b"]), "as OpenAI's code, twice"
    assert plain(["a \ud83d"]) == plain(["a ?"]), "half an emoji, of a JSON escape"
    assert len(plain(["rain " * 50])[0]) == 20 and plain(["rain " * 50])[0][-1] == plain.end


def test_clip_pixels_are_those_of_transformers():
    processor = transformers.CLIPImageProcessor.from_dict({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}})
    for image in (*PICTURES, picture(3, 100, 41), picture(4, 64, 600)):
        wanted = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        width, height = (32 * side // min(image.size) for side in image.size)
        if (max(width, height) - 32) % 4 != 3:  # there its crop lies a pixel beside torchvision's
            np.testing.assert_allclose(clip_pixels(image, 32), wanted, atol=1e-5)
    assert clip_pixels(picture(0, 300, 500)).shape == (224, 224, 3)


def test_crop_and_scale_against_a_picture_worked_by_hand():
    """Columns of a picture that needs no resizing: torchvision's offset is half the margin, rounded to even."""
    for margin, left in ((1, 0), (2, 1), (3, 2), (5, 2), (7, 4)):
        columns = np.broadcast_to(np.arange(32 + margin, dtype=np.uint8)[None, :, None], (32, 32 + margin, 3))
        pixels = clip_pixels(np.ascontiguousarray(columns), 32)
        assert round(float(pixels[0, 0, 0] * 0.26862954 + 0.48145466) * 255) == left
    # DINO: 256 by 512 stays, the middle 224 are taken.
    rows = np.broadcast_to((np.arange(512) // 2).astype(np.uint8)[:, None, None], (512, 256, 3))
    pixels = dino_pixels(np.ascontiguousarray(rows))
    assert pixels.shape == (224, 224, 3)
    np.testing.assert_allclose(pixels[:, 0] * IMAGENET_STD + IMAGENET_MEAN, rows[144:368, 0] / 255, atol=1e-6)


def damage(folder, kind):
    weights = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    match kind:
        case "nothing there":
            return folder / "none"
        case "no weights":
            weights.unlink()
        case "damaged":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "no tokenizer":
            (folder / "merges.txt").unlink()
        case "damaged tokenizer":
            (folder / "vocab.json").write_text("[")
        case "damaged config":
            (folder / "config.json").write_text("{")
        case "another activation":
            (folder / "config.json").write_text(json.dumps({"text_config": {"hidden_act": "relu", "num_attention_heads": 4}}))
        case "another model":
            safetensors.numpy.save_file(made.dino_tensors(), weights)
        case "a tensor missing":
            del tensors["vision_model.post_layernorm.bias"]
            safetensors.numpy.save_file(tensors, weights)
        case "another shape":
            tensors["text_model.encoder.layers.1.mlp.fc1.weight"] = np.zeros((48, 31), np.float32)
            safetensors.numpy.save_file(tensors, weights)
        case "a norm too long":
            tensors["vision_model.post_layernorm.bias"] = np.zeros(41, np.float32)
            safetensors.numpy.save_file(tensors, weights)
        case "no square":
            tensors["vision_model.embeddings.position_embedding.weight"] = np.zeros((16, 40), np.float32)
            safetensors.numpy.save_file(tensors, weights)
        case "small vocabulary":
            tensors["text_model.embeddings.token_embedding.weight"] = np.zeros((99, 32), np.float32)
            safetensors.numpy.save_file(tensors, weights)
    return folder


@pytest.mark.parametrize("kind, told", [
    ("nothing there", "none: no such folder or file; fetch one"),
    ("no weights", "no weights; give a folder with"),
    ("damaged", "model.safetensors: not a readable safetensors file"),
    ("no tokenizer", "no tokenizer.json, nor vocab.json and merges.txt"),
    ("damaged tokenizer", "vocab.json: not a readable tokenizer"),
    ("damaged config", "config.json: not readable"),
    ("another activation", "activation 'relu' is not known"),
    ("another model", "its weights are not CLIP's"),
    ("a tensor missing", "no tensor vision_model.post_layernorm.bias"),
    ("another shape", "tensors of unexpected shapes"),
    ("a norm too long", r"tower.norm.bias has shape \[41\], and \[40\] is needed"),
    ("no square", "16 positions are no square of patches"),
    ("small vocabulary", "the tokenizer has 5.. tokens, the model 99"),
])  # fmt: skip
def test_what_is_wrong_with_a_folder_is_one_line(kind, told, tmp_path):
    with pytest.raises(UserError, match=told) as caught:
        CLIP.load(damage(made.write_clip(tmp_path), kind))
    assert "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def test_flax_files_cannot_run_code(tmp_path, capsys):
    folder = made.write_clip(tmp_path, "flax")
    file = folder / "flax_model.msgpack"
    tree = made.as_flax(made.clip_tensors())
    packed = msgpack.packb(((1,), "object", pickle.dumps(Bomb())))
    objects, no_tree = msgpack.packb({"a": msgpack.ExtType(1, packed)}), msgpack.packb([1])
    for hostile in (pickle.dumps(Bomb()), b"", file.read_bytes()[:5000], objects, no_tree):
        file.write_bytes(hostile)
        with pytest.raises(UserError, match="flax_model.msgpack: not a readable Flax checkpoint"):
            CLIP.load(folder)
    tree["text_model"]["final_layer_norm"]["scale"] = "text"
    file.write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(UserError):
        CLIP.load(folder)
    (folder / "flax_model.msgpack").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="would run"):
        CLIP.load(folder)
    assert capsys.readouterr().out == ""


def test_wrong_places_are_told(tmp_path):
    folder = made.write_clip(tmp_path / "c")
    with pytest.raises(UserError, match="a file; give the folder it lies in"):
        CLIP.load(folder / "model.safetensors")
    with pytest.raises(UserError, match="its weights are not DINO's"):
        DINO.load(folder)
    dino = made.write_dino(tmp_path / "d")
    with pytest.raises(UserError, match="not a kind of weights known here; give the folder"):
        DINO.load(dino / "model.safetensors")
    assert DINO.load(dino).name == DINO.load(dino).name != CLIP.load(folder).name
