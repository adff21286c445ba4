"""Copies of benchmarks as they lie on disk: which files are queries, and which targets are theirs."""

import numpy as np
import PIL.Image
import pytest

from xprompt_jax import UserError
from xprompt_jax.evaluate.runs import make_plan
from xprompt_jax.evaluate.suites import SUITES, find_records

BLANK = PIL.Image.fromarray(np.zeros((4, 4, 3), np.uint8))


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        BLANK.save(root / name)


def pairs(suite, root, below):
    """(input, target) relative to a folder; all must be held out."""
    records = find_records(SUITES[suite], root)
    assert all(r.split == "eval" and r.task == r.group == suite and r.instruction == SUITES[suite].instruction for r in records)
    return [(r.input.relative_to(below).as_posix(), r.output.relative_to(below).as_posix()) for r in records]


@pytest.mark.parametrize("suite, below, files", [
    ("derain", "test/Rain100L", (("input/1.png", "target/1.png"), ("input/2.png", "target/2.png"))),
    ("derain", "Rain100L", (("rainy/1.png", "norain/1.png"),)),
    ("derain_heavy", "Rain100H", (("rain-001.png", "norain-001.png"), ("rain-002.png", "norain-002.png"))),
    ("derain_heavy", "", (("rainy/rain-001.png", "norain/norain-001.png"),)),
    ("derain", "", (("input/rain-001.png", "target/norain-001.png"),)),
    ("deblur", "test", (("GOPR0384_11_00/blur/000001.png", "GOPR0384_11_00/sharp/000001.png"),)),
    ("deblur", "test", (("input/GOPR0384_11_00-000001.png", "target/GOPR0384_11_00-000001.png"),)),
    ("low_light", "eval15", (("low/1.png", "high/1.png"),)),
    ("low_light", "Test", (("input/1.png", "target/1.png"),)),
    ("depth", "official_splits/test", (("bath_0001/rgb_00045.jpg", "bath_0001/sync_depth_00045.png"),
                                       ("study_0002/rgb_00045.jpg", "study_0002/sync_depth_00045.png"))),
    ("segmentation", "ADEChallengeData2016", (("images/validation/ADE_val_00000001.jpg", "annotations/validation/ADE_val_00000001.png"),)),
    ("normals", "test", (("img/000001.png", "norm/000001.png"),)),
])  # fmt: skip
def test_pairs_are_found_from_the_folder_and_from_the_one_above(tmp_path, suite, below, files):
    place = tmp_path / below
    write(place, *(name for pair in files for name in pair))
    write(tmp_path, "train/input/7.png", "test/GOPR0384_11_00/blur_gamma/000001.png", "images/training/7.jpg", "our485/low/7.png")
    assert pairs(suite, tmp_path, place) == pairs(suite, place, place) == list(files)


def test_nyud_mt_asks_what_its_list_names_and_shows_the_rest(tmp_path):
    for i in range(4):
        for side in ("images", "normals"):
            image = np.full((4, 4, 3), 20 * i, np.uint8)
            (tmp_path / side).mkdir(exist_ok=True)
            PIL.Image.fromarray(image).save(tmp_path / side / f"{i}.png")
    (tmp_path / "gt_sets").mkdir()
    (tmp_path / "gt_sets" / "val.txt").write_text("1\n3\n")
    (tmp_path / "gt_sets" / "train.txt").write_text("0\n2\n")
    suite = SUITES["normals_nyud"]
    for shown in (None, tmp_path):  # the same folder given for the examples still shows none of its queries
        plan = make_plan(suite, tmp_path, examples_from=shown, examples=1)
        assert [e.query.input.stem for e in plan.episodes] == ["1", "3"] and {e.example.input.stem for e in plan.episodes} < {"0", "2"}
    (tmp_path / "gt_sets" / "train.txt").unlink()
    with pytest.raises(UserError, match=r"train\.txt: not there or not a text; it lists a split"):
        find_records(suite, tmp_path)


def test_an_input_without_its_target_is_named(tmp_path):
    write(tmp_path, "rain-001.png", "norain-001.png", "rain-002.png")
    with pytest.raises(UserError, match=r"rain-002\.png: no .*norain-002.* complete the copy"):
        find_records(SUITES["derain"], tmp_path)


def test_absent_data_names_every_layout(tmp_path):
    for suite in SUITES.values():
        with pytest.raises(UserError) as error:
            find_records(suite, tmp_path)
        assert all(copy.words in str(error.value) for copy in suite.copies) and "\n" not in str(error.value)
