"""Novel tasks: Table 4's data sets and the table of all arms, style and action; from the layouts on disk to the scores."""

import csv
import json

import numpy as np
import PIL.Image
import pytest

from tests.evaluate.conftest import smooth
from xprompt_jax import UserError
from xprompt_jax.cli import main
from xprompt_jax.data.datasets.base import Rows
from xprompt_jax.data.datasets.editing import _edit, _Seeds, table_4
from xprompt_jax.data.images import save_png
from xprompt_jax.evaluate import published
from xprompt_jax.evaluate.features import Encoders
from xprompt_jax.evaluate.novel import OBJECT_ADDITION, OBJECT_REMOVAL, STYLE
from xprompt_jax.evaluate.pairs import paired_bootstrap
from xprompt_jax.evaluate.suites import find_records
from xprompt_jax.evaluate.table4 import OWN_NO_EXAMPLE, ROWS, TASKS


def test_queries_are_those_of_table_4(pix2pix):
    theirs, told = table_4(Rows(_Seeds(pix2pix, (0.95, 1.0)), _make))
    ours = {kind: find_records(suite, pix2pix) for kind, suite in (("add", OBJECT_ADDITION), ("remove", OBJECT_REMOVAL))}
    asked = [r for records in ours.values() for r in records if r.split == "eval"]
    assert [(r.input, r.output, r.instruction) for r in asked] == [(r.input, r.output, r.instruction) for r in theirs]
    assert [kind for _, kind, _ in told] == ["add"] * 3 + ["remove"] * 2 and len({r.instruction for r in asked}) == len(asked) == 5
    for kind, records in ours.items():
        shown = [r for r in records if r.split == "train"]
        assert shown and not {r.input for r in shown} & {r.input for r in asked}
        assert all(r.instruction.startswith(kind) for r in records)
    first = asked[0]
    assert first.captions_before == {"global": "a photo"} and first.captions_after == {"global": f"a photo, {first.instruction}"}


def _make(row):
    return _edit(row, group="g", columns=("before", "after", "edit"))


def test_additions_through_the_command(capsys, tiny_folders, weights, pix2pix, tmp_path):
    flags = ["--clip", str(weights[0]), "--dino", str(weights[1])]
    command = ["eval", "object_addition", "--model", str(tiny_folders[0]), "--data", str(pix2pix), "--examples", "1", "--queries", "2"]
    main([*command, "--out", str(tmp_path), *flags])
    result = json.loads((tmp_path / "result.json").read_text())
    encoders = Encoders(*weights)
    for query in result["queries"]:
        record = next(r for r in find_records(OBJECT_ADDITION, pix2pix) if str(r.input) == query["input"])
        drawn = np.asarray(PIL.Image.open(tmp_path / "images" / f"{query['number']:05d}" / "drawn-0.png").convert("RGB"))
        ((clip, dino),) = encoders.look([drawn])
        source, target = encoders.look_at(record.input, record.captions_before), encoders.look_at(record.output, record.captions_after)
        change, words = clip - source.clip, target.words["global"] - source.words["global"]
        wanted = {
            "clip_direction": change @ words / np.linalg.norm(change) / np.linalg.norm(words),
            "clip_text_global": clip @ target.words["global"], "clip_image_target": clip @ target.clip, "dino_target": dino @ target.dino,
        }  # fmt: skip
        for name, value in wanted.items():
            assert query["scores"][name]["drawn"] == pytest.approx(float(value), abs=2e-5)
    assert {m.column for m in OBJECT_ADDITION.metrics} == {"CLIP_dir", "CLIP_out", "CLIP_img", "DINO", ""}
    main(["eval", "recompute", str(tmp_path), *flags])
    assert "numbers of result.json follow from its files" in capsys.readouterr().out


@pytest.mark.parametrize("suite", ["style", "action"])
def test_forms_have_their_own_examples(capsys, tiny_folders, weights, tmp_path, suite):
    rows = []
    for i in range(4):
        for side in (0, 1):
            save_png(smooth(i, side), tmp_path / f"{i}-{side}.png")
        rows.append({"input": f"{i}-0.png", "output": f"{i}-1.png", "instruction": "paint it", "task": suite, "group": f"mosaic {i % 2}"})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--clip", str(weights[0]), "--dino", str(weights[1])]
    main(["eval", suite, "--model", str(tiny_folders[0]), "--data", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "o"), *flags])
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result["data"]["groups"] == 2 and result["data"]["wrong_example"] == "a pair of another group"
    number = lambda path: int(path.rsplit("/", 1)[-1][0])
    assert all(number(q["input"]) % 2 == number(q["example"]) % 2 != number(q["wrong"]) % 2 for q in result["queries"])
    scores = result["scores"]["clip_direction_image"]
    assert -1 <= scores["drawn"]["mean"] <= 1 and scores["ceiling"]["mean"] > scores["drawn"]["mean"]
    assert [m.name for m in STYLE.metrics] == list(result["scores"])
    main(["eval", "recompute", str(tmp_path / "o"), *flags])
    assert "numbers of result.json follow from its files" in capsys.readouterr().out


def test_damaged_copies_are_one_line(pix2pix, tmp_path):
    with pytest.raises(UserError, match="not the layout expected; suite object_addition takes a manifest .*clip-filtered-dataset"):
        find_records(OBJECT_ADDITION, tmp_path)
    (tmp_path / "seeds.json").write_text('[["a", ["1"]]]')
    with pytest.raises(UserError, match=r"a/prompt.json: not readable .*complete the copy of InstructPix2Pix"):
        find_records(OBJECT_ADDITION, tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "prompt.json").write_text('{"edit": "add a ball"}')
    with pytest.raises(UserError, match="no prompt with input, edit and output"):
        find_records(OBJECT_ADDITION, tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """LOL, Rain100H and NYUv2 in their layouts, three images each."""
    root = tmp_path_factory.mktemp("t4")
    for suite, sides in (("lol", ("low", "high")), ("rain", ("input", "target")), ("nyu", ("rgb", "depth"))):
        for i in range(3):
            for side in sides:
                depth = (1000 + 8000 * np.linspace(0, 1, 20)[None] * np.ones((16, 1))).astype(np.uint16)
                save_png(depth if side == "depth" else smooth(i, len(suite + side), shape=(16, 20)), root / suite / side / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def table(tiny_folders, data, pix2pix, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("table")
    command = [
        "eval", "table4", "--out", out / "o", "--xprompt", tiny_folders[0], "--causal", tiny_folders[1], "--none", tiny_folders[1],
        "--full", tiny_folders[1], "--low-light", data / "lol", "--derain", data / "rain", "--depth", data / "nyu", "--edits", pix2pix,
        "--clip", weights[0], "--dino", weights[1], "--examples", "1", "--queries", "2",
    ]  # fmt: skip
    main([str(word) for word in command])
    return out / "o", [str(word) for word in command]


def test_rows_and_columns_are_the_papers(table):
    out, _ = table
    result = json.loads((out / "result.json").read_text())
    assert tuple(result["scores"]) == TASKS
    with (out / "table4.csv").open() as f:
        cells = {(r["suite"], r["metric"], r["row"]): r for r in csv.DictReader(f)}
    assert {row for _, _, row in cells} == {*ROWS, published.OMNIGEN}
    omnigen = cells["derain_heavy", "psnr_rgb", published.OMNIGEN]
    assert omnigen["mean"] == "" and float(omnigen["published"]) == 13.14 and "(13.14)" in (out / "index.html").read_text()
    assert float(cells["derain_heavy", "psnr_rgb", published.XP]["published"]) == 18.91
    assert float(cells["depth", "depth_rmse_painter", published.CAUSAL]["published"]) == 0.390
    assert float(cells["low_light", "ssim_skimage_default", published.NO_EXAMPLE]["published"]) == 0.253
    assert float(cells["object_addition", "clip_direction", published.NO_EXAMPLE]["published"]) == -0.031
    assert float(cells["object_removal", "clip_text_global", published.FULL]["published"]) == 0.265
    assert (
        cells["low_light", "psnr_rgb", OWN_NO_EXAMPLE]["published"] == ""
        and float(cells["depth", "palette_distance", published.XP]["mean"]) > 0
    )
    assert (ROWS[published.NO_EXAMPLE], ROWS[published.CAUSAL]) == (("xprompt", "none"), ("causal", "drawn"))
    assert (ROWS[published.XP], ROWS[published.FULL]) == (("xprompt", "drawn"), ("full", "drawn"))
    # Each cell is an arm of a run.
    for row, (key, arm) in ROWS.items():
        run = json.loads((out / "low_light" / key / "result.json").read_text())
        assert run["model"]["mode"] == {"none": "none", "causal": "causal"}.get(key, "xprompt")
        mean = run["scores"]["psnr_rgb"][arm]["mean"]
        assert result["scores"]["low_light"]["psnr_rgb"][row]["mean"] == mean == float(cells["low_light", "psnr_rgb", row]["mean"])
    assert json.loads((out / "depth" / "xprompt" / "run.json").read_text())["palette"] == "spectral"
    gap = result["scores"]["low_light"]["psnr_rgb"]["xp_minus"][published.CAUSAL]
    runs = [json.loads((out / "low_light" / key / "result.json").read_text())["queries"] for key in ("xprompt", "causal")]
    each = [a["scores"]["psnr_rgb"]["drawn"] - b["scores"]["psnr_rgb"]["drawn"] for a, b in zip(*runs, strict=True)]
    assert (gap["mean"], gap["low"], gap["high"]) == pytest.approx(paired_bootstrap(each))
    assert "(18.91)" in (out / "index.html").read_text()


def test_the_table_goes_on_and_follows_from_its_files(capsys, table, weights):
    out, command = table
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*/images/*/*.png")}
    assert len(before) > 100
    lost = out / "derain_heavy" / "causal" / "images" / "00001" / "drawn-0.png"
    pixels = lost.read_bytes()
    lost.unlink()
    main(command)
    assert lost.read_bytes() == pixels
    assert sum(p.stat().st_mtime_ns != t for p, t in before.items()) <= 2  # drawn and wrong of one query
    assert f"table4 depth depth_rmse_painter: {published.XP}" in (told := capsys.readouterr().out) and "; paper: 0.352" in told
    flags = ["--clip", str(weights[0]), "--dino", str(weights[1])]
    main(["eval", "recompute", str(out), *flags])
    assert "numbers of result.json follow from its files" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    result["scores"]["depth"]["palette_distance"][published.XP]["mean"] += 1e-3
    (out / "result.json").write_text(json.dumps(result))
    with pytest.raises(SystemExit):
        main(["eval", "recompute", str(out), *flags])
    assert "palette_distance" in capsys.readouterr().err


def test_what_a_table_lacks_is_one_line(capsys, tiny_folders, data, tmp_path):
    base = ["eval", "table4", "--xprompt", "/none", "--out", str(tmp_path / "o")]
    for flags, told in (
        ([], "no data: give at least one of --low-light"),
        (["--derain", str(tmp_path)], f"--data {tmp_path}: not the layout expected; suite derain_heavy"),
        (["--edits", str(tmp_path)], "--clip DIR (openai/clip-vit-base-patch32) is missing"),
        (["--low-light", str(data / "lol"), "--examples", "0"], "--examples must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            main([*base, *flags])
        assert told in capsys.readouterr().err


def test_a_table_that_is_drawn_anew_forgets_the_old_one_first(capsys, tiny_folders, data, tmp_path):
    (tmp_path / "result.json").touch()
    with pytest.raises(SystemExit):
        main([
            "eval", "table4", "--xprompt", str(tiny_folders[0]), "--full", "/none", "--out", str(tmp_path), "--overwrite",
            "--low-light", str(data / "lol"), "--examples", "1", "--queries", "1",
        ])  # fmt: skip
    assert "/none" in capsys.readouterr().err and not (tmp_path / "result.json").exists()
    assert (tmp_path / "low_light" / "xprompt" / "result.json").exists()
