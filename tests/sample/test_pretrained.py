"""Model folders: saved, loaded, sharded, refused."""

import jax
import numpy as np
import pytest

from tests.helpers import FP32, TINY, tiny_tokenizer
from xprompt_jax import UserError, XPrompt
from xprompt_jax.config import MeshConfig
from xprompt_jax.mesh import make_mesh
from xprompt_jax.model.chameleon import Chameleon
from xprompt_jax.model.params import flatten
from xprompt_jax.model.vqgan import VQGAN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    XPrompt(Chameleon(TINY, jax.random.key(0)), VQGAN(TINY.vq, jax.random.key(1)), tiny_tokenizer(), compute=FP32).save_pretrained(path)
    return path


def test_round_trip_is_exact(folder):
    model = XPrompt.from_pretrained(folder)
    for mine, theirs in ((model.decoder, Chameleon(TINY, jax.random.key(0))), (model.vqgan, VQGAN(TINY.vq, jax.random.key(1)))):
        for name, value in flatten(theirs).items():
            np.testing.assert_array_equal(flatten(mine)[name], value)
    assert model.tokenizer.fingerprint == tiny_tokenizer().fingerprint
    assert model.xp_embeddings.shape == (TINY.num_xp_tokens, TINY.dim)
    again = XPrompt.from_pretrained(folder, dtype="bfloat16")
    assert again.xp_embeddings.dtype == "bfloat16" and again.fingerprint == model.fingerprint
    assert XPrompt.from_pretrained(folder, dtype="float16").fingerprint == model.fingerprint
    for options, message in (({"dtype": "fp16"}, "dtype 'fp16' is unknown"), ({"image_head": "x"}, "image_head 'x' is unknown"),
                             ({"layout": "x"}, "layout 'x' is unknown")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            XPrompt.from_pretrained(folder, **options)


def test_loads_onto_a_mesh(folder):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    model = XPrompt.from_pretrained(folder, mesh=mesh)
    assert model.decoder.embed[...].sharding.spec == jax.P("tensor", "fsdp")
    ids = np.arange(12).reshape(2, 6)
    np.testing.assert_allclose(model.logits(ids), XPrompt.from_pretrained(folder).logits(ids), atol=1e-4)


def test_saving_again_replaces(folder, tmp_path):
    model = XPrompt.from_pretrained(folder)
    for _ in range(2):
        model.save_pretrained(tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    (tmp_path / "models" / "others").mkdir(parents=True)
    with pytest.raises(UserError, match="models: there already, and not a model folder"):
        model.save_pretrained(tmp_path / "models")
    assert (tmp_path / "models" / "others").exists()


def test_incomplete_folders_are_refused(folder, tmp_path):
    import shutil

    with pytest.raises(UserError, match="no such model folder"):
        XPrompt.from_pretrained(tmp_path / "none")
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "text_tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no text_tokenizer\.json"):
        XPrompt.from_pretrained(tmp_path / "m")
    shutil.copy(folder / "text_tokenizer.json", tmp_path / "m")
    text = (folder / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(text.replace('"dim": 32', '"dim": 64'))
    with pytest.raises(UserError, match="config.json asks for"):
        XPrompt.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(text.replace('"dim"', '"dimension"'))
    with pytest.raises(UserError, match="unknown key 'dimension'"):
        XPrompt.from_pretrained(tmp_path / "m")
