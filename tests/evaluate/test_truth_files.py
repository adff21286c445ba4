"""Suites on the files that their benchmarks consist of: photographs by pairs, depth, labels and normals."""

import numpy as np
import PIL.Image
import pytest

from tests.evaluate.test_suites import picture, strict_json
from xprompt_jax import UserError
from xprompt_jax.cli import main
from xprompt_jax.data import palettes
from xprompt_jax.data.images import save_png
from xprompt_jax.data.sources import Record
from xprompt_jax.evaluate import runs
from xprompt_jax.evaluate.measures import reduce_sums
from xprompt_jax.evaluate.suites import SUITES, get_suite
from xprompt_jax.evaluate.truths import Depth, Labels


@pytest.fixture
def folder(loud_folder):
    return loud_folder


DENSE = {
    "depth": ("official_splits/test/study_000{}/rgb_0004{}.jpg", "official_splits/test/study_000{}/sync_depth_0004{}.png"),
    "segmentation": ("ADEChallengeData2016/images/validation/ADE_val_0000000{1}.jpg",
                     "ADEChallengeData2016/annotations/validation/ADE_val_0000000{1}.png"),
    "normals": ("test/img/00000{1}.png", "test/norm/00000{1}.png"),
    "normals_nyud": ("images/000{1}.png", "normals/000{1}.png"),
}  # fmt: skip
"""Where BTS, ADE20K, GeoNet and NYUD-MT keep inputs and truths, by scene and number."""


def dense(root, suite):
    """Truth files in each suite's own format and place, three scenes; of NYUD-MT two more, which train."""
    rng = np.random.default_rng(0)
    for i in range(5 if suite == "normals_nyud" else 3):
        before, after = (root / name.format(i % 2, i) for name in DENSE[suite])
        before.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture(i, shape=(24, 32))).save(before)
        if suite == "depth":
            truth = (1000 + 8000 * np.linspace(0, 1, 32)[None] * np.ones((24, 1))).astype(np.uint16)
        elif suite == "segmentation":
            truth = np.kron(rng.integers(0, 151, (3, 4)), np.ones((8, 8), int)).astype(np.uint8)
        else:
            truth = palettes.encode_normals(np.broadcast_to([0, 0.6, 0.8], (24, 32, 3)))
        save_png(truth, after)
    if suite == "normals_nyud":
        (root / "gt_sets").mkdir()
        (root / "gt_sets" / "val.txt").write_text("0000\n0001\n0002\n")
        (root / "gt_sets" / "train.txt").write_text("0003\n0004\n")


def test_depth_without_a_unit_is_refused(tmp_path):
    depth = Depth(palettes.get_palette("turbo"))
    save_png(np.full((4, 4), 76, np.uint8), tmp_path / "d.png")
    np.save(tmp_path / "d.npy", np.full((4, 4), 3000))
    for name, message in (("d.png", "of 8 bits tells no millimetres"), ("d.npy", "int64, which tells no unit")):
        with pytest.raises(UserError, match=message):
            depth.read(tmp_path / name)
    np.save(tmp_path / "d.npy", np.full((4, 4), 3.0))
    assert (depth.read(tmp_path / "d.npy") == 3).all()


def test_normals_are_unknown_where_no_unit_vector_stands(tmp_path):
    rgb = palettes.encode_normals(np.broadcast_to([0, 0.6, 0.8], (2, 2, 3))).copy()
    rgb[0, 0], rgb[0, 1], rgb[1, 0] = 0, 255, 127  # GeoNet's way, and two of NYUD-MT
    save_png(rgb, tmp_path / "n.png")
    truth = get_suite("normals_nyud").truth.read(tmp_path / "n.png")
    assert truth.any(-1).tolist() == [[False, False], [False, True]]
    np.testing.assert_allclose(truth[1, 1], [0, 0.6, 0.8], atol=0.01)


@pytest.mark.parametrize("suite, sides", [("deblur", ("GOPR0384/blur", "GOPR0384/sharp")), ("denoise", ("noisy", "clean"))])
def test_photograph_suites_follow_from_their_files(capsys, folder, tmp_path, suite, sides):
    for i in range(2):
        for j, side in enumerate(sides):
            save_png(picture(i, j, shape=(16, 24)), tmp_path / side / f"{i}.png")
    main(["eval", suite, "--model", str(folder), "--data", str(tmp_path), "--out", str(tmp_path / "o"), "--examples", "1"])
    result = strict_json(tmp_path / "o" / "result.json")
    assert list(result["scores"]) == [m.name for m in SUITES[suite].metrics] and result["data"]["queries"] == 1
    main(["eval", "recompute", str(tmp_path / "o")])
    assert "numbers of result.json follow from its files" in capsys.readouterr().out


@pytest.mark.parametrize("suite, perfect", [("depth", 0.35), ("segmentation", 100.0), ("normals", 0.5), ("normals_nyud", 0.5)])
def test_dense_suites_read_their_files_and_know_the_truth(capsys, folder, tmp_path, suite, perfect):
    dense(tmp_path, suite)
    main(["eval", suite, "--model", str(folder), "--data", str(tmp_path), "--out", str(tmp_path / "o"), "--examples", "1"])
    assert "; paper: X-Prompt, Table 2" in capsys.readouterr().out
    result = strict_json(tmp_path / "o" / "result.json")
    for scores in result["scores"].values():
        assert all(scores[arm]["mean"] is not None for arm in runs.ARMS)
    if suite == "normals_nyud":  # all that its list names is asked, what trains is shown
        assert [q["input"][-8:-4] for q in result["queries"]] == ["0000", "0001", "0002"]
        assert {q["example"][-8:-4] for q in result["queries"]} < {"0003", "0004"}
    else:  # one is set aside
        assert result["data"]["queries"] == 2
    main(["eval", "recompute", str(tmp_path / "o")])
    assert "numbers of result.json follow from its files" in capsys.readouterr().out
    # A picture of the truth, drawn without fault at the model's size, is nearly or wholly right.
    table = get_suite(suite)
    truth = Record(*(tmp_path / name.format(0, 0) for name in DENSE[suite]), "")
    _, after = table.read(truth, 48)
    sums = table.score(truth, {"drawn": after}, 48)
    assert list(sums) == [metric.name for metric in table.metrics]
    score = reduce_sums([sums[table.metrics[0].name]["drawn"]])
    assert score == perfect if suite == "segmentation" else score < perfect


def test_colours_can_be_chosen(tmp_path):
    depth, labels = get_suite("depth", "turbo").truth, get_suite("segmentation", "painter").truth
    assert isinstance(depth, Depth) and depth.palette.name == "turbo"
    drawn = depth.palette.encode(np.linspace(0, 10, 12).reshape(3, 4))
    adherence = [get_suite("depth", name).metrics[2].measure(drawn, None, None)[0] for name in ("turbo", "magma")]
    assert adherence[0] == 0 and adherence[1] > 20
    assert isinstance(labels, Labels) and labels.palette.colors[0].tolist() == [255, 255, 255]
    # By a sum of differences, Painter's, classes 116 (129, 213, 171) and 146 (87, 255, 171) are both 154 away; by squares 146 is nearer.
    odd = np.array([[[8, 195, 186]]], np.uint8)
    assert labels.decode(odd, (1, 1)) == 116 and labels.palette.decode(odd) == 146
    np.save(tmp_path / "d.npy", np.full((4, 5), 2.5))
    np.testing.assert_array_equal(depth.read(tmp_path / "d.npy"), np.full((4, 5), 2.5, np.float32))
    np.save(tmp_path / "d.npy", np.zeros((4, 5, 3)))
    with pytest.raises(UserError, match="a depth map must be"):
        depth.read(tmp_path / "d.npy")
    with pytest.raises(UserError, match="use painter or max_separation"):
        get_suite("segmentation", "turbo")
