"""Answers: kept, continued after any stop, and merged into a manifest."""

import json
import signal
import subprocess
import sys
import threading
import time

import PIL.Image
import pytest

from tests.data.endpoint_server import colour, endpoint, failures, good, make_manifest, run
from tests.helpers import CTRL_C
from xprompt_jax.data import sources
from xprompt_jax.data.annotate import annotate, annotate_manifest, merge, read_answers
from xprompt_jax.data.questions import requests_for
from xprompt_jax.errors import UserError


def test_answers_are_kept_and_merged(server, manifest, tmp_path):
    out, merged = tmp_path / "answers.jsonl", tmp_path / "deeper" / "merged.jsonl"
    counts = run(server, manifest, out)
    assert (counts.before, counts.answered, counts.failed, counts.left) == (0, 12, 0, 0)
    assert sorted(server.asked, key=int) == [str(i) for i in range(12)]
    row, _ = next(read_answers(out))
    assert row["kind"] == "reverse" and row["model"] == "m" and json.loads(row["text"]) == row["parsed"]
    # All descriptions of one pair of images are one question: asked once, merged into every row.
    assert run(server, manifest, out, "describe").answered == 1
    result = merge(manifest, out, merged)
    assert (result.rows, result.filled, result.dropped) == (12, 12, 0)
    records = list(sources.manifest(merged))
    assert [r.instruction for r in records] == [f"paint it blue, number {i}" for i in range(12)]
    assert records[3].description == "The input image shows a red square; the output image shows a blue square."
    assert records[3].reverse_description == "The input image shows a blue square; the output image shows a red square."
    assert records[3].reverse_instruction == "paint the square red again"
    assert records[3].group == "Object Modification"  # examples are of the same subtask
    merge(manifest, out, once := tmp_path / "once.jsonl")
    merge(once, out, tmp_path / "twice.jsonl")
    assert (tmp_path / "twice.jsonl").read_text() == once.read_text()
    assert records[3].input.exists() and records[3].output.exists()
    assert "split" not in merged.read_text()  # what the manifest left open stays open
    assert not list(requests_for(merged, "describe")) and not list(requests_for(merged, "reverse"))
    assert not out.with_suffix(".failed.jsonl").exists()


def test_filters_drop_and_hold_out(server, tmp_path):
    manifest, out = make_manifest(tmp_path, 4), tmp_path / "answers.jsonl"
    assert run(server, manifest, out, "holdout").answered == 4
    assert merge(manifest, out, tmp_path / "a.jsonl").filled == 4
    assert [(r.split, r.holdout) for r in sources.manifest(tmp_path / "a.jsonl")] == [("train", "yes")] * 4  # a run says what it holds out
    server.script = lambda number, attempt, call: json.dumps({"reason": "it is recoloured", "answer": "no"})
    assert run(server, manifest, tmp_path / "no.jsonl", "holdout").answered == 4
    merge(manifest, tmp_path / "no.jsonl", tmp_path / "kept.jsonl")
    assert {r.holdout for r in sources.manifest(tmp_path / "kept.jsonl")} == {"no"}
    server.script = lambda number, attempt, call: json.dumps({"reason": "I can't see a likeness", "answer": "no"})
    assert run(server, manifest, out, "style_same").answered == 1
    assert merge(manifest, out, tmp_path / "b.jsonl").dropped == 4


def test_several_inputs_and_odd_characters_survive(server, tmp_path):
    manifest, out = make_manifest(tmp_path, 1), tmp_path / "answers.jsonl"
    row = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**row, "instruction": "one line\u2028of text", "more_inputs": [row["output"]]}, ensure_ascii=False))
    run(server, manifest, out)
    (tmp_path / "deep").mkdir()
    merge(manifest, out, tmp_path / "deep" / "merged.jsonl")
    (record,) = sources.manifest(tmp_path / "deep" / "merged.jsonl")
    assert record.instruction == "one line\u2028of text" and [p.exists() for p in record.more_inputs] == [True]


def test_a_style_pair_passes_two_filters(server, tmp_path):
    """The layout is that of the source, the style that of the style image: each question is shown the two images that it is about."""
    make_manifest(tmp_path, 1)
    PIL.Image.new("RGB", (12, 8), (20, 200, 20)).save(tmp_path / "green.png")
    manifest = tmp_path / "style.jsonl"
    row = {"input": "red.png", "more_inputs": ["green.png"], "output": "blue.png", "instruction": "number 1", "task": "style"}
    manifest.write_text(json.dumps(row) + "\n")
    shown = {}

    def script(number, attempt, call):
        content = call["messages"][0]["content"]
        shown[call["response_format"]["json_schema"]["name"]] = [
            (name["text"], colour(image["image_url"]["url"])) for name, image in zip(content[:-1:2], content[1::2], strict=True)
        ]
        return good(call)

    server.script = script
    for kind in ("layout_same", "style_same"):
        assert run(server, manifest, tmp_path / f"{kind}.jsonl", kind).answered == 1
        merge(manifest, tmp_path / f"{kind}.jsonl", manifest := tmp_path / f"after-{kind}.jsonl")
    assert shown == {
        "layout_same": [("Input image:", "green"), ("Output image:", "blue")],
        "style_same": [("Input image:", "red"), ("Output image:", "blue")],
    }
    assert len(list(sources.manifest(manifest))) == 1


def test_a_composition_is_asked_for_by_its_relation(server, tmp_path):
    make_manifest(tmp_path, 1)
    manifest, out = tmp_path / "m.jsonl", tmp_path / "answers.jsonl"
    row = {
        "input": "red.png",
        "more_inputs": ["blue.png"],
        "output": "blue.png",
        "instruction": "combine the two images",
        "task": "compose",
    }
    manifest.write_text(json.dumps(row) + "\n")
    relation = "the red of image 1 is lost, the blue of image 2 lives on"

    def script(number, attempt, call):
        content = call["messages"][0]["content"]
        assert [part["text"] for part in content if part["type"] == "text"][:-1] == ["Input image 1:", "Input image 2:", "Output image:"]
        assert [colour(part["image_url"]["url"]) for part in content if part["type"] == "image_url"] == ["red", "blue", "blue"]
        return json.dumps({"relation": relation})

    server.script = script
    assert run(server, manifest, out, "relation").answered == 1
    merge(manifest, out, tmp_path / "merged.jsonl")
    (record,) = sources.manifest(tmp_path / "merged.jsonl")
    assert record.instruction.endswith(f": {relation}") and record.description == relation and len(record.more_inputs) == 1
    assert not list(requests_for(tmp_path / "merged.jsonl", "relation"))


def test_words_that_are_there_are_replaced_on_request(server, tmp_path):
    """As of edits that come with a description made of their captions."""
    manifest, out = make_manifest(tmp_path, 2, description="old", reverse_description="old"), tmp_path / "answers.jsonl"
    assert not list(requests_for(manifest, "describe"))
    ask = dict(kind="describe", endpoint=server.url, model="m", progress=False)
    assert annotate_manifest(manifest, out, **ask).answered == 0
    assert annotate_manifest(manifest, out, rewrite=True, **ask).answered == 1
    for rewrite in (False, True):
        merge(manifest, out, tmp_path / "merged.jsonl", rewrite=rewrite)
        assert [r.description == "old" for r in sources.manifest(tmp_path / "merged.jsonl")] == [not rewrite] * 2


def test_a_picture_alone_is_described_by_its_new_caption(server, tmp_path):
    make_manifest(tmp_path, 1)
    manifest, out = tmp_path / "m.jsonl", tmp_path / "answers.jsonl"
    rows = [
        {"input": "red.png", "output": "red.png", "instruction": "", "caption": f"{i} old", "description": f"{i} old"} for i in range(30)
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = run(server, manifest, out, "caption").answered
    merge(manifest, out, tmp_path / "merged.jsonl")
    found = [(r.caption, r.description) for r in sources.manifest(tmp_path / "merged.jsonl")]
    assert 20 < asked < 30 and all(caption == description for caption, description in found)
    assert sum("old" not in caption for caption, _ in found) == asked


def test_captions_are_rewritten_but_a_tenth(server, tmp_path):
    manifest, out = make_manifest(tmp_path, 1, caption="a thing"), tmp_path / "answers.jsonl"
    rows = [{**json.loads(manifest.read_text()), "caption": f"a thing, number {i}"} for i in range(300)]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    requests = list(requests_for(manifest, "caption"))
    assert 250 < len(requests) < 290 and requests == list(requests_for(manifest, "caption"))
    annotate(requests[:1], out, endpoint(server), progress=False)
    merge(manifest, out, tmp_path / "merged.jsonl")
    captions = [r.caption for r in sources.manifest(tmp_path / "merged.jsonl")]
    assert captions.count("one red square that fills the whole image") == 1 and len(set(captions)) == 300


def test_resume_asks_only_what_is_missing(server, manifest, tmp_path):
    out = tmp_path / "answers.jsonl"
    annotate(list(requests_for(manifest, "reverse"))[:6], out, endpoint(server), progress=False)
    first = list(server.asked)
    lines = out.read_bytes().splitlines(keepends=True)
    torn = next(n for n in first if json.loads(lines[-1])["key"] == list(requests_for(manifest, "reverse"))[int(n)].key)
    out.write_bytes(b"".join(lines)[:-20])
    server.asked.clear()
    counts = run(server, manifest, out)
    assert (counts.before, counts.answered) == (5, 7)
    assert sorted(server.asked, key=int) == sorted({str(i) for i in range(12)} - set(first) | {torn}, key=int)
    keys = [row["key"] for row, _ in read_answers(out)]
    assert len(keys) == len(set(keys)) == 12
    server.asked.clear()
    assert run(server, manifest, out).before == 12 and not server.asked


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_run_is_continued(server, tmp_path, how):
    manifest, out = make_manifest(tmp_path, 40), tmp_path / "answers.jsonl"
    release, asked_again = threading.Event(), []

    def script(number, attempt, call):
        if call["model"] == "m":
            asked_again.append(number)
        elif len(server.asked) > 15:
            release.wait(20)
        return good(call)

    server.script = script
    code = (
        f"{CTRL_C}import sys; from pathlib import Path; from xprompt_jax.data.annotate import annotate_manifest as a\n"
        "a(Path(sys.argv[1]), Path(sys.argv[2]), kind='reverse', endpoint=sys.argv[3], model='stopped', concurrency=3, progress=False)"
    )
    command = [sys.executable, "-c", code, str(manifest), str(out), server.url]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while (not out.exists() or out.read_bytes().count(b"\n") < 13) and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(UserError, match="another run is writing there"):
        run(server, manifest, out)
    process.send_signal(how)
    assert process.wait(5) == -how  # though three answers are still awaited
    release.set()
    answered = {row["key"] for row, _ in read_answers(out)}
    number = {request.key: str(i) for i, request in enumerate(requests_for(manifest, "reverse"))}
    assert 13 <= len(answered) <= 15
    counts = run(server, manifest, out)
    assert counts.before == len(answered) and counts.answered == 40 - len(answered)
    assert set(asked_again).isdisjoint(number[key] for key in answered) and len(asked_again) == counts.answered


def test_nothing_is_sent_in_a_dry_run(server, manifest, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    counts = annotate_manifest(manifest, out, kind="reverse", endpoint=server.url, model="m", dry_run=True)
    assert counts.left == 12 and not server.asked and not out.exists()
    said = capsys.readouterr().out
    assert "number 2" in said and "number 3" not in said and "12 to ask, 0 answered before; nothing was sent" in said


def test_foreign_files_are_not_touched(server, manifest, tmp_path):
    for text in (manifest.read_text(), "a note without a newline", '{"key": 1, "kind": "reverse", "parsed": {}}\n', "\n"):
        out = tmp_path / "out.jsonl"
        out.write_text(text)
        with pytest.raises(UserError, match=r"out.jsonl, line 1: no answer of `annotate`; give --out"):
            run(server, manifest, out)
        assert out.read_text() == text and not server.asked


def test_broken_image_fails_alone(server, manifest, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with manifest.open("a") as file:
        file.write(json.dumps({"input": "broken.png", "output": "blue.png", "instruction": "x"}) + "\n")
    out = tmp_path / "answers.jsonl"
    assert run(server, manifest, out).failed == 1
    assert "broken.png: not an image" in failures(out)[0]["reason"] and len(server.asked) == 12
