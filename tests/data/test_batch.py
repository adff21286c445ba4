"""Questions written as batch files, and a batch's answers."""

import json

import pytest

from tests.data.endpoint_server import endpoint, failures, good, reply, run
from xprompt_jax.data.annotate import annotate, annotate_manifest
from xprompt_jax.data.endpoint import batch_answers, chat_body, write_batch
from xprompt_jax.data.questions import requests_for
from xprompt_jax.errors import UserError


def test_batch_round_trip(server, manifest, tmp_path, capsys):
    out, batch = tmp_path / "answers.jsonl", tmp_path / "batch.jsonl"
    annotate(list(requests_for(manifest, "reverse"))[:2], out, endpoint(server), progress=False)
    counts = annotate_manifest(manifest, out, kind="reverse", model="m", batch_out=batch)
    assert (counts.before, counts.left) == (2, 10) and f"{batch}: batch requests" in capsys.readouterr().out
    calls = [json.loads(line) for line in batch.read_text().splitlines()]
    assert len(calls) == 10 and {(c["method"], c["url"]) for c in calls} == {("POST", "/v1/chat/completions")}
    request = list(requests_for(manifest, "reverse"))[2]
    assert calls[0]["custom_id"] == request.key and calls[0]["body"] == chat_body(request, "m")

    lines = [{"custom_id": c["custom_id"], "response": {"status_code": 200, "body": reply(good(c["body"]))}, "error": None} for c in calls]
    lines[1]["response"]["body"] = reply("no")
    lines[2] = {"custom_id": calls[2]["custom_id"], "response": {"status_code": 500, "body": {"error": "x"}}, "error": None}
    lines[3] = {"custom_id": calls[3]["custom_id"], "response": None, "error": {"code": "batch_expired"}}
    lines[4]["custom_id"] = "a stranger"
    again = {**lines[5], "custom_id": calls[2]["custom_id"]}  # failed in one file, answered in the next
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, lines[::-1])))
    (tmp_path / "two.jsonl").write_text(json.dumps(again) + "\n" + json.dumps(lines[5]))
    counts = annotate_manifest(manifest, out, kind="reverse", batch_in=[tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    assert (counts.before, counts.answered, counts.failed, counts.left) == (2, 7, 2, 1)
    assert {row["key"]: row["reason"][:15] for row in failures(out)} == {
        calls[1]["custom_id"]: "unusable answer", calls[3]["custom_id"]: "HTTP 200: {\"cod",
    }  # fmt: skip
    assert len(server.asked) == 2
    assert run(server, manifest, out).answered == 3


def test_batch_files_are_split_at_the_limits(manifest, tmp_path):
    requests = list(requests_for(manifest, "reverse"))
    size = len(json.dumps(chat_body(requests[0], "m")))
    by_lines = write_batch(requests, tmp_path / "a.jsonl", "m", max_lines=5)
    by_bytes = write_batch(requests, tmp_path / "b.jsonl", "m", max_bytes=4 * (size + 200))
    assert [p.name for p in by_lines] == ["a.jsonl", "a-2.jsonl", "a-3.jsonl"] and len(by_bytes) == 3
    for paths in (by_lines, by_bytes):
        ids = [json.loads(line)["custom_id"] for p in paths for line in p.read_text().splitlines()]
        assert ids == [r.key for r in requests]
    assert write_batch([], tmp_path / "c.jsonl", "m") == []


def test_wrong_batch_files_are_told(manifest, tmp_path):
    path, out = tmp_path / "batch.jsonl", tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"custom_id": "x", "response": {"status_code": 200, "body": reply("a")}}) + "\n")
    with pytest.raises(UserError, match="--batch-in .*answers none of these requests"):
        annotate_manifest(manifest, out, kind="reverse", batch_in=[path])
    for text in ('{"custom_id": "x", "resp', "[]", '{"custom_id": "x", "response": "y"}', '{"id": 1}'):
        path.write_text("\n" + text)
        with pytest.raises(UserError, match=r"batch.jsonl, line 2: no batch answer"):
            list(batch_answers([path]))
