"""From a dataset to a store: exact colours, several stores in one, crops, manifests, TensorFlow datasets."""

import dataclasses
import json
import sys

import numpy as np
import PIL.Image
import pytest

from tests.data.jobs import opened, pixels, store_of
from tests.data.making import coded
from xprompt_jax.data import palettes
from xprompt_jax.data.crops import MIN_SIDE, crop_windows, cut
from xprompt_jax.data.datasets import get_dataset
from xprompt_jax.data.datasets.export import export
from xprompt_jax.data.datasets.tfds import Prepared, prepare
from xprompt_jax.data.images import open_image, resize_center_crop
from xprompt_jax.data.sources import Record, manifest
from xprompt_jax.data.store import Store
from xprompt_jax.data.tokenise import merge
from xprompt_jax.errors import UserError


def test_colours_that_are_numbers_are_not_mixed(vqgan, encode, tmp_path):
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
        want = encode(resize_center_crop(open_image(record.output), 16, exact=True))
        np.testing.assert_array_equal(store.codes[pair.output], want)


def test_stores_become_one(vqgan, other_vqgan, tmp_path):
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
    store_of(opened("lol_v1", "official", tmp_path / "a"), other_vqgan, tmp_path / "other")
    with pytest.raises(UserError, match="other: vqgan .*; tokenize both with one model"):
        merge([tmp_path / "first", tmp_path / "other"], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def gradient(width, height):
    """Red tells x, green y."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    return np.stack([*np.broadcast_arrays(x * 255, y[:, None] * 255), np.full((height, width), 9)], -1).round().astype(np.uint8)


def test_crops_show_the_same_place_of_both_images(vqgan, encode, tmp_path):
    small, large = gradient(60, 40), gradient(240, 160)
    windows = crop_windows(PIL.Image.fromarray(small), 4)
    assert len({window[0] for window in windows}) == 3 and windows == crop_windows(PIL.Image.fromarray(small), 4)
    shown = []
    for side, x, y in windows:
        assert MIN_SIDE <= side <= 1 and 0 <= x <= 1 and 0 <= y <= 1
        of_small, of_large = (cut(PIL.Image.fromarray(image), (side, x, y), 16) for image in (small, large))
        inside = (np.arange(16) + 0.5) / 16 * side * 40  # pixels of the small image from the window's left and top
        want = np.broadcast_arrays((x * (60 - 40 * side) + inside) / 60 * 255, ((y * (40 - 40 * side) + inside) / 40 * 255)[:, None])
        for image in (of_small, of_large):
            np.testing.assert_allclose(image[1:-1, 1:-1, :2], np.stack(want, -1)[1:-1, 1:-1], atol=2)
        shown += [of_small, of_large]
    labels = np.random.default_rng(0).choice([[255, 0, 0], [0, 255, 0]], (80, 120)).astype(np.uint8)
    record = Record(small, large, "enlarge", more_inputs=(pixels(0, (50, 70)),))
    store = store_of([record, Record(small, labels, "label", exact=True)], vqgan, tmp_path / "s", crops=4)
    first, second = store.pairs
    assert first.input == second.input and store.codes.shape == (4, 4, 4) and store.codes.num_crops == 4
    for number, source in (
        (first.input, small),
        (first.output, large),
        (first.more_inputs[0], record.more_inputs[0]),
        (second.output, labels),
    ):
        exact = number == second.output
        opened = PIL.Image.fromarray(source)
        want = [resize_center_crop(opened, 16, exact=exact), *(cut(opened, window, 16, exact=exact) for window in windows)]
        if exact:
            assert all({tuple(color) for color in crop.reshape(-1, 3).tolist()} == {(255, 0, 0), (0, 255, 0)} for crop in want)
        np.testing.assert_array_equal(store.codes.crops(number), [encode(crop) for crop in want])
        np.testing.assert_array_equal(store.codes[number], store.codes.crops(number)[0])
    with pytest.raises(UserError, match="--crops 5: must be 1 to 4"):
        store_of([record], vqgan, tmp_path / "t", crops=5)


def test_a_picture_in_other_crops_is_known(vqgan, tmp_path):
    """The output of one pair that is the input of the next: another image, the same picture."""
    one, two = pixels(1), pixels(2)
    store = store_of([Record(one, two, "a"), Record(two, one, "b"), Record(one, two, "c")], vqgan, tmp_path / "s", crops=2)
    assert [(pair.input, pair.output) for pair in store.pairs] == [(0, 1), (2, 3), (0, 1)]
    first, second = store.pictures()[:2]
    assert store.pictures().tolist() == [first, second, second, first] and first != second
    np.testing.assert_array_equal(store.codes[1], store.codes[2])
    assert (store.codes.crops(1)[1] != store.codes.crops(2)[1]).any()


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


def test_packed_jpegs_stay_as_they_are(tmp_path):
    export(opened("laion_aesthetics", "tars", tmp_path / "copy"), tmp_path / "out", progress=False)
    for record in manifest(tmp_path / "out" / "pairs.jsonl"):
        assert record.input == record.output and record.input.suffix == ".jpg" and record.caption == record.description
        assert record.input.read_bytes() in [coded(10 * shard + i, "JPEG") for shard in (0, 1) for i in (1, 3)]


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
