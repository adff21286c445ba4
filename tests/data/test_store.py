"""Sources, the token store and the pipeline: from files to rows."""

import dataclasses
import gc
import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from tests.helpers import TINY, tiny_tokenizer
from xprompt_jax.config import BucketConfig, DataConfig
from xprompt_jax.data.images import save_png
from xprompt_jax.data.pipeline import GENERIC_INSTRUCTIONS, Episodes, Rows
from xprompt_jax.data.sources import Record, manifest, paired_folders, world_pairs
from xprompt_jax.data.store import Store
from xprompt_jax.data.table import CATEGORIES, TEXTS
from xprompt_jax.data.tokenise import tokenize
from xprompt_jax.errors import UserError
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.prompt import DESCRIBE_QUESTION, Prompter, SlotShape
from xprompt_jax.tokens import Layout, train_tokenizer
from xprompt_jax.train.metrics import padding_fraction

PROMPTER = Prompter(tiny_tokenizer(), Layout("plain", tiny_tokenizer().vocab, 4))
BUCKETS = (
    BucketConfig("in_context", examples=1, context=112, todo=112, answer=19, rows=8),
    BucketConfig("describe", examples=1, context=64, todo=120, answer=64, rows=4, kind="describe"),
    BucketConfig("text", examples=0, context=0, todo=64, answer=19, rows=4, kind="text_to_image"),
)
CONFIG = DataConfig(buckets=BUCKETS, seed=3)


def image(seed):
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def records():
    """Two groups of five pairs; pair i of both groups has the same input image."""
    for group in range(2):
        for i in range(5):
            yield Record(
                image(i), image(100 + 10 * group + i), f"do {group}", f"undo {group}", f"made {group}{i}", f"unmade {group}{i}",
                "task", f"g{group}", f"caption {i}", "eval" if i == 4 else "train",
            )  # fmt: skip


@pytest.fixture(scope="module")
def store(vqgan, tmp_path_factory):
    return tokenize(records(), vqgan, tiny_tokenizer(), tmp_path_factory.mktemp("data") / "store", batch=4, progress=False)


def test_every_image_is_stored_once_and_encoded_right(store, encode):
    assert len(store.codes) == 5 + 10 and len(store.pairs) == 10
    for pair, record in zip(store.pairs, records(), strict=True):
        for number, picture in ((pair.input, record.input), (pair.output, record.output)):
            np.testing.assert_array_equal(store.codes[number], encode(picture))


def test_preprocessing_is_as_asked(vqgan, tmp_path):
    from xprompt_jax.data.images import preprocess

    picture = np.random.default_rng(0).integers(0, 256, (33, 21, 3), dtype=np.uint8)  # 25.1 long: recipes round apart
    record = dataclasses.replace(next(iter(records())), input=picture, output=picture)
    for recipe in ("meta", "hf"):
        made = tokenize([record], vqgan, tiny_tokenizer(), tmp_path / recipe, recipe=recipe, progress=False)
        want = vqgan.encode(preprocess(PIL.Image.fromarray(picture), 16, recipe)[None])[0]
        np.testing.assert_array_equal(made.codes[0], want)
        assert json.loads((tmp_path / recipe / "store.json").read_text())["recipe"] == recipe


def test_the_table_of_pairs_says_what_the_records_said(vqgan, encode, tmp_path, monkeypatch):
    """By pair and by column, over the ends of record batches and shards."""
    monkeypatch.setattr("xprompt_jax.data.store.ROWS", 4)
    monkeypatch.setattr("xprompt_jax.data.shards.IMAGES_PER_SHARD", 6)
    given = list(records())
    given[3] = dataclasses.replace(
        given[3], more_inputs=(image(7), image(1)), dataset="try", holdout="no", task="edit", reverse_instruction=""
    )
    given[8] = dataclasses.replace(given[8], instruction="Straße – 雨 🌧", task="edit", description="")
    small = tokenize(given, vqgan, tiny_tokenizer(), tmp_path / "small", batch=4, progress=False)
    assert len(list((tmp_path / "small").glob("images-*-of-00003.array_record"))) == 3
    assert len(small.pairs) == 10 and len(list(small.pairs)) == 10 and small.pairs[-1] == small.pairs[9]
    for i, (pair, record) in enumerate(zip(small.pairs, given, strict=True)):
        for name in CATEGORIES:
            column = getattr(small.pairs, name)
            assert getattr(pair, name) == getattr(record, name) == column.names[column.codes[i]]
        for name in TEXTS:
            assert getattr(pair, name) == getattr(record, name) == small.pairs.text(name, i)
            assert small.pairs.num_tokens[name][i] == len(tiny_tokenizer().encode(getattr(record, name)))
        assert (pair.input, pair.output) == (small.pairs.input[i], small.pairs.output[i])
        pictures = record.input, record.output, *record.more_inputs
        assert small.pairs.has_more[i] == bool(record.more_inputs) and len(pair.more_inputs) == len(record.more_inputs)
        for number, picture in zip((pair.input, pair.output, *pair.more_inputs), pictures, strict=True):
            np.testing.assert_array_equal(small.codes[number], encode(picture))
    assert small.pairs[3].more_inputs[1] == small.pairs[1].input  # stored once, whatever its role
    other = train_tokenizer(["do", "undo it"], num_codes=32, vocab_size=420)
    for name, counts in small.pairs.count_tokens(other).items():
        assert counts.dtype == np.int32 and counts.tolist() == [len(other.encode(getattr(r, name))) for r in given]
    said = [json.loads(line) for line in (tmp_path / "small" / "holdouts.jsonl").read_text().splitlines()]
    assert [(row["pair"], row["judge"], row["instruction"]) for row in said] == [(3, "no", "do 0"), (8, "", "Straße – 雨 🌧")]
    with pytest.raises(IndexError):
        small.pairs[10]
    with pytest.raises(IndexError):
        small.codes[len(small.codes)]


def test_stores_travel_to_other_processes(store):
    store.codes[0]  # opens a file, which must not travel
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(store.codes.crops, (7,)), store.codes.crops(7))
        assert pool.apply(store.pairs.__getitem__, (3,)) == store.pairs[3]
    again = pickle.loads(pickle.dumps(store))
    assert again.encoding == store.encoding and list(again.pairs) == list(store.pairs)
    np.testing.assert_array_equal(np.stack(list(again.codes)), np.stack(list(store.codes)))


def test_a_store_that_is_gone_holds_no_file(store, tmp_path):
    folder = shutil.copytree(store.folder, tmp_path / "s")

    def held():
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return str(folder) in maps or any(str(folder) in os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink())

    copy = Store.open(folder)
    assert copy.codes[3].shape == (4, 4) and copy.pairs.input[3] >= 0 and held()
    del copy
    assert not held()


def test_other_stores_are_refused(store, vqgan, other_vqgan, tmp_path):
    Store.open(store.folder, vqgan=vqgan)
    with pytest.raises(UserError, match="another image tokenizer"):
        Store.open(store.folder, vqgan=other_vqgan)
    with pytest.raises(UserError, match="none: not a complete token store"):
        Store.open(tmp_path / "none")
    (tmp_path / "store.json").write_text(json.dumps({"format": "xprompt-tokens-1", "pairs": 1, "images": 1}))
    with pytest.raises(UserError, match="not a token store of format xprompt-tokens-2, but xprompt-tokens-1; make it again"):
        Store.open(tmp_path)


@pytest.mark.parametrize("name", ["images-00000-of-00001.array_record", "pairs.arrow", "addresses.npy"])
def test_damaged_stores_are_refused_in_one_line(store, tmp_path, name):
    folder = shutil.copytree(store.folder, tmp_path / "s")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-40])
    with pytest.raises(UserError, match=rf"{name}: {len(whole) - 40} bytes, not {len(whole)}: cut short or changed; copy the store again"):
        Store.open(folder)
    (folder / name).write_bytes(bytes(len(whole)))  # as a disk that was full leaves them
    if name != "addresses.npy":
        with pytest.raises(UserError, match=rf"{name}: damaged [^\n]*; (copy|make) [^\n]* with `xprompt tokenize`$"):
            Store.open(folder).codes[3]
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: No such file or directory; copy the store again"):
        Store.open(folder)


def test_places_that_are_no_stores_are_not_replaced(vqgan, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.txt").write_text("dear")
    with pytest.raises(UserError, match="photos: there already, and not a token store"):
        tokenize(records(), vqgan, tiny_tokenizer(), tmp_path / "photos", progress=False)
    assert (tmp_path / "photos" / "me.txt").read_text() == "dear"
    with pytest.raises(UserError, match="nothing to tokenize"):
        tokenize([], vqgan, tiny_tokenizer(), tmp_path / "s", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def rows_of(batch):
    return {name: sorted(map(bytes, np.concatenate([b["ids"], b["targets"]], axis=1))) for name, b in batch.items()}


def test_a_step_is_the_same_rows_on_any_number_of_hosts(store):
    whole = Rows(store, PROMPTER, CONFIG, 3)
    for step in (0, 7, 100):
        for hosts in (2, 4):
            parts = [Rows(store, PROMPTER, CONFIG, 3, host=(i, hosts))(step) for i in range(hosts)]
            together = {name: {k: np.concatenate([p[name][k] for p in parts]) for k in whole(step)[name]} for name in whole(step)}
            assert rows_of(together) == rows_of(whole(step))
    again = Rows(store, PROMPTER, CONFIG, 3)
    for name, batch in again(7).items():  # asked for out of order, from a new object: a function of the step
        for field, value in batch.items():
            np.testing.assert_array_equal(value, whole(7)[name][field])
    assert rows_of(whole(0)) != rows_of(whole(1))
    other = Rows(store, PROMPTER, dataclasses.replace(CONFIG, seed=4), 3)
    assert rows_of(other(0)) != rows_of(whole(0))


def test_rows_have_names(store):
    """The name of row r of a step is the pair whose input image stands in that row's task."""
    rows = Rows(store, PROMPTER, dataclasses.replace(CONFIG, buckets=BUCKETS[:1], reverse=False), 3)
    vocab = PROMPTER.vocab
    for step in (0, 5):
        for ids, name in zip(rows(step)["in_context"]["ids"], rows.names(step), strict=True):
            bucket, group, _, number = name.split()
            pair = store.pairs[int(number) - 1]
            assert bucket == "in_context" and group == pair.group
            codes = ids[(ids >= vocab.image_start) & (ids < vocab.image_start + vocab.num_codes)] - vocab.image_start
            np.testing.assert_array_equal(codes[-32:-16], store.codes[pair.input].reshape(-1))
            np.testing.assert_array_equal(codes[-16:], store.codes[pair.output].reshape(-1))


def test_epochs_see_every_episode(store):
    config = dataclasses.replace(CONFIG, generic_instruction=0.0, buckets=(dataclasses.replace(BUCKETS[2], rows=8),))
    source = Rows(store, PROMPTER, config, 3)  # 8 training captions: one step is one epoch
    texts = [sorted(map(bytes, source(step)["text"]["ids"])) for step in range(3)]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 8


def test_episodes_say_what_they_should(store):
    vocab, layout = PROMPTER.vocab, PROMPTER.layout
    episodes = Episodes(store, PROMPTER, dataclasses.replace(CONFIG, generic_instruction=0.5), BUCKETS[0], 3, "train")
    assert len(episodes) == 16
    generic = 0
    for i, (number, reverse) in enumerate(episodes.specs):
        pair = store.pairs[number]
        sample = episodes.sample(episodes.choose(i, np.random.default_rng(i)))
        before, after = (pair.output, pair.input) if reverse else (pair.input, pair.output)
        text = PROMPTER.tokenizer.decode(sample.prompt)
        generic += text in GENERIC_INSTRUCTIONS
        assert text in GENERIC_INSTRUCTIONS or text == (pair.reverse_instruction if reverse else pair.instruction)
        assert PROMPTER.tokenizer.decode(sample.examples[0]) == text
        np.testing.assert_array_equal(layout.decode(sample.prompt[-19:-1], 4, 4), store.codes[before])
        np.testing.assert_array_equal(layout.decode(sample.answer[:-1], 4, 4), store.codes[after])
        assert sample.answer[-1] == vocab.eos
        shown_in, shown_out = (layout.decode(sample.examples[0][s], 4, 4) for s in (slice(-37, -19), slice(-18, None)))
        partners = [
            p for p in store.pairs
            if p.group == pair.group and p.split == "train" and p.input != pair.input
            and np.array_equal(store.codes[p.output if reverse else p.input], shown_in)
            and np.array_equal(store.codes[p.input if reverse else p.output], shown_out)
        ]  # fmt: skip
        assert partners, "the example is another pair of the same group and direction"
    assert 2 <= generic <= 14


def test_a_pair_is_never_its_own_example(store):
    config = dataclasses.replace(CONFIG, same_scene_partner=True, generic_instruction=0.0)
    episodes = Episodes(store, PROMPTER, config, BUCKETS[0], 3, "train")
    for i, (number, reverse) in enumerate(episodes.specs):
        for seed in range(10):
            sample = episodes.sample(episodes.choose(i, np.random.default_rng(seed)))
            output = store.pairs[number].input if reverse else store.pairs[number].output
            shown = PROMPTER.layout.decode(sample.examples[0][-18:], 4, 4)
            before = PROMPTER.layout.decode(sample.examples[0][-37:-19], 4, 4)
            source = store.pairs[number].output if reverse else store.pairs[number].input
            assert not (np.array_equal(shown, store.codes[output]) and np.array_equal(before, store.codes[source]))


def test_descriptions_stand_after_the_pair(store):
    episodes = Episodes(store, PROMPTER, CONFIG, BUCKETS[1], 3, "eval")
    for i, (number, reverse) in enumerate(episodes.specs):
        pair = store.pairs[number]
        sample = episodes.sample(episodes.choose(i, np.random.default_rng(0)))
        assert PROMPTER.tokenizer.decode(sample.prompt) == DESCRIBE_QUESTION
        assert PROMPTER.tokenizer.decode(sample.answer) == (pair.reverse_description if reverse else pair.description)
        assert PROMPTER.tokenizer.decode(sample.examples[0]) == ""
        assert pair.split == "eval"


def test_dropped_examples_are_empty(store):
    config = dataclasses.replace(CONFIG, drop_example=1.0)
    assert (Rows(store, PROMPTER, config, 3)(0)["in_context"]["example_lengths"] == 0).all()


@pytest.mark.parametrize("mode", ["causal", "none"])
def test_ablation_modes_fill_their_shapes(store, mode):
    config = dataclasses.replace(CONFIG, mode=mode, buckets=BUCKETS[:1])
    batch = Rows(store, PROMPTER, config, 3)(0)["in_context"]
    shape = SlotShape.of(BUCKETS[0], 3, mode)
    assert batch["ids"].shape == (8, shape.length) and batch["example_lengths"].shape == (8, 0)
    assert 0 < padding_fraction({"in_context": batch}) < 0.9


def test_what_does_not_fit_is_left_out_whole(store, caplog):
    short = dataclasses.replace(BUCKETS[0], context=30)
    with pytest.raises(UserError, match="finds no train pair"):
        Episodes(store, PROMPTER, CONFIG, short, 3, "train")
    assert "8 of 8 pairs are too long" in caplog.text
    with pytest.raises(UserError, match="do not divide over 3 hosts"):
        Rows(store, PROMPTER, CONFIG, 3, host=(0, 3))


def test_paired_folders(tmp_path):
    for i in range(3):
        save_png(image(i), tmp_path / "in" / "a" / f"rain-{i}.png")
        save_png(image(10 + i), tmp_path / "out" / "a" / f"norain-{i}.png")
    read = lambda rename: list(
        paired_folders(tmp_path / "in", tmp_path / "out", task="derain", instruction="remove the rain", rename=rename)
    )
    found = read(("rain", "norain"))
    assert [(r.input.name, r.output.name) for r in found] == [(f"rain-{i}.png", f"norain-{i}.png") for i in range(3)]
    with pytest.raises(UserError, match=r"rain-0\.png: no a/rain-0\.\* in"):
        read(None)
    (tmp_path / "in" / "a" / "rain-0.png").rename(tmp_path / "in" / "a" / "rain-\udce9.png")  # a name that is no UTF-8
    (tmp_path / "out" / "a" / "norain-0.png").rename(tmp_path / "out" / "a" / "norain-\udce9.png")
    found = read(("rain", "norain"))
    found[-1].input.write_bytes(b"no picture")
    store = tokenize(found, VQGAN(TINY.vq, jax.random.key(1)), tiny_tokenizer(), tmp_path / "store", max_corrupt=1, progress=False)
    assert len(found) == 3 and len(store.pairs) == 2 and "not an image" in (tmp_path / "store" / "skipped.jsonl").read_text()


@pytest.mark.parametrize("line, message", [
    ('{"input": "a.png"', "line 2: not JSON"),
    ('{"input": "a.png", "output": "b.png"}', "line 2: no text field 'instruction'"),
    ('{"input": "a.png", "output": "b.png", "instruction": "x", "colour": 1}', "line 2: unknown field 'colour'"),
    ("[1]", "line 2: not an object"),
])  # fmt: skip
def test_manifests_name_the_line(tmp_path, line, message):
    path = tmp_path / "m.jsonl"
    good = {"input_images": ["a.png"], "output_image": "b.png", "instruction": "x", "task_type": "t"}
    path.write_text(json.dumps(good) + "\n\n")
    (record,) = manifest(path)
    assert (record.input, record.output, record.group) == (tmp_path / "a.png", tmp_path / "b.png", "t")
    path.write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        list(manifest(path))


def test_world_pairs_share_parameters_and_hold_out_groups():
    photos = [image(i) for i in range(20)]
    options = {"size": 16, "tasks": ["invert", "depth"], "photos": photos, "photo_fraction": 1.0, "eval_fraction": 0.2}
    found = list(world_pairs(groups=10, pairs_per_group=3, **options))
    assert len(found) == 30 and [r.split for r in found] == ["train"] * 24 + ["eval"] * 6
    assert len({r.group for r in found}) == 10
    kept = {p.tobytes() for p in photos[::5]}
    for r in found:
        if r.task == "invert":
            assert (r.input.tobytes() in kept) == (r.split == "eval")
    with pytest.raises(UserError, match="task 'fly' is unknown"):
        list(world_pairs(groups=1, pairs_per_group=1, size=16, tasks=["fly"]))
