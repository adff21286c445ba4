"""A tiny model and pictures for whole runs."""

import gc
import json

import jax
import numpy as np
import PIL.Image
import pytest

from tests.helpers import FP32, TINY, tiny_tokenizer
from tests.vision.made import write_clip, write_dino
from xprompt_jax import XPrompt
from xprompt_jax.cli import main
from xprompt_jax.data.images import save_png
from xprompt_jax.model.chameleon import Chameleon
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.model.vqgan import VQGAN


@pytest.fixture(scope="package", autouse=True)
def forget_compiled_programs():
    """In place of that of each module: the modules here share their programs, and forget them together."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="package", autouse=True)
def models_are_loaded_once():
    """A folder that is asked for again with the same options gives the model of before, with the programs it has compiled."""
    load, loaded = XPrompt.from_pretrained, {}

    def once(model, *, mesh=None, **options):
        if mesh is not None:
            return load(model, mesh=mesh, **options)
        key = str(model), repr(sorted(options.items()))
        if key not in loaded:
            loaded[key] = load(model, **options)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(XPrompt, "from_pretrained", once)
        yield


@pytest.fixture(scope="session")
def tiny_folders(tiny_model, tmp_path_factory):
    """Two models of other weights and one tokenizer, saved."""
    other = tmp_path_factory.mktemp("m") / "tiny-7"
    decoder, vqgan = Chameleon(TINY, jax.random.key(7)), VQGAN(TINY.vq, jax.random.key(1))
    XPrompt(decoder, vqgan, tiny_tokenizer(), compute=FP32).save_pretrained(other)
    return [tiny_model, other]


@pytest.fixture(scope="session")
def pair_folder(tmp_path_factory):
    """14 smooth pairs in input/ and target/."""
    root = tmp_path_factory.mktemp("pairs")
    for i in range(14):
        for side in ("input", "target"):
            low = np.random.default_rng([i, side == "input"]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            save_png(PIL.Image.fromarray(low).resize((26, 20), PIL.Image.Resampling.BICUBIC), root / side / f"{i:02d}.png")
    return root


def smooth(*seed, shape=(16, 16)):
    """A picture, uint8 [h, w, 3]."""
    low = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(low).resize(shape[::-1], PIL.Image.Resampling.BICUBIC))


@pytest.fixture(scope="session")
def pix2pix(tmp_path_factory):
    """InstructPix2Pix's folders: of 120 prompts 6 test and 6 validate, half of them additions, half removals (one of either twice)."""
    root = tmp_path_factory.mktemp("ip2p") / "clip-filtered-dataset"
    listed = []
    for i in range(120):
        name, seeds = f"{i:07d}", ["11", "22"] if i in (108, 114) else ["11"]
        listed.append([name, seeds])
        if i < 108:
            continue
        words = "make it night" if i == 119 else f"{'remove' if i % 2 else 'add'} a red ball {i}"
        words += "\ud83d" * (i in (112, 113))  # half an emoji
        (root / name).mkdir(parents=True)
        (root / name / "prompt.json").write_text(json.dumps({"input": "a photo", "edit": words, "output": f"a photo, {words}"}))
        for seed in seeds:
            for side in (0, 1):
                PIL.Image.fromarray(smooth(i, side, int(seed))).save(root / name / f"{seed}_{side}.jpg")
    (root / "seeds.json").write_text(json.dumps(listed))
    return root


@pytest.fixture(scope="session")
def pairs_run(tiny_folders, pair_folder, tmp_path_factory):
    """The first model on the pairs, two examples each; to read."""
    out = tmp_path_factory.mktemp("run") / "a"
    main(["eval", "pairs", "--model", str(tiny_folders[0]), "--data", str(pair_folder), "--out", str(out), "--examples", "2"])
    return out


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Folders of a random CLIP and a random DINO."""
    root = tmp_path_factory.mktemp("weights")
    return write_clip(root / "clip"), write_dino(root / "dino")


@pytest.fixture(scope="session")
def loud_model():
    """Random, with attention so strong that what it draws depends on the example and the input; to read."""
    decoder = Chameleon(TINY, jax.random.key(0))
    loud = ("blocks.attention.wv", "blocks.attention.wo")
    decoder = unflatten(decoder, {name: value * 8 if name in loud else value for name, value in flatten(decoder).items()})
    return XPrompt(decoder, VQGAN(TINY.vq, jax.random.key(1)), tiny_tokenizer(), compute=FP32)


@pytest.fixture(scope="session")
def loud_folder(loud_model, tmp_path_factory):
    """The same, saved."""
    path = tmp_path_factory.mktemp("m") / "loud"
    loud_model.save_pretrained(path)
    return path
