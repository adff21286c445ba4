"""The tokenizer alone, through the command."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest

from xprompt_jax import XPrompt
from xprompt_jax.cli import main
from xprompt_jax.commands.evaluate import PAIR_SUITES
from xprompt_jax.data.images import postprocess, save_png, to_pixels
from xprompt_jax.evaluate import metrics
from xprompt_jax.evaluate.suites import SUITES


@pytest.fixture
def photographs(pair_folder, tmp_path):
    (tmp_path / "d").mkdir()
    for i in range(3):
        shutil.copy(pair_folder / "target" / f"{i:02d}.png", tmp_path / "d")
    return tmp_path / "d"


def fails(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(w) for w in words])
    return capsys.readouterr().err.splitlines()[-1]


def test_round_trip_at_two_sides(capsys, tiny_folders, photographs, tmp_path):
    out = tmp_path / "o"
    flags = ["eval", "reconstruction", "--model", str(tiny_folders[0]), "--data", str(photographs), "--out", str(out)]
    main(flags)
    printed = capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert sorted(str(p.relative_to(out)) for p in out.glob("images/*/*")) == [
        f"images/0000{i}/{s}.png" for i in range(3) for s in (16, 32)
    ]
    model, image = XPrompt.from_pretrained(tiny_folders[0]), PIL.Image.open(photographs / "01.png").convert("RGB")
    for side in (16, 32):
        square = np.asarray(image.resize((side, side), PIL.Image.Resampling.LANCZOS))
        codes = model._encode(model.vqgan, to_pixels(square)[None])
        assert codes.shape == (1, side // 4, side // 4)
        square = PIL.Image.fromarray(postprocess(np.asarray(model._decode(model.vqgan, codes))[0]))
        back = square.resize(image.size, PIL.Image.Resampling.BICUBIC)
        scores = result["queries"][1]["scores"]
        assert scores["psnr_rgb"][str(side)] == pytest.approx(metrics.psnr_rgb(np.asarray(back), np.asarray(image)), abs=0.05)
        assert scores["ssim_y"][str(side)] == pytest.approx(metrics.ssim_y(np.asarray(back), np.asarray(image)), abs=0.01)
    mean = np.mean([q["scores"]["psnr_rgb"]["32"] for q in result["queries"]])
    summary = result["scores"]["psnr_rgb"]["32"]
    assert summary["mean"] == pytest.approx(mean) and summary["low"] < mean < summary["high"]
    assert f"reconstruction psnr_rgb (dB) at 32: {mean:.3f}" in printed and "Table 5: PSNR 29.77, SSIM 0.906" in printed
    assert f"{mean:.3f}" in (out / "index.html").read_text()

    # It goes on, knows what it was made of, and follows from its files.
    picture = out / "images" / "00002" / "16.png"
    pixels, kept = picture.read_bytes(), (out / "images" / "00000" / "16.png").stat().st_mtime_ns
    picture.unlink()
    main([*flags, "--sides", "16"])
    assert picture.read_bytes() == pixels and (out / "images" / "00000" / "16.png").stat().st_mtime_ns == kept
    assert list(json.loads((out / "result.json").read_text())["scores"]["psnr_rgb"]) == ["16"]
    capsys.readouterr()
    main(["eval", "recompute", str(out)])
    assert f"all {5 * 3 + 3 * 5} numbers" in capsys.readouterr().out
    save_png(np.zeros((16, 16, 3), np.uint8), picture)
    assert "from its files" in fails(capsys, "eval", "recompute", out)
    save_png(np.zeros((20, 26, 3), np.uint8), photographs / "00.png")
    assert "not the images that" in fails(capsys, "eval", "recompute", out)
    assert "drawn with images" in fails(capsys, *flags)


def test_it_is_the_ceiling_of_the_suites(tiny_folders, pair_folder, tmp_path):
    model = ["--model", str(tiny_folders[0])]
    main(["eval", "derain", *model, "--data", str(pair_folder), "--out", str(tmp_path / "a"), "--examples", "1", "--queries", "2"])
    main(["eval", "reconstruction", *model, "--data", str(pair_folder / "target"), "--out", str(tmp_path / "b"), "--sides", "16"])
    suite, alone = (json.loads((tmp_path / name / "result.json").read_text()) for name in "ab")
    scores = {q["input"].rsplit("/", 1)[1]: q["scores"] for q in alone["queries"]}
    for query in suite["queries"]:
        name = query["target"].rsplit("/", 1)[1]
        for metric in ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb_gaussian"):
            assert scores[name][metric]["16"] == query["scores"][metric]["ceiling"]


def test_bad_sides_and_folders_are_one_line(capsys, tiny_folders, photographs, tmp_path):
    flags = ["eval", "reconstruction", "--model", tiny_folders[0], "--out", tmp_path / "o"]
    assert "--sides 18: must be a multiple of 4" in fails(capsys, *flags, "--data", photographs, "--sides", 18)
    assert "--sides 1048576: must be at most 8192" in fails(capsys, *flags, "--data", photographs, "--sides", 16, 1048576)
    assert "--sides 16: given twice" in fails(capsys, *flags, "--data", photographs, "--sides", 16, 32, 16)
    assert "--sides 0: must be a multiple of 4" in fails(capsys, *flags, "--data", photographs, "--sides", 0)
    assert f"lies inside --data {tmp_path}, and the next run would take its images" in fails(capsys, *flags, "--data", tmp_path)
    assert "no such folder" in fails(capsys, *flags, "--data", tmp_path / "none") and not (tmp_path / "o").exists()


def test_suites_of_the_command_line_are_those_of_the_library():
    assert {name: suite.measures for name, suite in SUITES.items() if name != "magicbrush"} == PAIR_SUITES
