"""The model that ships with the package, and the demo that shows it."""

import json
from pathlib import Path

import numpy as np
import pytest

from xprompt_jax import CompiledPrompt, XPrompt
from xprompt_jax.commands.demo import Demo
from xprompt_jax.convert.formats import MINI
from xprompt_jax.demo.shipped import SHOWN, run_demo
from xprompt_jax.errors import UserError

TASKS = {"normals": SHOWN["normals"], "tone_curve": SHOWN["tone_curve"]}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A folder in which the demo has shown two tasks."""
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, tasks=TASKS, queries=2)
    return folder


def test_what_is_drawn_follows_the_example(shown):
    scores = json.loads((shown / "scores.json").read_text())
    for arm in ("wrong", "none", "copied"):
        assert scores["mean"]["drawn"] > scores["mean"][arm] + 2, arm
    assert scores["mean"]["drawn"] < scores["mean"]["ceiling"]
    assert set(scores["psnr_rgb"]) == set(TASKS)


def test_the_page_is_whole_and_says_what_it_shows(shown):
    page = (shown / "index.html").read_text()
    assert page.count("<img ") == 2 * 2 * 7 and "http" not in page.replace("http://www.w3.org", "")
    for words in ("to compile an example", "a compiled prompt", "to draw an image", "from a wrong example", "without an example"):
        assert words in page
    assert (shown / "demo.png").stat().st_size > 10_000


def test_its_files_serve_the_next_command(shown, tmp_path):
    from xprompt_jax.cli import main

    flags = ["--model", "mini", "--task", str(shown / "prompts/normals.xprompt"), "--inputs", str(shown / "inputs/normals_0.png")]
    main(["sample", *flags, "--out", str(tmp_path / "drawn")])
    assert [p for p in (tmp_path / "drawn").rglob("*.png") if "normals_0" in p.name]


def test_the_mini_is_found_by_name_from_anywhere(shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = XPrompt.from_pretrained("mini")
    assert CompiledPrompt.load(shown / "prompts/tone_curve.xprompt").fingerprint == model.fingerprint
    assert np.asarray(model.decode_images(model.encode_images([np.zeros((64, 64, 3), np.uint8)]))[0]).mean() < 16
    (tmp_path / "mini").mkdir()
    with pytest.raises(UserError, match="no model here"):  # a folder of that name comes first
        XPrompt.from_pretrained("mini")


def test_the_mini_is_small_and_has_its_card():
    assert sum(p.stat().st_size for p in MINI.iterdir()) < 48 * 2**20
    card = (MINI / "README.md").read_text()
    assert "tools/make_mini.py" in card and "Apache-2.0" in card


def test_quick_belongs_to_training(tmp_path):
    with pytest.raises(UserError, match="--quick belongs to --train"):
        Demo(workdir=tmp_path, quick=True).run()
    with pytest.raises(UserError, match="--devices belongs to --train"):
        Demo(workdir=tmp_path, devices=2).run()


@pytest.mark.parametrize("flags, message", [
    ({"seed": -1}, "--seed -1 must be"), ({"workdir": __file__}, "a file; give a folder"),
    ({"workdir": f"{__file__}/demo"}, "cannot make the folder: Not a directory"),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_drawn(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        Demo(**{"workdir": tmp_path, **{k: Path(v) if k == "workdir" else v for k, v in flags.items()}}).run()
    assert not list(tmp_path.iterdir())
