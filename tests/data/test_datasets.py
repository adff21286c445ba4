"""Every dataset of the table, in every layout, from a made-up copy: counts, pairs, words, splits, refusals."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.data.made import MADE, viton
from tests.data.making import coded, folders, hash_of, jsonl, metres, normal_map, pixels
from xprompt_jax.data import palettes
from xprompt_jax.data.datasets import DATASETS, Options, get_dataset, table
from xprompt_jax.data.images import open_image
from xprompt_jax.data.phrases import PHRASES, pick
from xprompt_jax.data.sources import held_out
from xprompt_jax.errors import UserError

LAYOUTS = [(dataset.name, layout.name) for dataset in DATASETS.values() for layout in dataset.layouts]
NYU_LAYOUTS = [layout for name, layout in LAYOUTS if name == "nyuv2_depth"]


def made(name, layout, root):
    root.mkdir(exist_ok=True)
    return MADE[name, layout](root)


def opened(name, layout, root, split="", **options):
    made(name, layout, root)
    return get_dataset(name).open(root, split, options=Options(**options), allow_partial=True)


def test_the_table_is_complete():
    assert set(MADE) == set(LAYOUTS)
    assert {
        "dfwb", "gopro", "rain13k", "fivek", "lol_v1", "lol_v2_real", "laion_aesthetics", "ultraedit", "magicbrush", "instructpix2pix",
        "nyuv2_depth", "nyuv2_normals", "ade20k", "scannet_normals", "multigen", "style_pairs", "ip_adapter", "viton_hd", "pose_action",
        "mimicbrush",
    } <= set(DATASETS)  # fmt: skip
    shown, page = table(), (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for dataset in DATASETS.values():
        assert all(url in page for url in re.findall(r"https?://[^ ()]+", dataset.card.source)), dataset.name
        assert dataset.card.source in shown and dataset.card.licence in shown and dataset.card.tasks
        assert re.search(rf"^{dataset.name}  ", shown, re.M) and f"`{dataset.name}`" in page


@pytest.mark.parametrize("name, layout", LAYOUTS)
def test_every_layout_opens(name, layout, tmp_path):
    """Each split holds what was made, is read at random and in another process alike, and its pictures open."""
    counts = made(name, layout, tmp_path / "copy")
    dataset = get_dataset(name)
    (named,) = [one for one in dataset.layouts if one.name == layout]
    for split, count in counts.items():
        pairs = dataset.open(tmp_path / "copy", split, allow_partial=True)
        assert len(pairs) == count, split
        again = pickle.loads(pickle.dumps(pairs))
        for i in (count - 1, 0):
            record, other = pairs[i], again[i]
            assert record.task and record.group and record.split == pairs.split_of(i)
            assert record.split == "eval" if not split.startswith("train") else record.split == "train" or len(counts) == 1
            assert record.instruction or record.caption
            for image, twin in zip(
                (record.input, record.output, *record.more_inputs), (other.input, other.output, *other.more_inputs), strict=True
            ):
                assert np.array_equal(np.asarray(open_image(image)), np.asarray(open_image(twin)))
            assert (record.instruction, record.description, record.group) == (other.instruction, other.description, other.group)
            if record.description and record.task != "text_to_image" and not record.more_inputs:
                assert record.description.startswith("The input image ") and "; the output image " in record.description
        with pytest.raises(IndexError):
            pairs[count]
        assert pairs[-1].instruction == pairs[count - 1].instruction
    everything = dataset.open(tmp_path / "copy", allow_partial=True)
    assert len(everything) == sum(counts.values()) == len(list(everything))
    if any(part.counts for part in named.parts if part.split in counts):
        with pytest.raises(UserError, match=r"not [\d,]+( or [\d,]+)?; complete the copy, or accept it with --allow-partial"):
            dataset.open(tmp_path / "copy")
    with pytest.raises(UserError, match="--split nonsense: not in"):
        dataset.open(tmp_path / "copy", "nonsense")


def test_a_right_count_is_accepted(tmp_path):
    folders(("train", "our485/low", "our485/high"), n=485)(tmp_path)
    folders(("test", "eval15/low", "eval15/high"), n=15)(tmp_path)
    assert len(get_dataset("lol_v1").open(tmp_path)) == 500
    assert len(get_dataset("lol_v1").open(tmp_path, "test")) == 15
    (tmp_path / "eval15" / "low" / "014.png").unlink()
    with pytest.raises(UserError, match="lol_v1 has 14 in test"):
        get_dataset("lol_v1").open(tmp_path)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="--dataset pro: unknown"):
        get_dataset("pro")
    with pytest.raises(UserError, match="no such folder; gopro is recognised by"):
        get_dataset("gopro").open(tmp_path / "none")
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="none of its layouts.*it is to be had from https"):
        get_dataset("gopro").open(tmp_path / "x")
    folders(("train", "GoPro/train/input", "GoPro/train/target"))(tmp_path)  # the folder above will do
    assert len(get_dataset("gopro").open(tmp_path, allow_partial=True)) == 4


def test_words_are_many_and_stable(tmp_path):
    pairs = opened("gopro", "MPRNet's", tmp_path)
    for record in pairs:
        assert record.instruction in PHRASES["deblur"].forward and record.reverse_instruction in PHRASES["deblur"].backward
        before, after = record.description.removeprefix("The input image ").rstrip(".").split("; the output image ")
        assert before in PHRASES["deblur"].before and record.reverse_description == f"The input image {after}; the output image {before}."
    assert len({record.instruction for record in pairs}) > 1
    assert [r.instruction for r in pairs] == [r.instruction for r in get_dataset("gopro").open(tmp_path, allow_partial=True)]
    for task, phrases in PHRASES.items():
        assert len(set(phrases.forward)) == len(phrases.forward) >= 10, task


def test_retinexformer_has_one_expert(tmp_path):
    with pytest.raises(UserError, match="--expert a: .*which has expert C alone"):
        opened("fivek", "Retinexformer's", tmp_path, expert="a")
    assert opened("fivek", "Zeng's 480p", tmp_path / "z", expert="c").found == 6


def test_partners_are_the_right_ones(tmp_path):
    """Of renamed copies and of rows that are looked up by number, the output is the input's own."""
    plain, named = (lambda i: (f"{i}",) * 2), (lambda i: (f"rain-00{i}", f"norain-00{i}"))
    kinds = (
        ("Rain100L", "Rain100L", named), ("Rain100L/rainy", "Rain100L/norain", plain), ("Rain100L/rainy", "Rain100L/norain", named),
        ("Rain100L/rain", "Rain100L/norain", named), ("Rain100L/input", "Rain100L/target", named),
        ("Rain100L/input", "Rain100L/target", plain),
    )  # fmt: skip
    copies = [(f"{at}{inputs}", f"{at}{outputs}", names) for at in ("", "test/") for inputs, outputs, names in kinds]
    for number, (inputs, outputs, names) in enumerate(copies):
        root = tmp_path / f"rain{number}"
        folders(("Rain100L", inputs, outputs), names=names)(root)
        pairs = get_dataset("rain13k").open(root, "Rain100L", allow_partial=True)
        assert len(pairs) == 4
        for i, record in enumerate(pairs):
            assert record.input.read_bytes() == coded(hash_of("Rain100L", i, 0))
            assert record.output.read_bytes() == coded(hash_of("Rain100L", i, 1))
    for record in opened("lol_v2_real", "official, or Retinexformer's names", tmp_path / "lol"):
        assert record.input.stem.removeprefix("low") == record.output.stem.removeprefix("normal")
    for record in opened("gopro", "official", tmp_path / "gopro"):
        assert record.input.parent.name == "blur" and record.output == record.input.parents[1] / "sharp" / record.input.name


def test_noise_is_made_and_made_again(tmp_path):
    pairs = opened("dfwb", "photographs", tmp_path)
    assert pairs.found == 5  # photographs are counted, crops are pairs
    assert opened("dfwb", "crops", tmp_path / "crops", "train").found == 3  # two crops are of one
    sizes = [np.asarray(r.output).shape for r in pairs]
    assert sizes.count((512, 512, 3)) == 8
    record = pairs[0]
    assert np.array_equal(record.input, pairs[0].input) and not np.array_equal(record.input, record.output)
    deviations = {
        round(float(np.std(r.input.astype(int) - r.output)) / 5) * 5
        for r in pairs
        if r.output.shape[0] == 512 and 100 < r.output.mean() < 150
    }
    assert deviations <= {15, 25, 50}


@pytest.mark.parametrize("layout", NYU_LAYOUTS)
def test_depth_is_in_metres_in_every_layout(layout, tmp_path):
    pairs = opened("nyuv2_depth", layout, tmp_path / "copy", "train", palettes=("turbo",))
    numbers = {"labelled .mat and splits.mat": (0, 2, 4), "tars of FastDepth's .h5": (0, 1, 10, 11)}.get(layout, (0, 1, 2, 3))
    keys = list(range(len(pairs)))
    if layout == "BTS, Painter":  # by scene: 0 and 2, then 1 and 3
        numbers = (0, 2, 1, 3)
    if layout == "FastDepth's .h5":
        numbers = (0, 2, 1, 3)
    decoded = [palettes.get_palette("turbo").decode(pairs[i].output) for i in keys]
    if layout.startswith("TensorFlow"):  # in the order of its own shuffle
        assert {min(range(4), key=lambda n: np.abs(d - metres(n)).mean()) for d in decoded} == {0, 1, 2, 3}
        assert all(min(np.abs(d - metres(n)).max() for n in range(4)) < 0.06 for d in decoded)
    else:
        for depth, number in zip(decoded, numbers, strict=True):
            np.testing.assert_allclose(depth, metres(number), atol=0.06)
    assert all(r.exact and r.task == "depth/turbo" and r.group == "nyuv2_depth/turbo" and "turbo" in r.instruction for r in pairs)


def test_holes_of_the_raw_depth_are_in_the_test_alone(tmp_path):
    pytest.importorskip("h5py")
    made("nyuv2_depth", "labelled .mat and splits.mat", tmp_path)
    grey = Options(palettes=("grey",))
    dataset = get_dataset("nyuv2_depth")
    assert (dataset.open(tmp_path, "test", options=grey, allow_partial=True)[0].output == 0).all(-1).any()
    train = dataset.open(tmp_path, "train", options=grey, allow_partial=True)
    assert not (train[0].output == 0).all(-1).any()
    np.testing.assert_array_equal(np.asarray(open_image(train[1].input)), pixels(2))


def test_palettes_share_the_pictures_out(tmp_path):
    pairs = opened("nyuv2_depth", "BTS, Painter", tmp_path, palettes=("turbo", "grey"))
    groups = {r.group for r in pairs}
    assert groups == {"nyuv2_depth/turbo", "nyuv2_depth/grey"}
    for record in pairs:
        assert record.group.rpartition("/")[2] in record.instruction
        assert record.task == "depth/" + record.group.rpartition("/")[2]


@pytest.mark.parametrize("layout, group", [("GeoNet, as Bae et al. have it", "geonet"), ("NYUD_MT", "nyud_mt")])
def test_unknown_normals_are_black_and_known_ones_untouched(layout, group, tmp_path):
    for i, record in enumerate(opened("nyuv2_normals", layout, tmp_path, "train")):
        assert record.group == f"nyuv2_normals/{group}" and record.exact
        assert not record.output[:2].any()
        np.testing.assert_array_equal(record.output[2:], normal_map(i)[2:])


def test_the_split_of_framenet_is_read_and_never_run(tmp_path):
    """Whatever the pickle holds: lists of str or bytes, arrays of numpy, or a bomb."""
    made("scannet_normals", "FrameNet's", tmp_path)
    dataset, split = get_dataset("scannet_normals"), tmp_path / "train_test_split.pkl"
    frames = lambda: [r.input.parent.name + "/" + r.input.stem[6:12] for r in dataset.open(tmp_path, "test", allow_partial=True)]
    want = frames()
    assert want == ["scene0001_01/000000", "scene0001_01/000020"]
    there = pickle.loads(split.read_bytes())
    listed, packed, objects = (
        (lambda ps: [p.encode() for p in ps]),
        (lambda ps: np.array(ps).astype("S")),
        (lambda ps: np.array(ps, object)),
    )
    for form in (listed, packed, objects, np.array):
        split.write_bytes(pickle.dumps({name: [form(paths) for paths in lists] for name, lists in there.items()}))
        assert frames() == want

    class Bomb:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    split.write_bytes(pickle.dumps({"test": there["test"], "more": Bomb()}))
    assert frames() == want and not (tmp_path / "ran").exists()
    for damaged in (b"no pickle", split.read_bytes()[:40], pickle.dumps({"train": there["train"], "val": []})):
        split.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train_test_split\.pkl: (not readable|no test frames in it)"):
            frames()


def test_classes_in_either_palette(tmp_path):
    made("ade20k", "ADEChallengeData2016", tmp_path)
    labels = np.asarray(PIL.Image.open(tmp_path / "annotations" / "training" / "ADE_train_00000001.png")).astype(int)
    for name, palette in (("max_separation", palettes.max_separation(150)), ("painter", palettes.painter_ade())):
        record = get_dataset("ade20k").open(tmp_path, "train", options=Options(classes=name), allow_partial=True)[1]
        np.testing.assert_array_equal(palette.decode(record.output)[labels > 0], labels[labels > 0] - 1)
        assert not record.output[labels == 0].any() and record.group == f"ade20k/{name}"
    (tmp_path / "annotations" / "training" / "ADE_train_00000001.png").write_bytes(coded(1))
    with pytest.raises(UserError, match=r"00000001\.png: not a map of 150 classes"):
        get_dataset("ade20k").open(tmp_path, "train", allow_partial=True)[1]


def test_edits_bring_captions_as_description(tmp_path):
    record = opened("ultraedit", "UltraEdit_500k", tmp_path)[1]
    assert record.instruction == "remove the dog" and record.task == "edit" and not record.reverse_instruction
    assert record.description == "The input image shows a field 1; the output image shows a field 1 with a barn."
    path = next((tmp_path / "data").glob("*.parquet"))
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns(["edit_prompt"]), path)
    with pytest.raises(UserError, match="no column 'edit_prompt'"):
        get_dataset("ultraedit").open(tmp_path, allow_partial=True)


@pytest.mark.parametrize("layout", ["parquet, test unpacked", "parquet, test as archive"])
def test_magicbrush_test_turns_follow_each_other(layout, tmp_path):
    pairs = opened("magicbrush", layout, tmp_path, "test")
    first, second = pairs[0], pairs[1]
    assert first.instruction == "edit 7 1" and first.input == coded(7) and first.output == coded(17)
    assert second.input == coded(17) and second.output == coded(27)
    assert second.description == "The input image shows scene 7 after 1; the output image shows scene 7 after 2."
    assert all(r.split == "eval" for r in pairs)


def test_magicbrush_needs_the_right_password(tmp_path):
    made("magicbrush", "parquet, test as archive", tmp_path)
    with pytest.raises(UserError, match="give the right --password"):
        get_dataset("magicbrush").open(tmp_path, "test", options=Options(password="wrong"), allow_partial=True)


def test_seeds_are_split_by_position(tmp_path):
    pairs = opened("instructpix2pix", "folders with seeds.json", tmp_path, "val")
    assert pairs[0].instruction == "add a hat 18" and pairs[0].input.name == "68_0.jpg" and pairs[1].output.name == "108_1.jpg"
    assert pairs.found == 1  # prompts are counted


def test_lines_may_have_a_key_of_their_own(tmp_path):
    MADE["pose_action", "JSONL"](tmp_path)
    lines = [json.loads(line) | {"key": key} for line, key in zip((tmp_path / "pose.jsonl").open(), ("p1", "deep/x:7"), strict=False)]
    (tmp_path / "pose.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = get_dataset("pose_action").open(tmp_path, "train", allow_partial=True)
    assert [pair.input for pair in pairs] == [tmp_path / "0a.png", tmp_path / "1a.png"]


def test_additions_and_removals_for_table_4(tmp_path):
    from xprompt_jax.data.datasets.editing import table_4

    pairs = opened("ultraedit", "UltraEdit_500k", tmp_path)
    chosen, listed = table_4(pairs)
    assert [(i, kind) for i, kind, _ in listed] == [(0, "add"), (1, "remove")]
    assert [r.instruction for r in chosen] == [text for *_, text in listed] == ["add a barn", "remove the dog"]
    assert [kind for _, kind, _ in table_4(opened("instructpix2pix", "parquet", tmp_path / "p"), 3)[1]] == ["add"] * 3


def test_tenth_of_the_captions_stays(tmp_path):

    made("laion_aesthetics", "tars", tmp_path)
    keys = [f"{shard:05d}{i:04d}" for shard in range(2) for i in range(4)]
    jsonl(tmp_path / "captions.jsonl", [{"key": key, "caption": f"rewritten {key}"} for key in reversed(keys[:-1])])
    pairs = get_dataset("laion_aesthetics").open(tmp_path)
    assert [r.caption.split()[-1] for r in pairs] == ["000000001", "000000003", "000010001", "000010003"]
    for record in pairs:
        key = record.caption.split()[-1]
        kept = held_out(f"caption/{key}", 0.1) == "eval" or key == keys[-1]
        assert record.caption == ("original " if kept else "rewritten ") + key
        assert record.description == record.caption and record.instruction == "" and record.input is record.output
    share = np.mean([held_out(f"caption/{i}", 0.1) == "eval" for i in range(5000)])
    assert 0.085 < share < 0.115
    with pytest.raises(UserError, match="no picture has an aesthetic score of 9"):
        get_dataset("laion_aesthetics").open(tmp_path, options=Options(min_score=9))


def test_controls_know_their_kind(tmp_path):
    pairs = opened("multigen", "json_files/", tmp_path)
    assert {r.task for r in pairs} == {"control_depth", "control_seg", "control_hed", "control_normal"}
    record = next(r for r in pairs if r.task == "control_seg")
    assert record.input.parent.name == "group_0_seg" and record.instruction.endswith(": a tree 0") and record.reverse_instruction
    assert record.group == "multigen/seg"


def test_several_inputs(tmp_path):
    record = opened("style_pairs", "JSONL", tmp_path / "s")[2]
    assert record.input.parent.name == "style" and record.more_inputs[0].parent.name == "source" and "melting gold 2" in record.instruction
    record = opened("mimicbrush", "JSONL", tmp_path / "m")[0]
    assert (record.input[5:15, 9:19] == 127).all() and not (record.input == 127).all()
    made("viton_hd", "zip", tmp_path / "v")
    record = get_dataset("viton_hd").open(tmp_path / "v", "test", allow_partial=True)[1]
    assert record.output.parent.name == "image" and record.input.parent.name == "agnostic-v3.2"
    assert record.more_inputs[0].name == record.output.name  # what is worn, not what the unpaired list says
    viton("parse")(tmp_path / "p")
    without = get_dataset("viton_hd").open(tmp_path / "p", "train", allow_partial=True)
    assert [bool((r.input == 127).all()) for r in without] == [False, True, True, False]  # upper clothes and dress are taken off


def test_training_splits_without_a_test_are_held_out_by_scene(tmp_path):
    pairs = opened("magicbrush", "parquet, test unpacked", tmp_path, "train", eval_fraction=0.5)
    assert {r.split for r in pairs} == {"train"}  # it has a test split of its own
    pairs = opened("scannet_normals", "frames alone", tmp_path / "s", eval_fraction=0.5)
    assert [r.split for r in pairs] == [held_out(scene, 0.5) for scene in ("scene0000_00", "scene0001_01") for _ in range(3)]
    pairs = opened("dfwb", "photographs", tmp_path / "d", eval_fraction=0.5)
    splits = {}
    for row, record in zip(pairs.pairs.rows, pairs, strict=True):
        splits.setdefault(row["scene"], set()).add(record.split)
    assert all(len(s) == 1 for s in splits.values()) and set.union(*splits.values()) == {"train", "eval"}


def test_a_name_that_is_not_utf_8_has_its_words(tmp_path):
    """As old archives have them: bytes that Python keeps as lone surrogates."""
    assert pick(("a", "b"), "caf\udce9.png") in ("a", "b")
