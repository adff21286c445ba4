"""The command line as a person meets it: real processes, real files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import PIL.Image
import pytest

from tests.helpers import FP32, TINY
from xprompt_jax import CompiledPrompt, UserError
from xprompt_jax.cli import COMMANDS, main
from xprompt_jax.commands.data import Annotate
from xprompt_jax.commands.evaluate import PAIR_SUITES
from xprompt_jax.commands.train import load_config
from xprompt_jax.config import Config, from_json, to_json
from xprompt_jax.data.images import save_png
from xprompt_jax.data.questions import QUESTIONS
from xprompt_jax.data.retrieval import RetrievalIndex
from xprompt_jax.data.sources import manifest as manifest_records
from xprompt_jax.evaluate.suites import SUITES

ROOT = Path(__file__).parent.parent


def run(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "xprompt_jax", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300)


def fails(capsys, *arguments):
    """The one line that a mistake prints, with exit code 2."""
    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("xprompt: ") and "Traceback" not in line
    return line


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        for side in ("in", "out"):
            save_png(np.random.default_rng([i, side == "in"]).integers(0, 256, (20, 24, 3), dtype=np.uint8), folder / side / f"{i}.png")
    return folder


def test_help_is_quick_and_teaches():
    """The real command's, and in one process that of every command: none of them waits for JAX."""
    result = run("--help")
    assert result.returncode == 0 and all(name in result.stdout for name in COMMANDS)
    code = (
        "import sys\n"
        "from xprompt_jax.cli import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try:\n"
        "        main([name, '--help'])\n"
        "    except SystemExit as end:\n"
        "        print(f'<{name} {end.code} {\"jax\" in sys.modules}>')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    rest = result.stdout.replace("\n", " ")
    for name in COMMANDS:
        text, end, rest = rest.partition(f"<{name} 0 False>")
        assert end and "xprompt " + name in text, result.stderr + result.stdout


@pytest.mark.parametrize("arguments, message", [
    (["fly"], "unknown: fly; commands are demo"),
    (["trian", "--workdir", "w"], "unknown: trian; did you mean train?"),
    (["eval", "magicbrush-multi", "--model", "m"], "unknown: magicbrush-multi; choose from pairs, "),
    (["inspect", "--config", "configs/debug_cpu.py", "--data.stor", "s"], "did you mean --data.store?"),
    (["inspect", "--workdir", "nowhere"], "--workdir nowhere: no run there yet"),
    (["sample", "--mdel", "x"], "--mdel"),
    (["sample"], "missing --model STR, --out PATH"),
    (["sample", "--model", "m", "--out", "o", "--seed", "z"], "--seed"),
    (["sample", "--model", "m", "--out", "o"], "--inputs with --task, or --texts"),
    (["sample", "--model", "m", "--out", "o", "--inputs", "a.png"], "needs --task"),
    (["sample", "--model", "/none", "--out", "o", "--texts", "a"], "/none: no such model folder"),
    (["compile", "--model", "/none", "--inputs", "a", "b", "--outputs", "c", "--out", "o"], "2 images and --outputs 1"),
    (["tokenize", "--model", "m", "--out", "o"], "give one source"),
    (["tokenize", "--model", "m", "--out", "o", "--inputs", "a"], "belong together"),
    (["compile", "--model", "/none", "--inputs", "a", "--outputs", "b", "--index", "i", "--out", "o"], "or --index FILE"),
    (["compile", "--model", "/none", "--index", "i", "--out", "o"], "--index needs --instruction"),
    (["compile", "--model", "/none", "--index", "i", "--instruction", "a", "--out", "o"], "i: no such file; make it with `xprompt index`"),
    (["tokenize", "--model", "/none", "--out", "o", "--world", "1"], "/none: no such model folder"),
    (["annotate", "--manifest", "m.jsonl", "--out", "o"], "give --kind to ask, or --merge-into"),
    (["annotate", "--manifest", "m.jsonl", "--out", "o", "--merge-into", "n", "--dry-run"], "--kind is missing"),
    (["annotate", "--manifest", "m", "--out", "o", "--merge-into", "n", "--dry-run", "--kind", "reverse"], "--merge-into needs answers"),
    (["annotate", "--manifest", "m.jsonl", "--out", "o", "--kind", "reverse", "--dry-run"], "m.jsonl: cannot read"),
    (["annotate", "--manifest", "m.jsonl", "--out", "o", "--kind", "verse"], "--kind"),
    (["index", "--data", "m.jsonl", "--out", "o"], "m.jsonl: cannot read"),
    (["index", "--data", "m.jsonl", "--out", "o", "--neighbours", "0"], "--neighbours must be at least 1"),
    (["eval", "fly", "--model", "m", "--data", "d", "--out", "o"], "fly"),
    (["eval", "pairs", "--model", "m", "--data", "/none", "--out", "o"], "--data /none: no such file or folder; suite pairs takes"),
    (["eval", "pairs", "--model", "m", "--data", "d", "--out", "o", "--examples", "0"], "--examples must be at least 1"),
    (["eval", "derain", "--model", "m", "--data", "d", "--out", "o", "--palette", "turbo"], "suite derain has no colours to choose"),
    (["convert", "--source", "/none", "--out", "o"], "/none: no such model folder"),
    (["train"], "missing --workdir PATH"),
    (["train", "--workdir", "/none/run"], "start one with --config"),
    (["train", "--config", "none.py", "--workdir", "w"], "none.py: cannot read"),
    (["train", "--config", "configs/debug_cpu.py", "--workdir", "w", "--optim.learnin-rate", "1"], "did you mean --optim.learning-rate?"),
    (["train", "--config=configs/debug_cpu.py", "--workdir", "w", "--train.steps", "many"], "--train.steps"),
    (["train", "--config", "configs/debug_cpu.py", "--workdir", "gs://bucket/run"], "mount the bucket"),
    (["train", "--config", "configs/debug_cpu.py", "--workdir", "w", "--train.profile", "3", "2"], "train.profile is (3, 2)"),
    (["convert", "--source", "m", "--out", "o", "--to", "meta", "--shards", "-1"], "give 1 or more, with --to meta"),
    (["convert", "--source", "m", "--out", "o", "--shards", "2"], "give 1 or more, with --to meta"),
    (["convert", "--source", "m", "--out", "o", "--seed", "-1"], "--seed must not be negative"),
    (["convert", "--source", "m", "--out", "o", "--dtype", "int8"], "'float16').; see `xprompt convert --help`"),
    (["compile", "--model", "m", "--index", "i", "--instruction", "x", "--examples", "0", "--out", "o"], "--examples must be at least 1"),
    (["demo", "--devices", "0"], "--devices"),
])  # fmt: skip
def test_mistakes_are_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    assert message in fails(capsys, *arguments)


def test_names_that_are_too_long_and_texts_of_another_coding(capsys, model, pictures, tmp_path):
    pair = ("--inputs", pictures, "--outputs", pictures)
    assert "File name too long; choose a shorter one" in fails(capsys, "tokenize", "--model", model, *pair, "--out", tmp_path / ("x" * 300))
    (tmp_path / "config.json").write_bytes('{"model": "é"}'.encode("latin-1"))
    assert "not text in UTF-8" in fails(capsys, "train", "--config", tmp_path / "config.json", "--workdir", tmp_path)


def test_a_reader_who_has_seen_enough_is_no_error():
    """As `head` is."""
    command = [sys.executable, "-m", "xprompt_jax", "tokenize", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


def test_bad_files_are_named(capsys, model, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    assert "bad.png: empty" in fails(capsys, "describe", "--model", model, "--input", bad, "--output", bad)
    assert "bad.png: not a readable compiled prompt" in fails(
        capsys, "sample", "--model", model, "--task", bad, "--inputs", _picture(tmp_path), "--out", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()


def _picture(folder):
    path = folder / "p.png"
    PIL.Image.new("RGB", (20, 20), "red").save(path)
    return path


@pytest.mark.parametrize("text, message", [
    ("config = 3", "defines no `config = Config"),
    ("from xprompt_jax.config import *\nconfig = Config(modle=1)", "modle"),
    ("config = (", "SyntaxError"),
])  # fmt: skip
def test_bad_config_files_are_named(tmp_path, text, message):
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(path)
    assert "c.py" in str(error.value)


@pytest.mark.parametrize("change, message", [
    ({"modle": {}}, "unknown key 'modle'"),
    ({"train": {"steps": "x"}}, "train.steps"),
    ({"data": {"buckets": [{"rows": 1}]}}, "data.buckets.0"),
])  # fmt: skip
def test_bad_json_configs_are_named(change, message):
    with pytest.raises(UserError, match=message):
        from_json(Config, json.dumps(change), source="c.json")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_loads_and_round_trips(path):
    config = load_config(path)
    assert from_json(Config, to_json(config)) == config


def write_manifest(pictures, path, rows):
    """Pairs of `pictures`, with the fields given."""
    lines = [{"input": f"{pictures}/in/{i}.png", "output": f"{pictures}/out/{i}.png", **row} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_annotate_asks_through_batch_files_and_merges(capsys, pictures, tmp_path):
    manifest = write_manifest(pictures, tmp_path / "m.jsonl", [{"instruction": f"paint it {c}"} for c in ("red", "blue")])
    asked = ["annotate", "--manifest", str(manifest), "--out", str(tmp_path / "a.jsonl")]
    main([*asked, "--kind", "reverse", "--dry-run"])
    assert "2 to ask, 0 answered before; nothing was sent" in capsys.readouterr().out
    assert "--endpoint must be an address" in fails(capsys, *asked, "--kind", "reverse", "--model", "m")
    main([*asked, "--kind", "reverse", "--model", "m", "--batch-out", str(tmp_path / "b.jsonl")])
    (batch,) = (line.split(":")[0] for line in capsys.readouterr().out.splitlines())
    replies = []
    for line in Path(batch).read_text().splitlines():
        answer = json.dumps({"reverse_instruction": "bring the old colours back"})
        body = {"model": "m", "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}]}
        replies.append({"custom_id": json.loads(line)["custom_id"], "response": {"status_code": 200, "body": body}, "error": None})
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in replies))
    main([*asked, "--kind", "reverse", "--batch-in", str(tmp_path / "r.jsonl"), "--merge-into", str(tmp_path / "n.jsonl")])
    out = capsys.readouterr().out
    assert "2 answers" in out and "n.jsonl: 2 rows, 2 with new words, 0 dropped" in out
    assert [r.reverse_instruction for r in manifest_records(tmp_path / "n.jsonl")] == ["bring the old colours back"] * 2
    main([*asked, "--merge-into", str(tmp_path / "again.jsonl")])
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "n.jsonl").read_text()


def test_kinds_and_suites_of_the_command_line_are_those_of_the_library():
    kinds, _ = get_args(get_type_hints(Annotate)["kind"])
    assert get_args(kinds) == tuple(QUESTIONS)
    assert tuple(PAIR_SUITES) == tuple(SUITES)


def test_index_finds_the_example_that_compile_takes(capsys, model, pictures, tmp_path):
    texts = ["remove the rain", "make it night", "remove all rain", "make it a night"]
    manifest = write_manifest(pictures, tmp_path / "m.jsonl", [{"instruction": t, "split": "train"} for t in texts])
    main(["index", "--data", str(manifest), "--out", str(tmp_path / "i"), "--neighbours", "2"])
    assert "i: 4 pairs, 4 instructions of training pairs, 2 neighbours each" in capsys.readouterr().out
    index = RetrievalIndex.load(tmp_path / "i")
    assert index.neighbours[:, 0].tolist() == [2, 3, 0, 1]
    flags = ["compile", "--model", model, "--out", tmp_path / "t.xprompt", "--index", tmp_path / "i"]
    main([str(a) for a in [*flags, "--instruction", "let it be night", "--examples", "2"]])
    out = capsys.readouterr().out.splitlines()
    assert {line.split(": ")[1].split(",")[0] for line in out[:2]} == {"'make it night'", "'make it a night'"}
    prompt = CompiledPrompt.load(tmp_path / "t.xprompt")
    assert prompt.num_examples == 2 and prompt.instruction == "let it be night"
    assert "5 examples: the index has 4" in fails(capsys, *flags, "--instruction", "night", "--examples", "5")
    manifest.write_text(manifest.read_text() + "\n")
    assert "m.jsonl: has changed since" in fails(capsys, *flags, "--instruction", "night")


def test_tokenize_train_compile_sample_describe_convert(capsys, model, pictures, tmp_path):
    """The whole way in real processes, as docs/ tells it."""
    task = ["--task", "derain", "--instruction", "remove the rain", "--reverse-instruction", "add rain"]
    result = run("tokenize", "--model", model, "--out", tmp_path / "s", "--inputs", pictures / "in", "--outputs", pictures / "out", *task)
    assert result.returncode == 0, result.stderr
    assert "4 pairs, 8 images" in result.stdout
    result = run("index", "--data", tmp_path / "s", "--out", tmp_path / "i", "--eval-fraction", 0)
    assert result.returncode == 0 and "4 pairs, 1 instructions" in result.stdout, result.stderr

    buckets = '[{"name": "a", "examples": 1, "context": 96, "todo": 96, "answer": 19, "rows": 8}]'
    config = json.loads(to_json(Config(model=TINY, compute=FP32)))
    config["data"] |= {"store": str(tmp_path / "s"), "buckets": json.loads(buckets)}
    (tmp_path / "c.json").write_text(json.dumps(config))
    train = ["train", "--config", tmp_path / "c.json", "--workdir", tmp_path / "run", "--train.save-every", 2]
    result = run(*train, "--train.steps", 3)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "model" / "config.json").exists()
    result = run("train", "--workdir", tmp_path / "run", "--train.steps", 4)
    assert result.returncode == 0 and "resumed from step 3" in result.stderr, result.stderr

    trained = tmp_path / "run" / "model"
    result = run(
        "compile", "--model", trained, "--inputs", pictures / "in" / "0.png", "--outputs", pictures / "out" / "0.png",
        "--instruction", "remove the rain", "--out", tmp_path / "t.xprompt",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    result = run(
        "sample", "--model", trained, "--task", tmp_path / "t.xprompt", "--inputs", pictures / "in" / "1.png", pictures / "in" / "2.png",
        "--num-images", 2, "--out", tmp_path / "drawn",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    drawn = sorted(p.name for p in (tmp_path / "drawn").iterdir())
    assert drawn == ["1-0.png", "1-1.png", "2-0.png", "2-1.png", "contact.png", "samples.jsonl"]
    assert PIL.Image.open(tmp_path / "drawn" / drawn[0]).size == (16, 16)
    other = ["--task", tmp_path / "t.xprompt", "--inputs", pictures / "in" / "1.png", "--out", tmp_path / "no"]
    assert "belongs to model" in fails(capsys, "sample", "--model", model, *other) and not (tmp_path / "no").exists()
    result = run("describe", "--model", trained, "--input", pictures / "in" / "0.png", "--output", pictures / "out" / "0.png")
    assert result.returncode == 0, result.stderr
    result = run("convert", "--source", trained, "--out", tmp_path / "hf", "--to", "huggingface")
    assert result.returncode == 0 and (tmp_path / "hf" / "model.safetensors").exists(), result.stderr
