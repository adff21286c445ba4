"""GenEval from drawing to the score, with a small metadata file of the official format."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest

from xprompt_jax import UserError, XPrompt
from xprompt_jax.cli import main
from xprompt_jax.evaluate import geneval

METADATA = [
    {"tag": "single_object", "include": [{"class": "rain", "count": 1}], "prompt": "add rain"},
    {"tag": "counting", "include": [{"class": "rain", "count": 2}], "exclude": [{"class": "rain", "count": 3}], "prompt": "remove rain"},
    {"tag": "counting", "include": [{"class": "rain", "count": 1}], "exclude": [{"class": "rain", "count": 2}], "prompt": "the rain"},
    {"tag": "color_attr", "include": [{"class": "rain", "count": 1, "color": "red"}, {"class": "depth", "count": 1, "color": "blue"}],
     "prompt": "paint the depth"},
    {"tag": "position", "include": [{"class": "rain", "count": 1}, {"class": "depth", "count": 1, "position": ["left of", 0]}],
     "prompt": "depth in grey"},
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("g") / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in METADATA))
    return path


@pytest.fixture(scope="module")
def drawn(tiny_folders, data):
    out = data.parent / "images"
    main(["eval", "geneval", "--model", str(tiny_folders[0]), "--data", str(data), "--out", str(out), "--seed", "3"])
    return out


def fails(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(w) for w in words])
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xprompt: ")]
    return line


def verdicts(right):
    """Official results, as pandas writes them; `right` are (prompt, image)."""
    return "".join(
        json.dumps({
            "filename": f"/elsewhere/images/{p:05d}/samples/{i:04d}.png", "tag": row["tag"], "prompt": row["prompt"],
            "correct": (p, i) in right, "reason": "", "metadata": json.dumps(row), "details": "{}",
        }) + "\n"
        for p, row in reversed(list(enumerate(METADATA))) for i in range(4)
    )  # fmt: skip


def test_folder_is_the_official_one_and_goes_on(capsys, tiny_folders, data, drawn):
    names = sorted(str(p.relative_to(drawn)) for p in drawn.glob("**/*") if p.is_file() and p.name != "run.json")
    assert names == sorted(f"{p:05d}/{name}" for p in range(5) for name in ("metadata.jsonl", *(f"samples/{i:04d}.png" for i in range(4))))
    assert [json.loads((drawn / f"{p:05d}" / "metadata.jsonl").read_text()) for p in range(5)] == METADATA
    model = XPrompt.from_pretrained(tiny_folders[0])
    alone = model.text_to_image([METADATA[3]["prompt"]], seed=3, num_images=4)
    for i, image in enumerate(alone):
        np.testing.assert_array_equal(image, PIL.Image.open(geneval.sample_path(drawn, 3, i)))
    assert len({image.tobytes() for image in alone}) == 4

    lost, kept = geneval.sample_path(drawn, 2, 1), geneval.sample_path(drawn, 4, 3)
    pixels, before = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    flags = ["--data", data, "--out", drawn]
    assert "1 of 20 images missing, the first is 00002/samples/0001.png" in fails(capsys, "eval", "geneval", *flags)
    main(["eval", "geneval", "--model", str(tiny_folders[0]), *map(str, flags), "--seed", "3"])
    assert lost.read_bytes() == pixels and kept.stat().st_mtime_ns == before
    assert "all 5 prompts have their 4 images" in capsys.readouterr().out
    assert "drawn with seed 3, not 4" in fails(capsys, "eval", "geneval", "--model", tiny_folders[0], *flags, "--seed", 4)


def test_folder_that_is_not_complete_or_of_others_is_told(capsys, data, drawn, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(drawn, out)
    check = ["eval", "geneval", "--data", data, "--out", out]
    assert "15 images not asked for, the first is 00000/samples/0001.png" in fails(capsys, *check, "--num-images", 1)
    shutil.rmtree(out / "00001" / "samples")
    assert "4 of 20 images missing, the first is 00001/samples/0000.png" in fails(capsys, *check)
    shutil.copytree(drawn / "00001" / "samples", out / "00001" / "samples")
    shutil.copy(out / "00000" / "metadata.jsonl", out / "00001")
    assert "00001/metadata.jsonl: not line 2 of --data" in fails(capsys, *check)


def test_score_is_the_mean_over_tasks(capsys, data, drawn, tmp_path):
    right = {(0, i) for i in range(4)} | {(1, 0), (3, 0), (3, 1)}
    (tmp_path / "results.jsonl").write_text(verdicts(right))
    flags = ["--data", str(data), "--out", str(drawn), "--results", str(tmp_path / "results.jsonl")]
    main(["eval", "geneval", *flags])
    printed = capsys.readouterr().out.splitlines()
    # single 4 / 4, counting 1 / 8, colour attribution 2 / 4, position 0 / 4; over images it would be 7 / 20.
    tasks = {"single_object": 1.0, "counting": 0.125, "position": 0.0, "color_attr": 0.5}
    paper = {"single_object": 0.98, "counting": 0.33, "position": 0.26, "color_attr": 0.28, "overall": 0.57}
    assert printed[:5] == [
        f"geneval {tag}: {score:.4f}; paper: X-Prompt with text prediction {paper[tag]:g}"
        for tag, score in {**tasks, "overall": 1.625 / 4}.items()
    ]
    assert printed[5] == "geneval: 20 images of 5 prompts are not the benchmark, which has 553 prompts and 4 images of each"
    result = json.loads((drawn / "result.json").read_text())
    assert {name: s["drawn"]["mean"] for name, s in result["scores"].items()} == {**tasks, "overall": 1.625 / 4}
    assert result["shares"] == {"images": 7 / 20, "prompts": 3 / 5} and result["seed"] == 3
    assert result["model"]["fingerprint"] == json.loads((drawn / "run.json").read_text())["model"]
    assert "0.40625" in (drawn / "index.html").read_text()
    main(["eval", "recompute", str(drawn)])
    assert "all 12 numbers" in capsys.readouterr().out  # 5 scores, 5 prompts, 2 shares
    (drawn / "result.json").write_text(json.dumps(result | {"shares": {"images": 7 / 20, "prompts": 4 / 5}}))
    assert "shares.prompts is 0.8, and 0.6" in fails(capsys, "eval", "recompute", drawn)
    (drawn / "result.json").write_text(json.dumps(result))
    (drawn / "results.jsonl").write_text(verdicts(right | {(4, 0)}))
    assert "scores.position.drawn.mean is 0.0, and 0.25" in fails(capsys, "eval", "recompute", drawn)


def test_low_single_object_scores_are_suspected(capsys, data, drawn, tmp_path):
    (tmp_path / "results.jsonl").write_text(verdicts({(0, 0), (0, 1)}))
    main(["eval", "geneval", "--data", str(data), "--out", str(drawn), "--results", str(tmp_path / "results.jsonl")])
    assert "single_object is below 0.8" in capsys.readouterr().out


@pytest.mark.parametrize("change, problem", [
    (lambda rows: rows[:-1], "1 of 20 images missing, the first is 00000/samples/0003.png"),
    (lambda rows: [*rows, rows[0]], "line 21: 00004/samples/0000.png is there twice"),
    (lambda rows: [{**rows[0], "filename": "a.png"}], 'line 1: "filename" must end like'),
    (lambda rows: [{**rows[0], "prompt": "another"}, *rows[1:]], "00004/samples/0000.png has no \"correct\", or is of another prompt"),
    (lambda rows: [{**rows[0], "correct": "yes"}, *rows[1:]], 'has no "correct"'),
])  # fmt: skip
def test_results_that_do_not_fit_are_refused(capsys, data, drawn, tmp_path, change, problem):
    rows = change([json.loads(line) for line in verdicts(set()).splitlines()])
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert problem in fails(capsys, "eval", "geneval", "--data", data, "--out", drawn, "--results", tmp_path / "r.jsonl")


def test_detections_are_judged_by_the_rules(capsys, data, drawn, tmp_path):
    rain = {"class": "rain", "box": [100, 0, 120, 20], "confidence": 0.95, "color": "red"}
    unsure, third = {**rain, "confidence": 0.85}, {**rain, "confidence": 0.2}
    blue = {"class": "depth", "box": [0, 0, 20, 20], "confidence": 0.9, "color": "blue"}
    found = {0: [unsure], 1: [rain, rain, unsure], 2: [rain, rain], 3: [rain, blue, third], 4: [rain, blue]}
    line = lambda p, i: {"filename": f"{p:05d}/samples/{i:04d}.png", "objects": found[p] if i < 3 else []}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line(p, i)) + "\n" for p in range(5) for i in range(4)))
    flags = ["eval", "geneval", "--data", data, "--out", drawn]
    main([*map(str, flags), "--detections", str(tmp_path / "d.jsonl")])
    scores = {name: s["drawn"]["mean"] for name, s in json.loads((drawn / "result.json").read_text())["scores"].items()}
    assert scores == {"single_object": 0.75, "counting": 0.375, "color_attr": 0.75, "position": 0.75, "overall": 2.625 / 4}
    rows = [json.loads(text) for text in (drawn / "results.jsonl").read_text().splitlines()]
    assert json.loads(rows[4]["details"]) == {"rain": [[100, 0, 120, 20, 0.95]] * 2} and rows[4]["correct"] is True
    assert rows[8]["reason"] == "expected rain<2, found 2" and rows[3]["reason"] == "expected rain>=1, found 0"
    main([*map(str, flags), "--results", str(drawn / "results.jsonl")])  # it is the official format
    again = json.loads((drawn / "result.json").read_text())
    assert {name: s["drawn"]["mean"] for name, s in again["scores"].items()} == scores

    for change, problem in (
        ({"color": None}, "00003/samples/0000.png: a detection of 'rain' has no \"color\""), ({"box": [0, 1]}, '"box" of 4 numbers'),
        ({"color": "mauve"}, '"color" of red'), ({"confidence": None}, '"confidence"'),
    ):  # fmt: skip
        lines = [line(p, i) for p in range(5) for i in range(4)]
        lines[12]["objects"] = [{**rain, **change}]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        assert problem in fails(capsys, *flags, "--detections", tmp_path / "d.jsonl")


@pytest.mark.parametrize("row, problem", [
    ({"tag": "beauty"}, '"tag" is none of'), ({"include": []}, '"include" must be a list'),
    ({"include": [{"class": "a"}]}, 'needs a "class"'),
    ({"include": [{"class": "a", "count": 1, "color": "mauve"}]}, 'a "color" of red'),
    ({"include": [{"class": "a", "count": 1, "position": ["left of", 0]}]}, '"position" must be'),
    ({"include": [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": ["left of", 0.0]}]}, '"position" must be'),
    ({"include": [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": ["left of", False]}]}, '"position" must be'),
    ({"prompt": None}, 'no "prompt"'),
])  # fmt: skip
def test_metadata_of_another_kind_are_refused(tmp_path, row, problem):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(METADATA[0]) + "\n" + json.dumps({**METADATA[0], **row}) + "\n")
    with pytest.raises(UserError, match="line 2") as error:
        geneval.read_metadata(path)
    assert problem in str(error.value) and "give GenEval's evaluation_metadata.jsonl" in str(error.value)


def test_half_an_emoji_is_scored(capsys, tiny_folders, tmp_path):
    row, out = {**METADATA[0], "prompt": "rain \ud83d"}, tmp_path / "o"
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    flags = ["eval", "geneval", "--data", str(tmp_path / "m.jsonl"), "--out", str(out), "--num-images", "1"]
    main([*flags, "--model", str(tiny_folders[0])])
    (tmp_path / "r.jsonl").write_text(json.dumps({**row, "filename": "00000/samples/0000.png", "correct": True}))
    main([*flags, "--results", str(tmp_path / "r.jsonl")])
    main(["eval", "recompute", str(out)])
    assert "rain ?" in (out / "index.html").read_text() and "rain ?" in (out / "scores.csv").read_text()
    assert json.loads((out / "result.json").read_text())["queries"][0]["prompt"] == row["prompt"]


def test_flags_that_would_do_nothing_are_refused(capsys, data, tmp_path):
    flags = ["eval", "geneval", "--data", data, "--out", tmp_path]
    assert "flags of drawing need --model" in fails(capsys, *flags, "--top-k", 3)
    assert "not both" in fails(capsys, *flags, "--results", "r", "--detections", "d")
    assert "--num-images must be at least 1" in fails(capsys, *flags, "--num-images", 0)
    line = fails(capsys, "eval", "geneval", "--data", tmp_path / "none.jsonl", "--out", tmp_path)
    assert "none.jsonl: no such file; give GenEval's prompts/evaluation_metadata.jsonl, 553 lines {" in line
