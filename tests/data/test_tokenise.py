"""From a dataset to a store: exact colours, mirrors, several stores in one, manifests, the command line."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from tests.data.made import MADE
from tests.data.making import N, normal_map
from tests.helpers import FP32, TINY, TINY_VQ, tiny_tokenizer
from xprompt_jax.commands.data import Tokenize
from xprompt_jax.data import palettes
from xprompt_jax.data.crops import MIN_SIDE, crop_windows, cut
from xprompt_jax.data.datasets import get_dataset
from xprompt_jax.data.datasets.export import export
from xprompt_jax.data.datasets.tfds import Prepared, prepare
from xprompt_jax.data.flips import Mirrored, mirror, mirror_words
from xprompt_jax.data.images import open_image, resize_center_crop, to_pixels
from xprompt_jax.data.journal import Journal
from xprompt_jax.data.sources import Record, manifest
from xprompt_jax.data.store import Store
from xprompt_jax.data.tokenise import merge, tokenize
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


def files_of(folder):
    """What a store consists of, but for the tokenizers, whose writer puts the time in."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def picture(seed, size=(16, 24)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


class Shared(list):
    """24 pairs that share pictures near and far; counts what is read."""

    def __init__(self):
        pair = lambda i: Record(picture(i % 7), picture(100 + i // 3), f"do {i}", task="edit" if i % 4 else "t", group=f"g{i % 5}")
        super().__init__(pair(i) for i in range(24))
        self.reads = 0

    def __getitem__(self, i):
        self.reads += 1
        return super().__getitem__(i)


def test_parts_joined_are_the_whole(vqgan, tmp_path):
    """Byte for byte, though parts share pictures, and one of them cannot read a pair."""
    records = Shared()
    records[13] = dataclasses.replace(records[13], output=b"no picture")
    whole = store_of(records, vqgan, tmp_path / "whole", crops=2, max_corrupt=2)
    parts = [store_of(records, vqgan, tmp_path / f"{i}", batch=5, crops=2, max_corrupt=2, shard=(i, 3)) for i in range(3)]
    assert [len(part.pairs) for part in parts] == [8, 7, 8] and sum(len(part.codes) for part in parts) > len(whole.codes) == 30
    merge([tmp_path / f"{i}" for i in range(3)], tmp_path / "joined")
    assert files_of(tmp_path / "joined") == files_of(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "skipped.jsonl").read_text())["pair"] == 13
    store_of(records, vqgan, tmp_path / "single", max_corrupt=2)
    with pytest.raises(UserError, match="1: crops 2, but .*single has 1; tokenize both with one model, one --recipe and one --crops"):
        merge([tmp_path / "single", tmp_path / "1"], tmp_path / "bad")
    with pytest.raises(UserError, match="--shard works on pairs that can be counted"):
        store_of(iter(records), vqgan, tmp_path / "bad", shard=(0, 2))
    assert not (tmp_path / "bad").exists()


def test_a_stopped_job_goes_on_from_every_place(vqgan, tmp_path, monkeypatch):
    """The journal as it was at every commit, with what was under way beyond it, leads to the same bytes."""
    records = Shared()
    records[5] = dataclasses.replace(records[5], output=b"no picture")
    settings = {"batch": 4, "max_corrupt": 1, "job": {"from": "here"}}
    left, commit = [], Journal.commit

    def commit_and_copy(journal):
        commit(journal)
        left.append(shutil.copytree(journal.folder, tmp_path / f"left-{len(left)}"))

    with monkeypatch.context() as changed:
        changed.setattr("xprompt_jax.data.journal.COMMIT_SECONDS", 0)
        changed.setattr(Journal, "commit", commit_and_copy)
        store_of(records, vqgan, tmp_path / "whole", **settings)
    done = [json.loads((folder / "progress.json").read_text())["done"] for folder in left]
    chosen = [left[done.index(n)] for n in sorted(set(done))] + [left[-1]]
    assert len(chosen) > 5 and done[-1] == len(records)
    for number, folder in enumerate(chosen):
        for name in ("codes.bin", "addresses.bin", "pairs.jsonl", "skipped.jsonl"):
            with (folder / name).open("ab") as file:
                file.write(b"under way")
        (folder / "store").mkdir()
        (folder / "store" / "pairs.arrow").write_text("half")
        out = tmp_path / f"again-{number}"
        folder.rename(f"{out}.partial")
        records.reads = 0
        if number % 2:
            store_of(records, vqgan, out, **settings)
            assert records.reads == len(records) - done[left.index(folder)]
        else:  # what has no length is read from its start
            store_of(iter(records), vqgan, out, total=len(records), **settings)
        assert files_of(out) == files_of(tmp_path / "whole") and not (tmp_path / f"again-{number}.partial").exists()


KILLED = """
import sys, time
from tests.data.test_tokenise import Shared
from xprompt_jax.convert.native import load_tokenizers
from xprompt_jax.data import journal
from xprompt_jax.data.tokenise import tokenize

class Slow(Shared):
    def __getitem__(self, i):
        time.sleep(0.05)
        return super().__getitem__(i)

journal.COMMIT_SECONDS = 0
tokenize(Slow(), *load_tokenizers(sys.argv[1]), sys.argv[2], batch=4, job={"from": "here"}, progress=False)
"""


def test_a_killed_job_goes_on(vqgan, tmp_path):
    """SIGKILL, twice, at moments of no choice of ours."""
    store_of(Shared(), vqgan, tmp_path / "whole", batch=4)
    out, partial = tmp_path / "s", tmp_path / "s.partial"
    reached = lambda: json.loads((partial / "progress.json").read_text())["done"] if (partial / "progress.json").exists() else 0
    random, before = np.random.default_rng(), 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "whole" / "tokenizers", out])
        while reached() <= before + 1 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.wait()
        assert not out.exists() and before < reached() < 24, "it must be killed on its way"
        before = reached()
    with pytest.raises(UserError, match=r"s.partial: begun with crops 1, not 2; give the same again to go on, or remove it"):
        store_of(Shared(), vqgan, out, batch=4, job={"from": "here"}, crops=2)
    with pytest.raises(UserError, match=r"begun with from here, not there"):
        store_of(Shared(), vqgan, out, batch=4, job={"from": "there"})
    with pytest.raises(UserError, match=r"begun with vqgan"):
        store_of(Shared(), VQGAN(TINY_VQ, jax.random.key(2)), out, batch=4, job={"from": "here"})
    records = Shared()
    store_of(records, vqgan, out, batch=4, job={"from": "here"})
    assert records.reads == 24 - before
    assert files_of(out) == files_of(tmp_path / "whole")


def test_one_place_is_written_by_one_job(vqgan, tmp_path):
    settings = {"crops": 1, "grid": 4}
    with Journal(tmp_path / "s.partial", settings), pytest.raises(UserError, match="another process is writing it"):
        store_of(Shared(), vqgan, tmp_path / "s", job={})
    assert not (tmp_path / "s.partial").exists()  # nothing was done there


def test_what_cannot_be_read_is_counted_and_listed(vqgan, tmp_path, caplog):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    records = Shared()
    for i, change in {
        2: {"input": tmp_path / "bad.png"}, 11: {"output": tmp_path / "gone.png", "dataset": "mine"}, 12: {"caption": "\ud800"},
        13: {"more_inputs": (picture(0), b"x")},
    }.items():  # fmt: skip
        records[i] = dataclasses.replace(records[i], **change)

    class Damaged(Shared):
        def __getitem__(self, i):
            if i == 20:
                raise UserError("table.parquet: damaged in row 20")
            return records[i]

    with caplog.at_level("INFO"):
        store = store_of(Damaged(), vqgan, tmp_path / "s", max_corrupt=0.25)
    assert re.search(r"s: \d+ images, 19 pairs, 5 skipped, [\d.]+ images/s$", caplog.messages[-1])
    skipped = [json.loads(line) for line in (tmp_path / "s" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["pair"], row["dataset"], row["image"], Path(row["file"]).name) for row in skipped] == [
        (2, "", "input", "bad.png"), (11, "mine", "output", "gone.png"), (12, "", "", ""), (13, "", "input 3", ""), (20, "", "", ""),
    ]  # fmt: skip
    for row, reason in zip(skipped, ("not an image", "no such file", "caption is no text", "not an image", "table.parquet"), strict=True):
        assert reason in row["reason"]
    assert [pair.instruction for pair in store.pairs] == [f"do {i}" for i in range(24) if i not in (2, 11, 12, 13, 20)]


def test_too_much_that_cannot_be_read_ends_the_job(vqgan, tmp_path):
    """In one line; repaired, it goes on."""
    records = Shared()
    bad = tmp_path / "bad.png"
    records[1] = dataclasses.replace(records[1], input=b"x")
    records[17] = dataclasses.replace(records[17], input=bad)
    for limit, first in ((0, "image of 1 bytes: not an image"), (0.01, "image of 1 bytes"), (1, r"bad\.png: no such file")):
        with pytest.raises(
            UserError, match=rf"^[^\n]*{first}.*; {1 + (limit == 1)} of 24 pairs cannot be read, more than --max-corrupt {limit}; [^\n]*$"
        ):
            store_of(records, vqgan, tmp_path / "s", batch=4, max_corrupt=limit, job={})
        assert (tmp_path / "s.partial").exists() == (limit == 1) and not (tmp_path / "s").exists()
    PIL.Image.fromarray(picture(3)).save(bad)
    shutil.copytree(tmp_path / "s.partial", tmp_path / "t.partial")
    records.reads = 0
    assert len(store_of(records, vqgan, tmp_path / "s", batch=4, max_corrupt=1, job={}).pairs) == 23 and records.reads < 24
    records.reads = 0
    store_of(records, vqgan, tmp_path / "t", batch=4, max_corrupt=1)  # it does not say what its job is: from the start
    assert records.reads == 24 and files_of(tmp_path / "t") == files_of(tmp_path / "s")


def gradient(width, height):
    """Red tells x, green y."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    return np.stack([*np.broadcast_arrays(x * 255, y[:, None] * 255), np.full((height, width), 9)], -1).round().astype(np.uint8)


def test_crops_show_the_same_place_of_both_images(vqgan, tmp_path):
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
    record = Record(small, large, "enlarge", more_inputs=(picture(0, (50, 70)),))
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
        np.testing.assert_array_equal(store.codes.crops(number), vqgan.encode(to_pixels(np.stack(want))))
        np.testing.assert_array_equal(store.codes[number], store.codes.crops(number)[0])
    with pytest.raises(UserError, match="--crops 5: must be 1 to 4"):
        store_of([record], vqgan, tmp_path / "t", crops=5)


def test_a_picture_in_other_crops_is_known(vqgan, tmp_path):
    """The output of one pair that is the input of the next: another image, the same picture."""
    one, two = picture(1), picture(2)
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
    assert {p.dataset for p in whole.pairs} == {"gopro", "rain13k"}
    for i in (0, 1):
        run(*base, "--out", tmp_path / "part", "--allow-partial", "--mirror", "--shard", f"{i}/2")
    run("tokenize", "--out", tmp_path / "parts", "--stores", *sorted(tmp_path.glob("part-*-of-00002")))
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "g")
    run("tokenize", "--dataset", "gopro", "--root", tmp_path / "copy", "--allow-partial", "--export", tmp_path / "flat")
    assert len(list(manifest(tmp_path / "flat" / "pairs.jsonl"))) == 2 * N


def test_a_stopped_command_goes_on_with_its_own_data_alone(tmp_path):
    manifest, rain = tmp_path / "m.jsonl", Path("rain")
    manifest.write_text("{}")
    command = Tokenize(model="m", out=Path("o"), manifest=manifest)
    job = command._job()
    assert job["manifest"] == str(manifest) and job == dataclasses.replace(command, max_corrupt=0.5, out=Path("p"))._job()
    assert job != dataclasses.replace(command, eval_fraction=0.1)._job()
    manifest.write_text("{} ")
    assert job != command._job()
    folders = Tokenize(inputs=rain, outputs=rain, rename=("a", "b"))
    assert folders._job() != dataclasses.replace(folders, rename=("a", "c"))._job()


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "gopro", "--out", "o"], "--dataset and --root belong together"),
    (["--dataset", "gopro", "--root", "r", "--manifest", "m"], "give one source"),
    (["--world", "1", "--mirror", "--out", "o", "--model", "m"], "--mirror works on --dataset"),
    (["--manifest", "m", "--split", "test", "--out", "o", "--model", "m"], "--split works on --dataset, not on --manifest"),
    (["--manifest", "m", "--reverse-instruction", "x", "--out", "o", "--model", "m"], "--reverse-instruction works on --inputs"),
    (["--world", "1", "--seed", "-1", "--out", "o", "--model", "m"], "--seed must not be negative"),
    (["--world", "1", "--shard", "0/2", "--out", "o", "--model", "m"], "--shard works on --dataset or --manifest or --inputs, not on"),
    (["--manifest", "m", "--shard", "2/2", "--out", "o", "--model", "m"], "--shard 2/2: give i/n with i from 0 to n-1"),
    (["--manifest", "m", "--max-corrupt", "-1", "--out", "o", "--model", "m"], "--max-corrupt must not be negative"),
    (["--stores", "a", "b", "--crops", "2", "--out", "o"], "--crops works on"),
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
