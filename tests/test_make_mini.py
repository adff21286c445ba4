"""The command that makes the mini, from rendering to a model and on to its second stage, at the size of a toy."""

import sys

import numpy as np
import pytest

from tools import make_mini
from xprompt_jax import UserError, XPrompt
from xprompt_jax.data.store import Store

TOY = """
import dataclasses, runpy
from tests.helpers import FP32, TINY
from xprompt_jax.config import TrainConfig

recipe = runpy.run_path("configs/RECIPE")["config"]
buckets = tuple(dataclasses.replace(bucket, rows=8) for bucket in recipe.data.buckets[:2])  # over the devices of the tests
config = dataclasses.replace(
    recipe, data=dataclasses.replace(recipe.data, buckets=buckets), compute=FP32,
    model=dataclasses.replace(TINY, vocab_size=640, num_xp_tokens=recipe.model.num_xp_tokens // 8),
    train=TrainConfig(steps=1, eval_batches=1, eval_every=1, save_every=1, init_from=recipe.train.init_from),
)
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Calls the command on a toy of a recipe; everything goes to tmp_path / out."""

    def call(recipe, *flags):
        config = tmp_path / recipe
        config.write_text(TOY.replace("RECIPE", recipe))
        small = ["--groups", "44", "--pairs-per-group", "4", "--vq-steps", "1", "--vq-batch", "2"]
        monkeypatch.setattr(sys, "argv", ["make_mini", "--config", str(config), "--out", str(tmp_path / "out"), *small, *map(str, flags)])
        make_mini.main()

    return call


def test_both_stages(make, tmp_path):
    make("mini_cpu.py", "--tasks", "denoise", "depth", "sepia", "recolor")
    assert {pair.task for pair in Store.open(tmp_path / "out/tokens").pairs} == {"denoise", "depth", "sepia", "recolor"}
    first = XPrompt.from_pretrained(tmp_path / "out/run/model")
    assert first.xp_embeddings.shape == (2, 32) and len(Store.open(tmp_path / "out/tokens").pairs) == 4 * 44
    make("mini_several.py", "--run", "second", "--train.init-from", tmp_path / "out/run/model", "--optim.learning-rate", 0)
    second = XPrompt.from_pretrained(tmp_path / "out/second/model")
    # At learning rate 0 all is as it was but for the XP tokens that were added: each like one that was there.
    want, had = np.asarray(second.xp_embeddings), np.asarray(first.xp_embeddings)
    np.testing.assert_allclose(want[:2], had, rtol=1e-5)  # averaged with itself
    added = want[2:] - had
    assert want.shape == (4, 32) and 0.01 < np.abs(added).max() / np.std(had) < 1
    np.testing.assert_allclose(second.decoder.blocks.mlp.up[...], first.decoder.blocks.mlp.up[...], rtol=1e-5)


def test_a_wrong_start_is_told_before_the_work(make, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        make("mini_several.py", "--train.init-from", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_start_with_other_codes_is_told_before_the_work(make, tmp_path):
    with pytest.raises(UserError, match="mini was made by another VQGAN"):
        make("mini_cpu.py", "--tokenizers", "mini")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flag", "number", "least"), [("--groups", 4, 5), ("--pairs-per-group", 1, 2), ("--vq-steps", 0, 1)])
def test_numbers_that_leave_nothing_to_train_on(make, capsys, flag, number, least):
    with pytest.raises(SystemExit, match="2"):
        make("mini_cpu.py", flag, number)
    assert f"argument {flag}: '{number}' is not a whole number of at least {least}" in capsys.readouterr().err
