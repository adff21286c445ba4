"""Runs as files: killed and started again, drawn in parts and on several devices, computed again, compared."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from xprompt_jax import UserError
from xprompt_jax.cli import main
from xprompt_jax.data.images import save_png
from xprompt_jax.evaluate.pairs import AT_ONCE, paired_bootstrap
from xprompt_jax.evaluate.results import WHOLE, Shard, file_fingerprint, read_json, start


def arguments(model, data, out, *more, suite="pairs"):
    examples = ("--examples", 2) if suite == "pairs" else ()
    return [str(a) for a in ("eval", suite, "--model", model, "--data", data, "--out", out, *examples, *more)]


def environment():
    """Of a process that runs the command."""
    cache, root = jax.config.jax_compilation_cache_dir, Path(__file__).parents[2]
    keep = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return {**os.environ, **keep, "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": str(root)}


def fails(capsys, *words):
    """The one line that a mistake prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(w) for w in words])
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def images(out):
    return {str(p.relative_to(out)): (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("images/*/*.png")}


@pytest.fixture(scope="module")
def runs(tiny_folders, pair_folder, pairs_run):
    """The same queries by two models."""
    main(arguments(tiny_folders[1], pair_folder, pairs_run.parent / "b"))
    return pairs_run.parent


def test_killed_run_goes_on_from_its_images(tiny_folders, pair_folder, runs, tmp_path):
    out = tmp_path / "o"
    process = subprocess.Popen(
        [sys.executable, "-m", "xprompt_jax", *arguments(tiny_folders[0], pair_folder, out)], env=environment(),
        stdout=subprocess.DEVNULL, stderr=(tmp_path / "stderr").open("w"),
    )  # fmt: skip
    end = time.monotonic() + 300
    while len(list(out.glob("images/*/*.png"))) < 5 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "stderr").read_text()
    left, whole = images(out), images(runs / "a")
    assert 5 <= len(left) < len(whole) and not (out / "result.json").exists()
    main(arguments(tiny_folders[0], pair_folder, out))
    after = images(out)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in whole.items()}
    needs = lambda name: [name.replace("drawn", "wrong"), *(f"{name.rpartition('/')[0]}/{arm}.png" for arm in ("none", "ceiling"))]
    finished = [name for name in left if "drawn" in name and set(needs(name)) <= set(left)]
    assert finished and all(after[n] == left[n] for name in finished for n in (name, *needs(name))), "what was drawn is not drawn again"
    assert (out / "result.json").read_text() == (runs / "a" / "result.json").read_text()
    assert AT_ONCE < 2 * 12, "there must be a second batch to be killed before"


def test_other_settings_are_refused_or_drawn_anew(capsys, tiny_folders, pair_folder, runs, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(runs / "a", out)
    again = arguments(tiny_folders[0], pair_folder, out)
    assert "drawn with seed 0, not 1; choose another --out, or give --overwrite" in fails(capsys, *again, "--seed", 1)
    assert "drawn with model" in fails(capsys, *arguments(tiny_folders[1], pair_folder, out))
    assert "drawn with sampling" in fails(capsys, *again, "--top-k", 3)
    before = images(out)
    main([*again, "--seed", "1", "--overwrite"])
    assert images(out).keys() == before.keys() and images(out) != before
    (out / "run.json").unlink()
    foreign = sorted(out.rglob("*.png"))
    for flags in ([], ["--overwrite"]):  # what is not ours is never removed
        assert "holds images that are not of `xprompt eval`" in fails(capsys, *again, *flags)
    assert sorted(out.rglob("*.png")) == foreign
    (out / "run.json").write_text("{}")
    assert "run.json: not of this version" in fails(capsys, *again)


def test_overwriting_forgets_the_scores_first(capsys, runs, tmp_path):
    """A run that is killed then must leave nothing that could be taken for its result."""
    out = tmp_path / "o"
    shutil.copytree(runs / "a", out)
    settings = {key: value for key, value in read_json(out / "run.json").items() if key not in ("format", "where")}
    start(out, {**settings, "model": "other"}, images=lambda: out.glob("images/*/*.png"), overwrite=True)
    assert [p.name for p in out.rglob("*") if p.is_file()] == ["run.json"]
    assert "result.json: cannot read" in fails(capsys, "eval", "compare", runs / "b", out, "--out", tmp_path / "c")
    shutil.copy(runs / "a" / "result.json", out)  # as earlier versions left it
    assert "result.json: not of the run that" in fails(capsys, "eval", "compare", runs / "b", out, "--out", tmp_path / "c")
    start(out, {**settings, "seed": 1}, images=lambda: out.glob("images/*/*.png"), overwrite=True)
    shutil.copy(runs / "a" / "result.json", out)
    assert "result.json: not of the run that" in fails(capsys, "eval", "compare", runs / "b", out, "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    (site := tmp_path / "site").mkdir()
    (site / "index.html").touch()
    start(site, settings, images=lambda: [], overwrite=True)
    assert (site / "index.html").exists(), "what is not of a run is left alone"


def test_settings_count_from_the_first_image_on(tmp_path):
    begin = lambda seed, **more: start(tmp_path, {"seed": seed}, images=lambda: tmp_path.glob("*.png"), **more)
    begin(1)
    (tmp_path / "result.json").touch()
    begin(2)  # nothing was drawn of the first: a mistake in its flags, say
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 2 and not (tmp_path / "result.json").exists()
    with pytest.raises(UserError, match="drawn with seed 2, not 1"):
        begin(1, shard=Shard(0, 2))  # another part may be at its first image
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match="drawn with seed 2, not 1"):
        begin(1)
    (tmp_path / "run.json").write_text('{"of": "another program"}')
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="not of this version"):
        begin(1)


@pytest.mark.parametrize("suite", ["pairs", "world", "geneval", "table4"])
def test_numbers_out_of_range_are_refused_before_anything_is_written(capsys, suite, tmp_path):
    (tmp_path / "d.jsonl").touch()
    flags = ["--xprompt", "m"] if suite == "table4" else ["--model", "m", "--data", tmp_path / "d.jsonl"]
    refused = lambda *more: fails(capsys, "eval", suite, *flags, "--out", tmp_path / "o", *more)
    for seed in (-1, 2**32):
        assert f"--seed {seed} must be at least 0 and at most 4294967295" in refused("--seed", seed)
    for fraction in ("nan", "-1", "2", "inf") if suite in ("pairs", "world") else ():
        assert f"--eval-fraction {fraction} must be from 0 to 1" in refused("--eval-fraction", fraction)
    assert not (tmp_path / "o").exists()


def test_names_and_words_that_are_no_utf8(capsys, tiny_folders, pair_folder, tmp_path):
    """Half an emoji of a JSON escape, and a file's name in Latin-1: drawn, told, computed again and compared."""
    rows = []
    for i, name in enumerate(("caf\udce9.png", "b.png")):
        shutil.copy(pair_folder / "input" / f"{i:02d}.png", tmp_path / name)
        shutil.copy(pair_folder / "target" / f"{i:02d}.png", tmp_path / f"out-{name}")
        rows.append({"input": name, "output": f"out-{name}", "instruction": "rain \ud83d", "task": "r\ud83d", "split": "eval"})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(arguments(tiny_folders[0], tmp_path / "m.jsonl", tmp_path / "o"))
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert {result["queries"][0][key] for key in ("input", "example")} == {str(tmp_path / row["input"]) for row in rows}
    assert "r?" in (tmp_path / "o" / "index.html").read_text() and "caf?.png" in (tmp_path / "o" / "scores.csv").read_text()
    main(["eval", "recompute", str(tmp_path / "o")])
    main(["eval", "compare", str(tmp_path / "o"), str(tmp_path / "o"), "--out", str(tmp_path / "c")])
    assert "follow from its files" in capsys.readouterr().out
    for name in ("x\0.png", "\ud83d.png"):
        with pytest.raises(UserError, match="cannot read: .*; correct the path"):
            file_fingerprint(tmp_path / name)


def test_changed_data_are_refused(capsys, tiny_folders, pair_folder, runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "o")
    shutil.copytree(pair_folder, tmp_path / "d")
    main(arguments(tiny_folders[0], tmp_path / "d", tmp_path / "o"))  # other place, same files
    save_png(np.zeros((20, 26, 3), np.uint8), tmp_path / "d" / "target" / "03.png")
    assert "drawn with pairs" in fails(capsys, *arguments(tiny_folders[0], tmp_path / "d", tmp_path / "o"))
    message = fails(capsys, "eval", "recompute", tmp_path / "o", "--data", tmp_path / "d")
    assert "its pairs are not those that" in message and "say with --data" in message


def test_recompute_confirms_and_finds_what_was_changed(capsys, runs, tmp_path):
    main(["eval", "recompute", str(runs / "a")])
    result = json.loads((runs / "a" / "result.json").read_text())
    # 5 metrics: 5 arms of mean, spread and 2 examples, 2 intervals of 3; 24 episodes of 5 arms.
    assert f"all {5 * (5 * 4 + 2 * 3) + 24 * 5 * 5} numbers" in capsys.readouterr().out

    out = tmp_path / "o"
    shutil.copytree(runs / "a", out)
    result["queries"][5]["scores"]["psnr_rgb"]["drawn"] += 1e-6
    (out / "result.json").write_text(json.dumps(result))
    assert "queries[5].psnr_rgb.drawn is" in fails(capsys, "eval", "recompute", out)
    shutil.copy(runs / "a" / "result.json", out)
    picture = out / "images" / "00003" / "none.png"
    pixels = np.asarray(PIL.Image.open(picture)).copy()
    pixels[0, 0] ^= 255
    save_png(pixels, picture)
    assert "none" in (message := fails(capsys, "eval", "recompute", out)) and "were changed" in message
    save_png(pixels[:8, :8], picture)
    assert "00003/none.png: not 16 x 16 pixels" in fails(capsys, "eval", "recompute", out)
    shutil.copy(runs / "a" / "images" / "00003" / "none.png", picture)
    for name, place in (("scores.csv", r"(?m)\d(?=$)"), ("index.html", r"\d(?=</td>)")):
        text = (out / name).read_text()
        (out / name).write_text(re.sub(place, lambda m: str((int(m[0]) + 1) % 10), text, count=1))
        assert f"{name}: missing, or not what result.json says" in fails(capsys, "eval", "recompute", out)
        (out / name).write_text(text)
    picture.unlink()
    assert "none.png: no such file" in fails(capsys, "eval", "recompute", out)
    assert "result.json: cannot read" in fails(capsys, "eval", "recompute", tmp_path)
    assert "give one folder" in fails(capsys, "eval", "recompute")


def test_compare_puts_two_models_beside_each_other(capsys, runs, tmp_path):
    main(["eval", "compare", str(runs / "a"), str(runs / "b"), "--out", str(tmp_path / "c")])
    printed = capsys.readouterr().out
    first, second = (json.loads((runs / name / "result.json").read_text()) for name in "ab")
    with (tmp_path / "c" / "compare.csv").open() as f:
        rows = {(r["metric"], r["arm"]): r for r in csv.DictReader(f)}
    assert len(rows) == 5 * 5
    row = rows["psnr_rgb", "drawn"]
    per_query = []
    for query in {q["input"] for q in first["queries"]}:
        mean = lambda result: np.mean([q["scores"]["psnr_rgb"]["drawn"] for q in result["queries"] if q["input"] == query])  # noqa: B023
        per_query.append(mean(second) - mean(first))
    assert float(row["b_minus_a"]) == pytest.approx(np.mean(per_query)) and int(row["queries"]) == 12
    assert float(row["a"]) == first["scores"]["psnr_rgb"]["drawn"]["mean"]
    assert float(row["b"]) - float(row["a"]) == pytest.approx(float(row["b_minus_a"]))
    _, low, high = paired_bootstrap(sorted(per_query))
    assert float(row["low"]) == pytest.approx(low, abs=0.3) and float(row["high"]) == pytest.approx(high, abs=0.3)
    assert float(row["low"]) < float(row["b_minus_a"]) < float(row["high"])
    page = (runs / "a" / "index.html").read_bytes()
    assert "--out" in (line := fails(capsys, "eval", "compare", runs / "a", runs / "b", "--out", runs / "a"))
    assert "holds the run.json of a run" in line and (runs / "a" / "index.html").read_bytes() == page
    # The tokenizer and the inputs are the same: no difference at all.
    assert all(float(rows["psnr_rgb", arm][key]) == 0 for arm in ("copied", "ceiling") for key in ("b_minus_a", "low", "high"))
    assert f"psnr_rgb drawn: {float(row['a']):.3f} and {float(row['b']):.3f}, difference {float(row['b_minus_a']):+.3f}" in printed
    assert f"{float(row['a']):.3f}" in (tmp_path / "c" / "index.html").read_text()


def test_compare_takes_the_queries_that_both_have(capsys, tiny_folders, pair_folder, runs, tmp_path):
    few = tmp_path / "few"
    for side in ("input", "target"):
        for i in range(5):
            (few / side).mkdir(parents=True, exist_ok=True)
            shutil.copy(pair_folder / side / f"{i:02d}.png", few / side)
    main(arguments(tiny_folders[1], few, tmp_path / "b"))
    main(["eval", "--compare", str(runs / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")])
    marks = [{q["sha256"] for q in json.loads((p / "result.json").read_text())["queries"]} for p in (runs / "a", tmp_path / "b")]
    assert f"over {len(marks[0] & marks[1])} queries" in capsys.readouterr().out and 0 < len(marks[0] & marks[1]) < 4
    assert "do not have all queries in common" in (tmp_path / "c" / "index.html").read_text()


def test_what_cannot_be_compared_is_one_line(capsys, runs, tmp_path):
    def altered(change):
        result = json.loads((runs / "a" / "result.json").read_text())
        change(result)
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / "result.json").write_text(json.dumps(result))
        return fails(capsys, "eval", "compare", runs / "a", tmp_path / "x", "--out", tmp_path / "c")

    assert "is of suite pairs" in altered(lambda r: r.update(suite="derain"))
    assert "different protocols" in altered(lambda r: r["protocol"]["metrics"]["psnr_rgb"].update(protocol="another"))
    assert "different sizes (16 and 16 pixels)" in altered(lambda r: r["protocol"].update(frame="another"))
    assert "have no query in common" in altered(lambda r: [q.update(sha256="0") for q in r["queries"]])
    assert "result.json: not of this version" in altered(lambda r: r.update(format="xprompt-eval-1"))
    assert "give two folders" in fails(capsys, "eval", "compare", runs / "a", "--out", tmp_path / "c") and not (tmp_path / "c").exists()


def files(out):
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    return {name: (out / name).read_bytes() for name in names if name not in ("run.json", "index.html")}


def test_two_processes_draw_one_run(tiny_folders, pair_folder, pairs_run, tmp_path):
    out = tmp_path / "o"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "xprompt_jax", *arguments(tiny_folders[0], pair_folder, out, "--shard", f"{i}/2")],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    # Whichever ended last found all images and scored them; at least one says so, and perhaps the other that it waits.
    assert any("open " in said for said, _ in told) and all("open " in said or "part " in said for said, _ in told)
    assert all(re.search(r"\d+/\d+ \[\d\d:\d\d<\d\d:\d\d, .*image", errors) for _, errors in told), "no time left was told"
    assert files(out) == files(pairs_run)
    assert json.loads((out / "run.json").read_text()) == json.loads((pairs_run / "run.json").read_text())


def test_one_part_waits_for_the_others(capsys, tiny_folders, pair_folder, pairs_run, tmp_path):
    one = arguments(tiny_folders[0], pair_folder, tmp_path / "o")
    main([*one, "--shard", "1/3"])
    assert "part 1 of 3 is drawn; the scores come with the last part" in capsys.readouterr().out
    drawn = {int(p.name) for p in (tmp_path / "o" / "images").iterdir()}
    assert drawn == {1, 4, 7, 10} and not (tmp_path / "o" / "result.json").exists()
    main(one)  # the rest, and the scores
    assert files(tmp_path / "o") == files(pairs_run)
    with pytest.raises(SystemExit):
        main([*one, "--shard", "0/3", "--overwrite"])
    assert "--overwrite with --shard would remove" in capsys.readouterr().err


def test_geneval_and_reconstruction_in_parts(capsys, tiny_folders, pair_folder, tmp_path):
    rows = [{"tag": "single_object", "include": [{"class": "rain", "count": 1}], "prompt": p} for p in ("add rain", "the rain", "rain")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw = arguments(tiny_folders[0], tmp_path / "m.jsonl", tmp_path / "g", "--num-images", "1", suite="geneval")
    main([*draw, "--shard", "1/2"])
    assert "part 1 of 2 is drawn" in capsys.readouterr().out
    assert [p.parts[-3] for p in (tmp_path / "g").glob("*/samples/*.png")] == ["00001"]
    main([*draw, "--shard", "0/2"])
    assert "all 3 prompts have their 1 images" in capsys.readouterr().out

    take = arguments(tiny_folders[0], pair_folder / "target", tmp_path / "r", "--sides", "16", suite="reconstruction")
    main([*take, "--shard", "0/2"])
    assert "part 0 of 2 is drawn" in capsys.readouterr().out and len(list((tmp_path / "r").glob("images/*/16.png"))) == 7
    main([*take, "--shard", "1/2"])
    assert len(json.loads((tmp_path / "r" / "result.json").read_text())["queries"]) == 14


def test_batches_split_over_devices_draw_the_same(capsys, tiny_folders, pair_folder, pairs_run, tmp_path):
    main(arguments(tiny_folders[0], pair_folder, tmp_path / "o", "--devices", "4"))
    assert files(tmp_path / "o") == files(pairs_run)
    with pytest.raises(SystemExit):
        main(arguments(tiny_folders[0], pair_folder, tmp_path / "p", "--devices", "9"))
    assert "--devices 9: this process has 8" in capsys.readouterr().err


def test_int8_is_another_run(capsys, tiny_folders, pair_folder, pairs_run, tmp_path):
    int8 = ["--weights", "int8", "--cache", "int8", "--queries", "1"]
    main(arguments(tiny_folders[0], pair_folder, tmp_path / "o", *int8))
    run = json.loads((tmp_path / "o" / "run.json").read_text())
    assert run["precision"]["weights"] == run["precision"]["cache"] == "int8"
    assert run["model"] == json.loads((pairs_run / "run.json").read_text())["model"]  # one model, in other precision
    with pytest.raises(SystemExit):
        main(arguments(tiny_folders[0], pair_folder, tmp_path / "o", *int8[4:]))
    assert "drawn with precision" in capsys.readouterr().err


def test_parts_are_parsed():
    assert Shard.parse("") is WHOLE and Shard.parse("3/4") == Shard(3, 4)
    assert [n for n in range(9) if Shard(1, 3).has(n)] == [1, 4, 7]
    for text in ("4/4", "1", "a/b", "-1/2", "0/0", "1/" + "9" * 5000):
        with pytest.raises(UserError, match="write part/parts"):
            Shard.parse(text)
