"""Model folders of every format, made for the tests."""

from __future__ import annotations

import json

import jax
import numpy as np

from tests.convert.reference import random_checkpoint
from tests.helpers import TINY_VQ, tiny_tokenizer
from xprompt_jax.convert.huggingface import HuggingFaceTarget
from xprompt_jax.convert.torchwriter import TorchWriter
from xprompt_jax.convert.vqgan import write_vqgan
from xprompt_jax.convert.weights import VQGAN_PREFIX, shapes_of
from xprompt_jax.model.params import flatten
from xprompt_jax.model.vqgan import VQGAN

SIZES = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 4, "ffn": 48, "vocab": 448}


def meta_folder(path, rng=None, *, ranks=1, swin=False, dtype=np.float32, tree=True, **sizes):
    """Meta's download: `path`/models/tiny and `path`/tokenizer (or all in one folder). Returns its ranks' tensors."""
    sizes = {**SIZES, **sizes}
    checkpoint = random_checkpoint(rng or np.random.default_rng(0), ranks=ranks, dtype=dtype, **sizes)
    model, words = (path / "models" / "tiny", path / "tokenizer") if tree else (path, path)
    for folder in (model, words):
        folder.mkdir(parents=True, exist_ok=True)
    for rank, tensors in enumerate(checkpoint):
        with TorchWriter(model / ("consolidated.pth" if ranks == 1 else f"consolidated.{rank:02d}.pth")) as out:
            for name, value in tensors.items():
                out.write(name, value)
    params = {"dim": sizes["dim"], "n_layers": sizes["layers"], "n_heads": sizes["heads"], "swin_norm": swin, "norm_eps": 1e-5,
              "rope_theta": 10000.0}  # fmt: skip
    (model / "params.json").write_text(json.dumps({"model": params} if ranks > 1 else params))
    (model / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": ranks}))
    tiny_tokenizer().save(words / "text_tokenizer.json")
    write_vqgan(words, TINY_VQ, vqgan_tensors())
    return checkpoint


def vqgan_tensors():
    return {name: np.asarray(value) for name, value in flatten(VQGAN(TINY_VQ, jax.random.key(1))).items()}


def random_tensors(config, rng, dtype=np.float32, vqgan_dtype=np.float32):
    """Random values for every tensor of a model under our names; norms and biases too."""

    def draw(name, shape):
        fan = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
        value = rng.standard_normal(shape) / np.sqrt(fan)
        if name == "embed":
            value *= np.sqrt(fan)
        elif name.endswith("norm") or name.endswith("scale"):
            value = 1 + 0.3 * value
        return value.astype(vqgan_dtype if name.startswith(VQGAN_PREFIX) else dtype)

    return {name: draw(name, shape) for name, shape in shapes_of(config).items()}


def write_huggingface(path, config, tensors, shard_bytes=None):
    """A folder in Hugging Face's format."""
    path.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save(path / "words.json")
    sizes = {name: value.itemsize for name, value in tensors.items()}
    target = HuggingFaceTarget(path, config, sizes, **({} if shard_bytes is None else {"shard_bytes": shard_bytes}))
    for part in target.parts():
        target.write(part, tensors.__getitem__)
    target.finish(path / "words.json")
    (path / "words.json").unlink()
    return path


def same_bits(a, b):
    """Equal in type, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
