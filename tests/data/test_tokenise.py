"""From a dataset to a store: exact colours, mirrors, several stores in one, manifests, the command line."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest

from tests.data.made import MADE
from tests.data.making import N, normal_map
from tests.helpers import FP32, TINY, TINY_VQ, tiny_tokenizer
from xprompt_jax.data import palettes
from xprompt_jax.data.datasets import get_dataset
from xprompt_jax.data.datasets.export import export
from xprompt_jax.data.datasets.tfds import Prepared, prepare
from xprompt_jax.data.flips import Mirrored, mirror, mirror_words
from xprompt_jax.data.images import open_image, resize_center_crop, to_pixels
from xprompt_jax.data.sources import Record, manifest
from xprompt_jax.data.tokenise import Store, merge, tokenize
from xprompt_jax.errors import UserError
from xprompt_jax.model.vqgan import VQGAN


@pytest.fixture(scope="module")
def vqgan():
    return VQGAN(TINY_VQ, jax.random.key(1))


def opened(name, layout, root, split="", **options):
    root.mkdir(exist_ok=True)
    MADE[name, layout](root)
    return get_dataset(name).open(root, split, allow_partial=True, **options)


def store_of(records, vqgan, path, **options):
    return tokenize(records, vqgan, tiny_tokenizer(), path, progress=False, **options)


def test_colours_that_are_numbers_are_not_mixed(vqgan, tmp_path):
    labels = np.random.default_rng(0).integers(0, 150, (33, 47))
    picture = PIL.Image.fromarray(palettes.max_separation(150).encode(labels))
    for exact, known in ((True, 1.0), (False, 0.5)):
        small = resize_center_crop(picture, 16, exact=exact)
        there = {tuple(color) for color in palettes.max_separation(150).colors.tolist()}
        share = np.mean([tuple(color) in there for color in small.reshape(-1, 3).tolist()])
        assert share == known if exact else share < known
    pairs = opened("ade20k", "ADEChallengeData2016", tmp_path / "ade", "train")
    store = store_of(pairs, vqgan, tmp_path / "store")
    for record, pair in zip(pairs, store.pairs, strict=True):
        want = vqgan.encode(to_pixels(resize_center_crop(open_image(record.output), 16, exact=True))[None])[0]
        np.testing.assert_array_equal(store.codes[pair.output], want)


def test_a_mirror_turns_normals_and_words():
    rgb = normal_map(3)
    there, back = palettes.decode_normals(rgb[2:]), palettes.decode_normals(palettes.mirror_normals(rgb)[2:])
    np.testing.assert_allclose(back, there[:, ::-1] * [-1, 1, 1], atol=1e-6)
    assert not palettes.mirror_normals(rgb)[:2].any()
    np.testing.assert_array_equal(palettes.mirror_normals(palettes.mirror_normals(rgb)), rgb)
    exact = palettes.decode_normals(palettes.mirror_normals(palettes.encode_normals(there)))
    np.testing.assert_allclose(exact, palettes.decode_normals(palettes.encode_normals(there * [-1, 1, 1]))[:, ::-1], atol=1e-6)
    assert (
        mirror_words("Left of the leftmost cat, right; bright, turn clockwise")
        == "Right of the rightmost cat, left; bright, turn counterclockwise"
    )
    photo = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    normals = Record(photo, rgb, "normals of the left", task="normals")
    turned = mirror(normals)
    np.testing.assert_array_equal(turned.input, photo[:, ::-1])
    np.testing.assert_array_equal(turned.output, palettes.mirror_normals(rgb))
    assert turned.instruction == "normals of the right"
    np.testing.assert_array_equal(mirror(dataclasses.replace(normals, task="derain")).output, rgb[:, ::-1])
    control = mirror(Record(rgb, photo, "paint", task="control_normal", more_inputs=(photo,)))
    np.testing.assert_array_equal(control.input, palettes.mirror_normals(rgb))
    np.testing.assert_array_equal(control.more_inputs[0], photo[:, ::-1])


def test_training_pairs_are_mirrored_and_no_others(tmp_path):
    pairs = opened("gopro", "MPRNet's", tmp_path)
    turned = Mirrored(pairs)
    assert len(turned) == 3 * N and [r.split for r in turned] == ["train"] * N + ["eval"] * N + ["train"] * N
    for i in range(N):
        np.testing.assert_array_equal(turned[2 * N + i].output, np.asarray(open_image(pairs[i].output))[:, ::-1])
        assert turned[i].output == pairs[i].output


def test_stores_become_one(vqgan, tmp_path):
    first = store_of(opened("lol_v1", "official", tmp_path / "a"), vqgan, tmp_path / "first", batch=3)
    second = store_of(opened("magicbrush", "parquet, test unpacked", tmp_path / "b"), vqgan, tmp_path / "second")
    third = store_of(opened("ip_adapter", "JSONL", tmp_path / "c"), vqgan, tmp_path / "third")
    whole = merge([tmp_path / "first", tmp_path / "second", tmp_path / "third"], tmp_path / "all")
    assert len(whole.pairs) == sum(len(s.pairs) for s in (first, second, third))
    apart = [(s, pair) for s in (first, second, third) for pair in s.pairs]
    for pair, (store, before) in zip(whole.pairs, apart, strict=True):
        for now, then in zip((pair.input, pair.output, *pair.more_inputs), (before.input, before.output, *before.more_inputs), strict=True):
            np.testing.assert_array_equal(whole.codes[now], store.codes[then])
        assert dataclasses.replace(pair, input=0, output=0, more_inputs=()) == dataclasses.replace(
            before, input=0, output=0, more_inputs=()
        )
    rows = [json.loads(line) for line in (tmp_path / "all" / "holdouts.jsonl").read_text().splitlines()]
    assert rows and all(whole.pairs[row["pair"]].instruction == row["instruction"] for row in rows)
    Store.open(tmp_path / "all", vqgan=vqgan)
    store_of(opened("lol_v1", "official", tmp_path / "a"), VQGAN(TINY_VQ, jax.random.key(2)), tmp_path / "other")
    with pytest.raises(UserError, match="other: vqgan .*; tokenize both with one model"):
        merge([tmp_path / "first", tmp_path / "other"], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_codes_are_written_as_they_come(vqgan, tmp_path):
    """However they are batched, and whatever NumPy reads back, the file is the one that np.save writes."""
    pairs = opened("lol_v1", "official", tmp_path / "a")
    small, large = (store_of(pairs, vqgan, tmp_path / f"{batch}", batch=batch) for batch in (3, 64))
    np.testing.assert_array_equal(small.codes, large.codes)
    assert small.codes.dtype == np.uint16 and small.codes.shape == (len(large.codes), 4, 4)
    np.save(tmp_path / "saved.npy", np.asarray(small.codes))
    assert (tmp_path / "saved.npy").read_bytes() == (tmp_path / "3" / "codes.npy").read_bytes()


def test_older_stores_open(vqgan, tmp_path):
    store = store_of(opened("lol_v1", "official", tmp_path / "a"), vqgan, tmp_path / "s")
    path = tmp_path / "s" / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k not in ("more_inputs", "holdout")}) + "\n" for row in rows))
    assert Store.open(tmp_path / "s").pairs == store.pairs


@pytest.mark.parametrize("name, layout", [("viton_hd", "zip"), ("ultraedit", "UltraEdit_500k"), ("ade20k", "ADEChallengeData2016")])
def test_a_dataset_becomes_a_manifest(name, layout, tmp_path):
    pairs = opened(name, layout, tmp_path / "copy", "train")
    assert export(pairs, tmp_path / "out", progress=False) == len(pairs)
    for record, again in zip(pairs, manifest(tmp_path / "out" / "pairs.jsonl"), strict=True):
        images = (record.input, record.output, *record.more_inputs)
        for image, twin in zip(images, (again.input, again.output, *again.more_inputs), strict=True):
            np.testing.assert_array_equal(np.asarray(open_image(image)), np.asarray(open_image(twin)))
        plain = {"input": 0, "output": 0, "more_inputs": ()}
        assert dataclasses.replace(record, **plain) == dataclasses.replace(again, **plain)


def test_pairs_go_through_tensorflow_datasets_without_tensorflow(tmp_path):
    import grain

    pairs = opened("viton_hd", "zip", tmp_path / "copy")
    folder = prepare({"train": pairs}, tmp_path / "tfds", name="try_on")
    again = get_dataset("tfds_pairs").open(folder)
    words = lambda r: (r.instruction, r.task, r.group, r.split, r.exact, len(r.more_inputs))
    assert sorted(map(words, again)) == sorted(map(words, pairs))
    images = lambda r: np.asarray(open_image(r.input)).tobytes() + np.asarray(open_image(r.more_inputs[0])).tobytes()
    assert sorted(map(images, again)) == sorted(map(images, pairs))
    batch = grain.MapDataset.source(Prepared(folder, "train")).shuffle(seed=1).map(lambda row: row["input"]).batch(2)[0]
    assert batch.shape == (2, 20, 28, 3)
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match="there is a copy already"):
        prepare({"train": pairs}, tmp_path / "tfds", name="try_on")
    with pytest.raises(UserError, match="no split 'test', but train"):
        Prepared(folder, "test")
    with pytest.raises(UserError, match="not a copy prepared by TensorFlow Datasets"):
        Prepared(tmp_path, "train")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from xprompt_jax.model.chameleon import Chameleon
    from xprompt_jax.sample.sampler import XPrompt

    path = tmp_path_factory.mktemp("model") / "tiny"
    XPrompt(Chameleon(TINY, jax.random.key(0)), VQGAN(TINY.vq, jax.random.key(1)), tiny_tokenizer(), compute=FP32).save_pretrained(path)
    return path


def run(*arguments):
    from xprompt_jax.cli import main

    main([str(a) for a in arguments])


def test_the_command_takes_datasets(model, tmp_path, capsys, caplog):
    run("tokenize", "--list")
    assert "gopro  GoPro" in capsys.readouterr().out
    MADE["gopro", "MPRNet's"](tmp_path / "copy")
    MADE["rain13k", "MPRNet's"](tmp_path / "rain")
    base = ("tokenize", "--model", model, "--dataset", "gopro", "--root", tmp_path / "copy")
    with pytest.raises(SystemExit) as stopped:
        run(*base, "--out", tmp_path / "g")
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and "accept it with --allow-partial" in error[-1] and not (tmp_path / "g").exists()
    run(*base, "--out", tmp_path / "g", "--allow-partial", "--mirror")
    assert "partial or another release, accepted" in caplog.text and f"{tmp_path / 'g'}: {3 * N} pairs" in capsys.readouterr().out
    run("tokenize", "--model", model, "--dataset", "rain13k", "--root", tmp_path / "rain", "--split", "Rain100L", "--allow-partial",
        "--out", tmp_path / "r")  # fmt: skip
    run("tokenize", "--out", tmp_path / "all", "--stores", tmp_path / "g", tmp_path / "r")
    whole = Store.open(tmp_path / "all")
    assert {p.task for p in whole.pairs} == {"deblur", "derain"} and {p.split for p in whole.pairs if p.task == "derain"} == {"eval"}
    run("tokenize", "--dataset", "gopro", "--root", tmp_path / "copy", "--allow-partial", "--export", tmp_path / "flat")
    assert len(list(manifest(tmp_path / "flat" / "pairs.jsonl"))) == 2 * N


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "gopro", "--out", "o"], "--dataset and --root belong together"),
    (["--dataset", "gopro", "--root", "r", "--manifest", "m"], "give one source"),
    (["--world", "1", "--mirror", "--out", "o", "--model", "m"], "--mirror works on --dataset"),
    (["--manifest", "m", "--split", "test", "--out", "o", "--model", "m"], "--split works on --dataset, not on --manifest"),
    (["--manifest", "m", "--reverse-instruction", "x", "--out", "o", "--model", "m"], "--reverse-instruction works on --inputs"),
    (["--world", "1", "--seed", "-1", "--out", "o", "--model", "m"], "--seed must not be negative"),
    (["--dataset", "gopro", "--root", "r", "--export", "e", "--out", "o"], "--export writes a manifest, --out a store"),
    (["--world", "1", "--export", "o"], "--export writes out a --dataset"),
    (["--world", "1", "--model", "m"], "--out is missing"),
    (["--world", "1", "--out", "o"], "--model is missing"),
    (["--dataset", "gopro", "--root", "/none", "--export", "o"], "--root /none: no such folder"),
    (["--dataset", "nyuv2_depth", "--root", "r", "--export", "o", "--palette", "hsv"], "depth palette 'hsv' is unknown"),
    (["--stores", "/none", "--out", "o"], "/none: not a complete token store"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("tokenize", *arguments)
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and message in error[-1]


def test_help_is_quick_and_whole():
    shown = subprocess.run([sys.executable, "-m", "xprompt_jax", "tokenize", "--help"], capture_output=True, text=True)
    assert "--allow-partial" in shown.stdout, shown.stderr
