"""A run from a configuration to a model folder, with everything a person may set around it."""

import dataclasses

import jax
import numpy as np
import PIL.Image
import pytest

from tests.convert.folders import meta_folder
from tests.helpers import FP32, TINY, random_decoder, tiny_tokenizer
from xprompt_jax import UserError, XPrompt
from xprompt_jax.cli import main
from xprompt_jax.config import BucketConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig
from xprompt_jax.convert.formats import open_source
from xprompt_jax.convert.native import load_tokenizers
from xprompt_jax.data.sources import Record
from xprompt_jax.data.store import Store
from xprompt_jax.data.tokenise import tokenize
from xprompt_jax.model.params import flatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.runner import check_tokenizers, export_checkpoint, run_training
from xprompt_jax.tokens import train_tokenizer


def config(store, **train):
    bucket = BucketConfig("in_context", examples=1, context=96, todo=96, answer=19, rows=8)
    return Config(
        model=TINY, compute=FP32, data=DataConfig(store=str(store), buckets=(bucket,)),
        optim=OptimConfig(warmup_steps=1), train=TrainConfig(eval_batches=1, **{"steps": 2, "save_every": 2, "eval_every": 1} | train),
    )  # fmt: skip


def test_held_out_pictures_while_training(world_store, tmp_path):
    run_training(config(world_store, samples=2), tmp_path, progress=False)
    pictures = [np.asarray(PIL.Image.open(tmp_path / "samples" / f"{step:07d}.png")) for step in (1, 2)]
    held_out = [p for p in Store.open(world_store).pairs if p.split == "eval"]
    groups = sorted({p.group for p in held_out}, key=[p.group for p in held_out].index)
    model, codes = XPrompt.from_pretrained(tmp_path / "model"), Store.open(world_store).codes
    stored = XPrompt(model.decoder, VQGAN(TINY.vq, jax.random.key(1)), model.tokenizer)  # with the VQGAN that made the store
    for picture in pictures:
        assert picture.shape == (2 * 16, 5 * 16, 3)
        for row, group in enumerate(groups[:2]):
            example, query = [p for p in held_out if p.group == group][:2]
            for column, number in ((0, example.input), (1, example.output), (2, query.input), (4, query.output)):
                want = np.asarray(stored.decode_images(codes[number][None].astype(np.int32))[0])
                np.testing.assert_array_equal(picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16], want)


def test_a_start_with_other_tokenizers_is_told(world_store, tmp_path, caplog):
    """The store's own raise no alarm; the codes or the words of others mean something else, which no loss would say."""
    vqgan, tokenizer = load_tokenizers(world_store / "tokenizers")
    others = train_tokenizer(["quite other words"] * 9, num_codes=TINY.vq.num_codes, vocab_size=TINY.vocab_size)
    for name, parts, alarms in (
        ("same", (vqgan, tokenizer), []),
        ("words", (vqgan, others), ["text tokenizer"]),
        ("codes", (VQGAN(TINY.vq, jax.random.key(7)), tokenizer), ["image tokenizer"]),
    ):
        XPrompt(random_decoder(), *parts).save_pretrained(tmp_path / name)
        caplog.clear()
        run_training(config(world_store, steps=1, eval_every=0, init_from=str(tmp_path / name)), tmp_path / f"{name}_run", progress=False)
        told = [r.getMessage() for r in caplog.records if "was taught with another" in r.getMessage()]
        assert len(told) == len(alarms)
        assert all(alarm in line and str(tmp_path / name) in line for alarm, line in zip(alarms, told, strict=True))


def test_a_run_starts_from_any_format(world_store, tmp_path):
    """A Meta folder without XP embeddings gets as many as the run has; at learning rate 0, the rest comes out as it went in."""
    meta_folder(tmp_path / "m", kv_heads=2)
    start = open_source(tmp_path / "m/models/tiny", num_xp_tokens=3)
    vq = dataclasses.replace(start.config.vq, image_size=16)
    run = config(world_store, eval_every=0, init_from=str(tmp_path / "m/models/tiny"))
    run = dataclasses.replace(
        run, model=dataclasses.replace(start.config, vq=vq), optim=OptimConfig(learning_rate=0.0, warmup_steps=0, weight_decay=0.0)
    )
    (tmp_path / "run/checkpoints").mkdir(parents=True)  # as a run leaves it that was killed before its first save
    model = run_training(run, tmp_path / "run", progress=False)
    np.testing.assert_array_equal(model.decoder.blocks.mlp.up[...][1], start.read("blocks.1.mlp.up"))
    assert model.xp_embeddings.shape == (3, 32)
    assert not np.asarray(model.decoder.head[...])[:, 4:36].any()  # Meta's head cannot draw, so it starts at zero


@pytest.mark.parametrize("kind", ["all", "lora"])
def test_a_checkpoint_becomes_a_model_folder(world_store, tmp_path, kind, capsys):
    """The last step's is the model of the finished run, merged adapters and moving average included; any mesh's is read here."""
    run = config(world_store, save_every=1, keep=2)
    optim = OptimConfig(warmup_steps=1, trainable=kind, lora_rank=2, ema_decay=0.5)
    run_training(dataclasses.replace(run, optim=optim, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path / "run", progress=False)
    assert export_checkpoint(tmp_path / "run", tmp_path / "last") == 2
    want, last = (flatten(XPrompt.from_pretrained(path).decoder) for path in (tmp_path / "run/model", tmp_path / "last"))
    for name in want:
        np.testing.assert_array_equal(want[name], last[name], err_msg=name)
    main(["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "first"), "--step", "1"])
    assert "step 1 of" in capsys.readouterr().out
    assert not np.array_equal(flatten(XPrompt.from_pretrained(tmp_path / "first").decoder)["xp"], want["xp"])
    with pytest.raises(UserError, match=r"no checkpoint 7; there are \[1, 2\]"):
        export_checkpoint(tmp_path / "run", tmp_path / "x", step=7)
    with pytest.raises(UserError, match="none: no checkpoints; give the folder of a run"):
        export_checkpoint(tmp_path / "none", tmp_path / "x")
    (tmp_path / "run/checkpoints/2/_METADATA").unlink(missing_ok=True)
    for part in (tmp_path / "run/checkpoints/2").rglob("*"):
        if part.is_file() and "ocdbt" not in part.name and part.stat().st_size > 1000:
            part.write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint 2 cannot be read|no checkpoint 2"):
        export_checkpoint(tmp_path / "run", tmp_path / "x", step=2)
    assert not (tmp_path / "x").exists()


def test_as_many_pictures_as_are_asked_for_though_all_pairs_are_one_group(tmp_path):
    """As those of `xprompt tokenize --inputs --outputs` are."""
    pairs = [Record(noise(i), noise(i + 50), "remove the rain", group="derain", split="eval" if i < 7 else "train") for i in range(12)]
    tokenize(pairs, VQGAN(TINY.vq, jax.random.key(1)), tiny_tokenizer(), tmp_path / "store", progress=False)
    shape = lambda n: np.asarray(PIL.Image.open(tmp_path / f"{n}" / "samples" / "0000001.png")).shape
    for samples, rows in ((2, 2), (9, 3)):
        run_training(config(tmp_path / "store", samples=samples, steps=1), tmp_path / f"{samples}", progress=False)
        assert shape(samples) == (rows * 16, 5 * 16, 3)


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)


def test_tokenizers_that_are_not_the_models(tmp_path):
    vqgan, words = VQGAN(TINY.vq, jax.random.key(1)), train_tokenizer(["rain"], num_codes=TINY.vq.num_codes + 8, vocab_size=TINY.vocab_size)
    with pytest.raises(UserError, match="40 image words, the VQGAN 32 codes"):
        check_tokenizers(TINY, vqgan, words, tmp_path)


def test_what_does_not_belong_together_is_told(world_store, tmp_path):
    other = dataclasses.replace(config(world_store), model=dataclasses.replace(TINY, vq=dataclasses.replace(TINY.vq, embed_dim=4)))
    with pytest.raises(UserError, match="another VQGAN"):
        run_training(other, tmp_path, progress=False)
    small = dataclasses.replace(config(world_store), model=dataclasses.replace(TINY, vocab_size=300))
    with pytest.raises(UserError, match=r"model\.vocab_size 300 is below"):
        run_training(small, tmp_path, progress=False)
    with pytest.raises(UserError, match=r"another architecture|no such"):
        run_training(config(world_store, init_from=str(tmp_path / "none")), tmp_path, progress=False)
