"""Edits of rendered scenes: labels are exact, success is what it says, and the command needs no data."""

import json

import jax
import numpy as np
import pytest

from xprompt_jax import UserError
from xprompt_jax.cli import main
from xprompt_jax.data.images import open_image
from xprompt_jax.data.render import COLORS
from xprompt_jax.evaluate import metrics
from xprompt_jax.evaluate.measures import reduce_sums
from xprompt_jax.evaluate.suites import find_records
from xprompt_jax.evaluate.world import EDIT_SUCCESS, WORLD, write_edits

SIZE = 48


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_edits(folder, size=SIZE, groups=1, pairs_per_group=4)
    return folder


def labels(folder, side, file):
    return np.asarray(open_image(folder / f"{side}_labels" / file))[..., 0].astype(int)


def test_labels_say_which_colour_was_edited(rendered):
    rows = [json.loads(line) for line in (rendered / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * 4 and len(find_records(WORLD, rendered)) == 24
    for row in rows:
        file, colours = row["input"].removeprefix("input/"), list(COLORS)
        before, after = (set(np.unique(labels(rendered, side, file))) for side in ("input", "target"))
        named = {2 + colours.index(word) for word in row["instruction"].split() if word in colours}
        if row["task"] == "add_object":
            assert after - before <= named
        elif row["task"] == "remove_object":
            assert named & before and not named & after
        elif row["task"] == "recolor":
            old, new = (2 + colours.index(word) for word in row["instruction"].split() if word in colours)
            assert old in before and old not in after and new in after and new not in before
    assert write_edits(rendered, size=SIZE, groups=1, pairs_per_group=4) == rendered / "manifest.jsonl"
    with pytest.raises(UserError, match="holds scenes of another seed, size or number"):
        write_edits(rendered, size=16, groups=1, pairs_per_group=4)


def test_the_target_is_a_success_and_the_input_none(rendered):
    done, kept, flooded = [], [], []
    for record in find_records(WORLD, rendered):
        before, after = (np.asarray(open_image(path)) for path in (record.input, record.output))
        flood = np.broadcast_to(after[SIZE // 2, SIZE // 2], after.shape).copy()
        sums = WORLD.score(record, {"drawn": after, "copied": before, "wrong": flood}, SIZE)[EDIT_SUCCESS.name]
        for scores, arm in ((done, "drawn"), (kept, "copied"), (flooded, "wrong")):
            scores.append(sums[arm])
    assert reduce_sums(done) >= 95 and reduce_sums(kept) <= 5 and reduce_sums(flooded) == 0


def test_success_worked_by_hand():
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], float)
    before, after = np.array([[0, 0], [1, 1]]), np.array([[0, 0], [2, 2]])
    paint = lambda *names: np.array([colours[list(names[:2])], colours[list(names[2:])]], np.uint8)
    shades = np.stack([colours, colours // 2 + 20], 1)
    success = lambda picture: metrics.edit_success(picture, before, after, shades)
    assert success(paint(0, 0, 2, 2)) == 1 and success(paint(0, 0, 2, 2) // 2 + 20) == 1
    assert success(paint(0, 0, 1, 1)) == 0  # nothing done
    assert success(paint(0, 0, 2, 1)) == 0  # half is not more than half
    assert success(paint(2, 2, 2, 2)) == 0  # painted over
    assert np.isnan(metrics.edit_success(paint(0, 0, 2, 2), after, after, shades))
    np.testing.assert_array_equal(metrics.nearest_labels(paint(0, 1, 2, 0) // 2 + 20, shades), [[0, 1], [2, 0]])


def test_the_command_renders_draws_and_scores(capsys, tiny_folders, tmp_path):
    out = tmp_path / "o"
    main(["eval", "world", "--model", str(tiny_folders[0]), "--out", str(out), "--groups", "1", "--examples", "1", "--queries", "1"])
    result = json.loads((out / "result.json").read_text())
    assert result["data"]["queries"] == result["data"]["groups"] == 6
    success = result["scores"]["edit_success"]
    assert success["copied"]["mean"] == 0 and success["drawn"]["mean"] is not None
    assert "world edit_success (%): drawn" in capsys.readouterr().out and jax.device_count()
    main(["eval", "recompute", str(out)])
    assert "numbers of result.json follow from its files" in capsys.readouterr().out
