"""A tiny model and pictures for whole runs."""

import jax
import numpy as np
import PIL.Image
import pytest

from tests.helpers import FP32, TINY, tiny_tokenizer
from xprompt_jax import XPrompt
from xprompt_jax.data.images import save_png
from xprompt_jax.model.chameleon import Chameleon
from xprompt_jax.model.vqgan import VQGAN


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """Two models of other weights and one tokenizer, saved."""
    folders = []
    for seed in (0, 7):
        folders.append(tmp_path_factory.mktemp("m") / f"tiny-{seed}")
        decoder, vqgan = Chameleon(TINY, jax.random.key(seed)), VQGAN(TINY.vq, jax.random.key(1))
        XPrompt(decoder, vqgan, tiny_tokenizer(), compute=FP32).save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="session")
def pair_folder(tmp_path_factory):
    """14 smooth pairs in input/ and target/."""
    root = tmp_path_factory.mktemp("pairs")
    for i in range(14):
        for side in ("input", "target"):
            low = np.random.default_rng([i, side == "input"]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            save_png(PIL.Image.fromarray(low).resize((26, 20), PIL.Image.Resampling.BICUBIC), root / side / f"{i:02d}.png")
    return root
