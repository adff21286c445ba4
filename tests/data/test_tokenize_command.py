"""`xprompt tokenize`: datasets to stores, parts, mistakes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.jobs import files_of
from tests.data.made import MADE
from tests.data.making import N
from xprompt_jax.commands.data import Tokenize
from xprompt_jax.data.sources import manifest
from xprompt_jax.data.store import Store


def run(*arguments):
    from xprompt_jax.cli import main

    main([str(a) for a in arguments])


def test_the_command_takes_datasets(tiny_model, tmp_path, capsys, caplog):
    run("tokenize", "--list")
    assert "gopro  GoPro" in capsys.readouterr().out
    MADE["gopro", "MPRNet's"](tmp_path / "copy")
    MADE["rain13k", "MPRNet's"](tmp_path / "rain")
    base = ("tokenize", "--model", tiny_model, "--dataset", "gopro", "--root", tmp_path / "copy")
    with pytest.raises(SystemExit) as stopped:
        run(*base, "--out", tmp_path / "g")
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and "accept it with --allow-partial" in error[-1] and not (tmp_path / "g").exists()
    run(*base, "--out", tmp_path / "g", "--allow-partial", "--mirror")
    assert "partial or another release, accepted" in caplog.text and f"{tmp_path / 'g'}: {3 * N} pairs" in capsys.readouterr().out
    run("tokenize", "--model", tiny_model, "--dataset", "rain13k", "--root", tmp_path / "rain", "--split", "Rain100L", "--allow-partial",
        "--out", tmp_path / "r")  # fmt: skip
    run("tokenize", "--out", tmp_path / "all", "--stores", tmp_path / "g", tmp_path / "r")
    whole = Store.open(tmp_path / "all")
    assert {p.task for p in whole.pairs} == {"deblur", "derain"} and {p.split for p in whole.pairs if p.task == "derain"} == {"eval"}
    assert {p.dataset for p in whole.pairs} == {"gopro", "rain13k"}
    for i in (0, 1):
        run(*base, "--out", tmp_path / "part", "--allow-partial", "--mirror", "--shard", f"{i}/2")
    run("tokenize", "--out", tmp_path / "parts", "--stores", *sorted(tmp_path.glob("part-*-of-00002")))
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "g")
    run("tokenize", "--dataset", "gopro", "--root", tmp_path / "copy", "--allow-partial", "--export", tmp_path / "flat")
    assert len(list(manifest(tmp_path / "flat" / "pairs.jsonl"))) == 2 * N


def test_a_stopped_command_goes_on_with_its_own_data_alone(tmp_path):
    manifest, rain = tmp_path / "m.jsonl", Path("rain")
    manifest.write_text("{}")
    command = Tokenize(model="m", out=Path("o"), manifest=manifest)
    job = command._job()
    assert job["manifest"] == str(manifest) and job == dataclasses.replace(command, max_corrupt=0.5, out=Path("p"))._job()
    assert job != dataclasses.replace(command, eval_fraction=0.1)._job()
    manifest.write_text("{} ")
    assert job != command._job()
    folders = Tokenize(inputs=rain, outputs=rain, rename=("a", "b"))
    assert folders._job() != dataclasses.replace(folders, rename=("a", "c"))._job()


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "gopro", "--out", "o"], "--dataset and --root belong together"),
    (["--dataset", "gopro", "--root", "r", "--manifest", "m"], "give one source"),
    (["--world", "1", "--mirror", "--out", "o", "--model", "m"], "--mirror works on --dataset"),
    (["--manifest", "m", "--split", "test", "--out", "o", "--model", "m"], "--split works on --dataset, not on --manifest"),
    (["--manifest", "m", "--reverse-instruction", "x", "--out", "o", "--model", "m"], "--reverse-instruction works on --inputs"),
    (["--world", "1", "--seed", "-1", "--out", "o", "--model", "m"], "--seed must not be negative"),
    (["--world", "1", "--shard", "0/2", "--out", "o", "--model", "m"], "--shard works on --dataset or --manifest or --inputs, not on"),
    (["--manifest", "m", "--shard", "2/2", "--out", "o", "--model", "m"], "--shard 2/2: give i/n with i from 0 to n-1"),
    (["--manifest", "m", "--max-corrupt", "-1", "--out", "o", "--model", "m"], "--max-corrupt must not be negative"),
    (["--stores", "a", "b", "--crops", "2", "--out", "o"], "--crops works on"),
    (["--dataset", "gopro", "--root", "r", "--export", "e", "--out", "o"], "--export writes a manifest, --out a store"),
    (["--world", "1", "--export", "o"], "--export writes out a --dataset"),
    (["--world", "1", "--model", "m"], "--out is missing"),
    (["--world", "1", "--out", "o"], "--model is missing"),
    (["--dataset", "gopro", "--root", "/none", "--export", "o"], "--root /none: no such folder"),
    (["--dataset", "nyuv2_depth", "--root", "r", "--export", "o", "--palette", "hsv"], "depth palette 'hsv' is unknown"),
    (["--dataset", "gopro", "--root", "r", "--export", "o", "--palette", "grey"], "--palette works on nyuv2_depth, not on gopro; leave it"),
    (["--dataset", "ade20k", "--root", "r", "--export", "o", "--min-score", "5"], "--min-score works on laion_aesthetics, not on ade20k"),
    (["--manifest", "m", "--eval-fraction", "nan", "--out", "o", "--model", "m"], "--eval-fraction nan must be from 0 to 1"),
    (["--manifest", "m", "--max-corrupt", "nan", "--out", "o", "--model", "m"], "--max-corrupt must not be negative"),
    (["--inputs", "a", "--outputs", "b", "--rename", "(", "x", "--out", "o", "--model", "m"], "--rename ( x: no regular expression"),
    (["--inputs", "a", "--outputs", "b", "--rename", "x", r"\2", "--out", "o", "--model", "m"], "its replacement (invalid group reference"),
    (["--manifest", "m", "--out", ".", "--model", "m"], ".: cannot be replaced by what is made; give a name in it"),
    (["--stores", "/none", "--out", "o"], "/none: not a complete token store"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("tokenize", *arguments)
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and message in error[-1]


def test_help_is_quick_and_whole():
    shown = subprocess.run([sys.executable, "-m", "xprompt_jax", "tokenize", "--help"], capture_output=True, text=True)
    assert "--allow-partial" in shown.stdout, shown.stderr
