"""`xprompt sample` on folders and manifests: what it writes, what it survives, what it refuses."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import PIL.Image
import pytest

from tests.helpers import FP32, TINY
from tests.test_cli import ROOT, fails, run
from xprompt_jax import CompiledPrompt, Example, UserError, XPrompt
from xprompt_jax.cli import main
from xprompt_jax.data.images import save_png
from xprompt_jax.model.chameleon import Chameleon
from xprompt_jax.sample.batch import draw_folder
from xprompt_jax.sample.draw import MAX_BATCH
from xprompt_jax.sample.folder import LOCK
from xprompt_jax.sample.requests import Task, find_requests


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model


@pytest.fixture(scope="module")
def loaded(model):
    return XPrompt.from_pretrained(model, compute=FP32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of six images of odd sizes and modes, one of them below a folder."""
    folder = tmp_path_factory.mktemp("photos") / "in"
    for i, (mode, size) in enumerate([("RGB", (20, 24)), ("L", (7, 31)), ("RGBA", (16, 16)), ("P", (33, 9)), ("CMYK", (1, 1))]):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).convert(mode).save(folder / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    save_png(pixels, folder / "sub/0.png")
    return folder


@pytest.fixture(scope="module")
def task(loaded, photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "derain.xprompt"
    loaded.compile([Example(photos / "0.png", photos / "2.png", "remove the rain")]).save(path)
    return path


def sample(capsys, *arguments):
    """What the command prints when all is well."""
    main(["sample", *map(str, arguments)])
    return capsys.readouterr().out.strip()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def pixels(path):
    return np.asarray(PIL.Image.open(path))


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_input_called_contact_keeps_its_drawing(capsys, model, task, photos, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(photos / "0.png", tmp_path / "in/contact.png")
    for _ in range(2):  # the second run finds it drawn
        sample(capsys, "--model", model, "--task", task, "--inputs", tmp_path / "in", "--out", tmp_path / "o")
        assert sorted(content(tmp_path / "o")) == ["contact-2.png", "contact.png", "samples.jsonl"]
    assert pixels(tmp_path / "o/contact-2.png").shape == (16, 16, 3) and len(lines(tmp_path / "o/samples.jsonl")) == 1


def test_a_folder_is_drawn_and_told(capsys, loaded, model, task, photos, tmp_path):
    out = tmp_path / "o"
    flags = ["--model", model, "--task", task, "--inputs", photos, "--out", out, "--seed", 3, "--guidance", 1.5]
    assert sample(capsys, *flags) == f"{out}: 6 image(s) drawn, 0 kept"
    names = ["0.png", "1.png", "2.png", "3.png", "4.png", "sub/0.png"]
    assert sorted(content(out)) == sorted([*names, "contact.png", "samples.jsonl"])
    told = lines(out / "samples.jsonl")
    assert [line["file"] for line in told] == names
    assert told[1]["input"] == str(photos / "1.png") and told[4]["input"] == str(photos / "4.jpg")
    assert told[0] | {"settings": 0} == {
        "file": "0.png", "input": str(photos / "0.png"), "task": str(task), "task_sha256": told[0]["task_sha256"],
        "instruction": "remove the rain", "seed": 3, "index": 0, "settings": 0, "model": loaded.fingerprint,
    }  # fmt: skip
    assert told[0]["settings"]["guidance"] == 1.5 and told[0]["settings"]["decoding"] == "jacobi"
    # what is told is enough to draw an image again
    (again,) = loaded.generate(
        [Example(photos / "0.png", photos / "2.png", "remove the rain")], [told[5]["input"]], told[5]["instruction"],
        seed=told[5]["seed"], guidance=told[5]["settings"]["guidance"],
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(again), pixels(out / "sub/0.png"))
    sheet = PIL.Image.open(out / "contact.png")
    assert sheet.height > 6 * 128 and sheet.width > 2 * 128

    before = content(out)
    (out / "3.png").unlink()
    (out / "0.png").write_bytes(b"")
    (out / "1.png").write_bytes(before["1.png"][:-20])
    assert sample(capsys, *flags) == f"{out}: 3 image(s) drawn, 3 kept"
    assert {name: data for name, data in content(out).items() if name != "samples.jsonl"} == {
        name: data for name, data in before.items() if name != "samples.jsonl"
    }
    assert sorted(line["file"] for line in lines(out / "samples.jsonl")) == sorted(names)


def test_other_settings_need_another_folder(capsys, model, task, photos, tmp_path):
    out = tmp_path / "o"
    flags = ["sample", "--model", model, "--task", task, "--inputs", photos / "0.png", "--out", out]
    sample(capsys, *flags[1:], "--num-images", 2)
    first = content(out)
    assert sorted(first) == ["0-0.png", "0-1.png", "contact.png", "samples.jsonl"]
    for change, told in ((["--seed", 1, "--num-images", 2], "seed 0, not 1"), (["--top-k", 2, "--num-images", 2], "top_k 0, not 2")):
        assert f"{out}: its images were drawn with {told}; choose another --out, or give --overwrite" in fails(capsys, *flags, *change)
    assert content(out) == first
    sample(capsys, *flags[1:], "--overwrite")
    assert sorted(content(out)) == ["0.png", "contact.png", "samples.jsonl"]
    assert content(out)["0.png"] == first["0-0.png"]
    (out / "samples.jsonl").write_text("{}\n")
    assert "samples.jsonl, line 1: not a line of `xprompt sample`" in fails(capsys, *flags)
    (out / "samples.jsonl").unlink()
    (out / "samples.jsonl").mkdir()
    assert "samples.jsonl: Is a directory; correct the path or choose another" in fails(capsys, *flags)


def test_files_of_others_are_kept(capsys, loaded, model, task, photos, tmp_path):
    flags = ["sample", "--model", model, "--task", task, "--out", tmp_path / "o", "--inputs", photos / "0.png"]
    kept = lambda name: f"o: holds files that are not of `xprompt sample` ({name}); choose another --out"
    for name in ("contact.png", "errors.jsonl", "0.png"):
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / name).write_text("mine")
        with pytest.raises(UserError) as error:
            draw_folder(loaded, find_requests([photos / "0.png"], tmp_path / "o"), tmp_path / "o", task=Task.load(task), sampling={})
        assert kept(name) in str(error.value)
        assert content(tmp_path / "o") == {name: b"mine"}
        shutil.rmtree(tmp_path / "o")
    sample(capsys, *flags[1:])
    (tmp_path / "o/1.png").write_text("mine")
    before = content(tmp_path / "o")
    for more in ([], ["--overwrite"]):
        assert kept("1.png") in fails(capsys, *flags, photos / "1.png", *more)
    assert content(tmp_path / "o") == before


def test_images_without_lines_are_known_by_the_lock(capsys, model, task, photos, tmp_path):
    """A run that fails in the middle of a batch leaves them, as one that is killed does; two runs at once are refused."""
    flags = ["--model", model, "--task", task, "--inputs", photos]
    out = tmp_path / "o"
    out.mkdir()
    (out / "sub").touch()  # where a folder is to be
    with pytest.raises(SystemExit):
        main([str(flag) for flag in ["sample", *flags, "--out", out]])
    assert "sub/0.png: cannot write" in capsys.readouterr().err and (out / "0.png").exists()
    (out / "sub").unlink()
    assert json.loads((out / LOCK).read_text())[0] == "0.png" and not lines(out / "samples.jsonl")
    before = content(out)
    with (out / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "o: another run is drawing here; wait for its end" in fails(capsys, "sample", *flags, "--out", out)
    assert content(out) == before
    assert "1 image(s) drawn, 0 kept" in sample(capsys, *flags[:-1], photos / "1.png", "--out", out)
    assert sorted(content(out)) == ["1.png", "contact.png", "samples.jsonl"]
    assert "5 image(s) drawn, 1 kept" in sample(capsys, *flags, "--out", out)


def test_many_images_of_an_input_are_kept_in_parts(capsys, loaded, model, task, photos, tmp_path):
    flags = ["--model", model, "--task", task, "--inputs", photos / "0.png", "--out", tmp_path / "o", "--num-images", MAX_BATCH + 2]
    sample(capsys, *flags)
    want = loaded.generate(CompiledPrompt.load(task), [photos / "0.png"], num_images=MAX_BATCH + 2)
    for i, image in enumerate(want):
        np.testing.assert_array_equal(pixels(tmp_path / f"o/0-{i}.png"), np.asarray(image))
    assert [line["index"] for line in lines(tmp_path / "o/samples.jsonl")] == list(range(MAX_BATCH + 2))
    before = content(tmp_path / "o")
    (tmp_path / f"o/0-{MAX_BATCH + 1}.png").unlink()
    assert f"2 image(s) drawn, {MAX_BATCH} kept" in sample(capsys, *flags)
    assert content(tmp_path / "o") == before


def test_names_that_the_file_system_does_not_take_are_left_out_and_told(capsys, model, task, photos, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "x" * 251):  # with its suffix as long as a name may be
        shutil.copy(photos / "0.png", tmp_path / "in" / f"{name}.png")
    flags = ["--model", model, "--task", task, "--inputs", tmp_path / "in"]
    assert "2 image(s) drawn" in sample(capsys, *flags, "--out", tmp_path / "one")
    with pytest.raises(SystemExit):
        main([str(flag) for flag in ["sample", *flags, "--out", tmp_path / "two", "--num-images", 2]])
    assert "1 of 2 inputs could not be used" in capsys.readouterr().err
    (error,) = lines(tmp_path / "two/errors.jsonl")
    assert "x-0.png: File name too long; give its input a shorter name" in error["error"]
    assert sorted(content(tmp_path / "two")) == ["a-0.png", "a-1.png", "contact.png", "errors.jsonl", "samples.jsonl"]


def test_inputs_that_are_gone_are_not_on_the_sheet(capsys, model, task, photos, tmp_path):
    for name in "ab":
        shutil.copy(photos / "0.png", tmp_path / f"{name}.png")
    flags = ["--model", model, "--task", task, "--inputs", tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / "o"]
    sample(capsys, *flags)
    height = pixels(tmp_path / "o/contact.png").shape[0]
    (tmp_path / "a.png").unlink()
    assert "0 image(s) drawn, 2 kept" in sample(capsys, *flags)
    assert pixels(tmp_path / "o/contact.png").shape[0] < height - 100


def test_bad_inputs_are_left_out_and_told(capsys, caplog, model, task, photos, tmp_path):
    folder = tmp_path / "in"
    for name in ("a", "c"):
        save_png(pixels(photos / "0.png"), folder / f"{name}.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    save_png(np.zeros((1, 6_000_000, 3), np.uint8), folder / "d.png")
    flags = ["sample", "--model", model, "--task", task, "--inputs", folder, folder / "none.png", "--out", tmp_path / "o"]
    with pytest.raises(SystemExit) as exit:
        main([str(flag) for flag in flags])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and "2 image(s) drawn" in captured.out
    assert f"3 of 5 inputs could not be used; see {tmp_path / 'o' / 'errors.jsonl'}" in captured.err.splitlines()[-1]
    told = {line["input"].rsplit("/", 1)[1]: line["error"] for line in lines(tmp_path / "o/errors.jsonl")}
    assert sorted(told) == ["b.png", "d.png", "none.png"]
    assert "b.png: damaged" in told["b.png"] and "too narrow" in told["d.png"] and "no such file" in told["none.png"]
    assert sorted(n for n in content(tmp_path / "o") if n.endswith(".png")) == ["a.png", "c.png", "contact.png"]

    save_png(pixels(photos / "2.png"), folder / "b.png")
    (folder / "d.png").unlink()
    assert "1 image(s) drawn, 2 kept" in sample(capsys, *flags[1:6], folder, "--out", tmp_path / "o")
    assert not (tmp_path / "o/errors.jsonl").exists()


def test_a_batch_without_a_good_image_is_passed_over(model, task, photos, tmp_path):
    folder = tmp_path / "in"
    save_png(pixels(photos / "0.png"), folder / "z.png")
    for i in range(MAX_BATCH):
        (folder / f"a{i:02}.png").write_bytes((folder / "z.png").read_bytes()[:60])
    with pytest.raises(SystemExit):
        main(["sample", "--model", str(model), "--task", str(task), "--inputs", str(folder), "--out", str(tmp_path / "o")])
    assert (tmp_path / "o/z.png").exists() and len(lines(tmp_path / "o/errors.jsonl")) == MAX_BATCH


def test_manifest(capsys, loaded, model, task, photos, tmp_path):
    other = tmp_path / "rain.xprompt"
    loaded.compile([Example(photos / "1.png", photos / "0.png", "add rain")]).save(other)
    XPrompt(Chameleon(TINY, jax.random.key(5)), loaded.vqgan, loaded.tokenizer, compute=FP32).compile(
        [Example(photos / "1.png", photos / "0.png")]
    ).save(tmp_path / "alien.xprompt")
    (tmp_path / "cut.xprompt").write_bytes(other.read_bytes()[:300])
    save_png(pixels(photos / "0.png"), tmp_path / "x.png")
    rows = [
        {"input": "x.png"}, {"input": "x.png", "seed": 7, "task": "rain.xprompt", "name": "wet/x"}, {"input": "x.png", "seed": 7},
        {"input": "x.png", "instruction": "add rain"}, {"input": "x.png", "task": "alien.xprompt"},
        {"input": "x.png", "task": "cut.xprompt"}, {"input": "x.png"},
    ]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit):
        main([str(a) for a in ["sample", "--model", model, "--task", task, "--inputs", tmp_path / "m.jsonl", "--out", tmp_path / "o"]])
    assert "2 of 7 inputs could not be used" in capsys.readouterr().err
    alien, cut = (line["error"] for line in lines(tmp_path / "o/errors.jsonl"))
    assert "alien.xprompt: this compiled prompt belongs to model" in alien and "cut.xprompt: not a readable compiled prompt" in cut
    told = {line["file"]: line for line in lines(tmp_path / "o/samples.jsonl")}
    assert sorted(told) == ["wet/x.png", "x-2.png", "x-3.png", "x.png"]  # the last row asks for what the first one did
    assert (told["wet/x.png"]["seed"], told["wet/x.png"]["instruction"]) == (7, "add rain")
    for file, line in told.items():
        prompt = [Example(photos / "1.png", photos / "0.png", "add rain")] if file == "wet/x.png" else None
        prompt = prompt or [Example(photos / "0.png", photos / "2.png", "remove the rain")]
        (want,) = loaded.generate(prompt, [tmp_path / "x.png"], line["instruction"], seed=line["seed"])
        np.testing.assert_array_equal(np.asarray(want), pixels(tmp_path / "o" / file))


def test_instructions_that_do_not_fit_are_left_out_and_told(capsys, loaded, model, task, photos, tmp_path):
    """In the middle of a batch; the rest of it is drawn as if it had not been there."""
    long = "rain " * 20_000
    rows = [{"input": str(photos / f"{i}.png"), "name": f"{i}"} | ({"instruction": long} if i == 1 else {}) for i in range(3)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in ["sample", "--model", model, "--task", task, "--inputs", tmp_path / "m.jsonl", "--out", tmp_path / "o"]])
    assert exit.value.code == 2 and "1 of 3 inputs could not be used" in capsys.readouterr().err
    (error,) = lines(tmp_path / "o/errors.jsonl")
    assert error["input"] == str(photos / "1.png") and "tokens and 34 to come do not fit 16384" in error["error"]
    want = loaded.generate([Example(photos / "0.png", photos / "2.png", "remove the rain")], [photos / "0.png", photos / "2.png"])
    for name, image in zip("02", want, strict=True):
        np.testing.assert_array_equal(pixels(tmp_path / "o" / f"{name}.png"), np.asarray(image))

    with pytest.raises(SystemExit):
        main([str(a) for a in ["sample", "--model", model, "--texts", "add rain", long, "--out", tmp_path / "t"]])
    assert "1 of 2 inputs could not be used" in capsys.readouterr().err
    assert sorted(n for n in content(tmp_path / "t") if n.endswith(".png")) == ["0000.png", "contact.png"]
    assert lines(tmp_path / "t/errors.jsonl")[0]["input"] == long


@pytest.mark.parametrize("text, message", [
    ("[1]", "m.jsonl, line 1: not a JSON object"), ("{", "line 1: not a JSON object"), ("", "m.jsonl: empty"),
    ('{"seed": 1}', "line 1: no input"), ('{"input": "a.png", "sede": 1}', "line 1: unknown field 'sede'"),
    ('{"input": "a.png"}\n{"input": "a.png", "seed": "1"}', 'line 2: seed must be a whole number, not "1"'),
    ('{"input": "a.png", "seed": 4294967296}', "line 1: seed 4294967296 must be at least 0 and at most 4294967295"),
    ('{"input": "a\\u0000.png"}', 'line 1: input "a\\u0000.png" cannot be a path'),
    ('{"input": "a.png", "task": "\\ud800"}', 'line 1: task "\\ud800" cannot be a path'),
    ('{"input": "a.png", "name": "\\ud800"}', 'line 1: name "\\ud800" cannot be a path'),
    ('{"input": "a.png", "name": "../a"}', "line 1: name '../a' must be a name or path below --out"),
])  # fmt: skip
def test_bad_manifests_are_refused(capsys, tmp_path, text, message):
    (tmp_path / "m.jsonl").write_text(text)
    assert message in fails(capsys, "sample", "--model", "/none", "--task", "t", "--inputs", tmp_path / "m.jsonl", "--out", tmp_path / "o")


def test_paths_that_lead_nowhere_are_left_out_and_told(capsys, model, task, photos, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    good = str(photos / "0.png")
    rows = [{"input": "loop/a.png"}, {"input": good}, {"input": good, "task": "loop/t"}, {"input": good, "task": "t" * 300}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["sample", "--model", model, "--task", task, "--out", tmp_path / "o", "--inputs", tmp_path / "m.jsonl", tmp_path / "loop"]
    with pytest.raises(SystemExit):
        main([str(flag) for flag in flags])
    assert "4 of 5 inputs could not be used" in capsys.readouterr().err and (tmp_path / "o/0.png").exists()
    assert len(lines(tmp_path / "o/errors.jsonl")) == 4
    assert f"{tmp_path}/loop: cannot write: File exists" in fails(capsys, *flags[:5], "--inputs", good, "--out", tmp_path / "loop")


def test_mistakes_are_one_line(capsys, model, task, photos, tmp_path):
    flags = ["sample", "--model", model, "--inputs", photos / "0.png", "--out", tmp_path / "o"]
    for more, message in (
        ([], "--inputs needs --task FILE (make one with `xprompt compile`) or --example BEFORE AFTER"),
        (["--example", photos / "0.png"], "0.png has no output"),
        (["--task", task, "--example", photos / "0.png", photos / "1.png"], "--task or --example, not both"),
        (["--example", photos / "0.png", tmp_path / "none.png"], "none.png: no such file"),
        (["--task", tmp_path / "none.xprompt"], "none.xprompt: no such file; make it with `xprompt compile`"),
        (["--task", task, "--num-images", 0], "--num-images must be at least 1"),
        (["--task", task, "--seed", -1], "--seed -1 must be at least 0"),
        (["--task", task, "--temperature", "nan"], "temperature must be a finite number"),
        (["--task", task, "--top-p", 2], "top_p 2.0 must be"),
        (["--task", task, "--out", photos], f"--out {photos} is the folder of"),
        (["--task", task, "--inputs", photos, "--out", photos / "o"], f"lies inside --inputs {photos}"),
        (["--task", task, "--inputs", task.parent], "no image files"),
    ):
        assert message in fails(capsys, *flags, *more)
    assert "leave out --task" in fails(capsys, "sample", "--model", model, "--texts", "a", "--task", task, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists() and not (photos / "o").exists()


def test_example_and_texts(capsys, loaded, model, photos, tmp_path):
    pair = ["--example", photos / "0.png", photos / "2.png", "--instruction", "remove the rain"]
    sample(capsys, "--model", model, *pair, "--inputs", photos / "3.png", "--out", tmp_path / "o")
    want = loaded.generate([Example(photos / "0.png", photos / "2.png", "remove the rain")], [photos / "3.png"])
    np.testing.assert_array_equal(pixels(tmp_path / "o/3.png"), np.asarray(want[0]))
    sample(capsys, "--model", model, "--texts", "remove the rain", "add rain", "--seed", 2, "--out", tmp_path / "t")
    want = loaded.text_to_image(["remove the rain", "add rain"], seed=2)
    for file, image in zip(("0000.png", "0001.png"), want, strict=True):
        np.testing.assert_array_equal(pixels(tmp_path / "t" / file), np.asarray(image))


def test_killed_and_started_again_is_uninterrupted(capsys, monkeypatch, model, task, tmp_path):
    """In real processes; the uninterrupted run is this one's. An input that is a pipe holds the run up, in its third batch."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    folder, pipe = tmp_path / "in", tmp_path / "in/08.png"
    for i in range(12):
        save_png(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8), folder / f"{i:02d}.png")
    flags = ["--model", model, "--task", task, "--inputs", folder, "--num-images", 4]
    whole, out = tmp_path / "whole", tmp_path / "pieces" / "whole"  # the same name: the contact sheet tells it
    sample(capsys, *flags, "--out", whole)

    picture = pipe.read_bytes()
    pipe.unlink()
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "xprompt_jax", "sample", *map(str, flags), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (out / "samples.jsonl").exists() or (out / "samples.jsonl").read_text().count("\n") < 32:
        assert process.poll() is None, "it ended before it drew"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (out / LOCK).exists()
    with (out / "samples.jsonl").open("a") as file:
        file.write('{"file": "11-')  # as a kill in the middle of a line leaves it
    pipe.unlink()
    pipe.write_bytes(picture)
    result = run("sample", *flags, "--out", out)
    assert result.returncode == 0 and "16 image(s) drawn, 32 kept" in result.stdout, result.stderr
    assert content(out) == content(whole) and len(content(out)) == 50
