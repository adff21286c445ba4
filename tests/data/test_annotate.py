"""The annotator against a real HTTP server that speaks the protocol, and misbehaves in every way servers do."""

import base64
import contextlib
import email.utils
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import PIL.Image
import pytest

from tests.helpers import CTRL_C
from xprompt_jax.data import sources
from xprompt_jax.data.annotate import GIVE_UP_AFTER, annotate, annotate_manifest, merge, read_answers
from xprompt_jax.data.endpoint import Endpoint, batch_answers, chat_body, write_batch
from xprompt_jax.data.questions import QUESTIONS, parse_answer, requests_for
from xprompt_jax.errors import UserError

KEY = "sk-very-secret-0123456789"


def colour(url: str) -> str:
    image = PIL.Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
    assert image.format == "JPEG"
    return ("red", "green", "blue")[int(np.asarray(image.convert("RGB")).mean((0, 1)).argmax())]


def good(call: dict) -> str:
    """A usable answer; descriptions tell what the model was really shown."""
    content = call["messages"][0]["content"]
    shown = [colour(part["image_url"]["url"]) for part in content if part["type"] == "image_url"]
    name = call["response_format"]["json_schema"]["name"]
    if name == "describe":
        both = "The input image shows a {} square; the output image shows a {} square."
        answer = {"description": both.format(*shown), "reverse_description": both.format(*shown[::-1]), "subtask": "Object modification"}
    elif name == "reverse":
        answer = {"reverse_instruction": f"paint the square {shown[0]} again"}
    elif name == "caption":
        answer = {"caption": f"one {shown[0]} square that fills the whole image"}
    else:
        answer = {"reason": "so it seems", "answer": "Yes."}
    return json.dumps(answer)


def reply(text) -> dict:
    return {"model": "m", "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]}


class Server(ThreadingHTTPServer):
    """`script(number, attempt, call)` says what to do: text (an answer), (status, headers, body), "cut", "half" or seconds of silence."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.script = lambda number, attempt, call: good(call)
        self.lock = threading.Lock()
        self.asked: list[str] = []  # number of the row, for every request
        self.times: list[float] = []
        self.busy = self.most = 0

    def handle_error(self, *args):
        pass  # clients that hang up are part of the tests


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = call["messages"][0]["content"][-1]["text"]
        number = (re.findall(r"number (\d+)", text) or ["?"])[0]
        with server.lock:
            server.asked.append(number)
            server.times.append(time.monotonic())
            attempt = server.asked.count(number)
            server.busy += 1
            server.most = max(server.most, server.busy)
        if self.path != "/v1/chat/completions":
            what = 404, {}, {"error": {"message": "Not Found"}}
        elif self.headers.get("Authorization", f"Bearer {KEY}") != f"Bearer {KEY}":
            what = 401, {}, {"error": {"message": f"Incorrect API key provided: {self.headers['Authorization']}"}}
        else:
            what = server.script(number, attempt, call)
        with server.lock:
            server.busy -= 1  # before the answer: the client may be faster than this thread
        self.act(what)

    def act(self, what):
        if what == "cut":  # a reset, as a crashed server gives
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif what == "half":  # the head, and half of the body
            data = json.dumps(reply("x" * 500)).encode()
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data[:100])
        elif isinstance(what, float):
            time.sleep(what)
        elif isinstance(what, tuple):
            self.answer(*what)
        else:
            self.answer(200, {}, reply(what))

    def answer(self, status, headers, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("XPROMPT_API_KEY", raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def manifest(tmp_path):
    return make_manifest(tmp_path, 12)


def make_manifest(folder, rows, **extra):
    for name, rgb in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        PIL.Image.new("RGB", (12, 8), rgb).save(folder / f"{name}.png")
    lines = [{"input": "red.png", "output": "blue.png", "instruction": f"paint it blue, number {i}", **extra} for i in range(rows)]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def endpoint(server, timeout=5.0):
    return Endpoint(server.url, "m", timeout=timeout, backoff=0.01)


def run(server, manifest, out, kind="reverse", concurrency=4, retries=5, timeout=5.0):
    requests = requests_for(manifest, kind)
    return annotate(requests, out, endpoint(server, timeout), concurrency=concurrency, retries=retries, progress=False)


def failures(out):
    return [json.loads(line) for line in out.with_suffix(".failed.jsonl").read_text().splitlines()]


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
    assert records[3].input.exists() and records[3].output.exists()
    assert "split" not in merged.read_text()  # what the manifest left open stays open
    assert not list(requests_for(merged, "describe")) and not list(requests_for(merged, "reverse"))
    assert not out.with_suffix(".failed.jsonl").exists()


def test_filters_drop_and_hold_out(server, tmp_path):
    manifest, out = make_manifest(tmp_path, 4), tmp_path / "answers.jsonl"
    assert run(server, manifest, out, "holdout").answered == 4
    assert merge(manifest, out, tmp_path / "a.jsonl").filled == 4
    assert [(r.split, r.holdout) for r in sources.manifest(tmp_path / "a.jsonl")] == [("eval", "yes")] * 4
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


@pytest.mark.parametrize("trouble", [(500, {}, {}), (503, {}, {}), (429, {}, {}), "cut", "half", 1.0])
def test_what_passes_is_retried(server, manifest, tmp_path, trouble):
    server.script = lambda number, attempt, call: trouble if number in "37" and attempt <= 3 else good(call)
    counts = run(server, manifest, tmp_path / "answers.jsonl", timeout=0.4 if trouble == 1.0 else 5.0)
    assert (counts.answered, counts.failed) == (12, 0)
    assert server.asked.count("3") == 4 and server.asked.count("7") == 4 and len(server.asked) == 18


def test_what_does_not_pass_fails_alone(server, manifest, tmp_path):
    server.script = lambda number, attempt, call: {"3": (500, {}, {"error": "broken"}), "5": (400, {}, {"error": "too large"})}.get(
        number, good(call)
    )
    out = tmp_path / "answers.jsonl"
    counts = run(server, manifest, out, retries=2)
    assert (counts.answered, counts.failed, counts.left) == (10, 2, 0)
    assert server.asked.count("3") == 3 and server.asked.count("5") == 1
    reasons = {row["reason"] for row in failures(out)}
    assert reasons == {'HTTP 500: {"error": "broken"}, 3 times', 'HTTP 400: {"error": "too large"}'}
    server.script = lambda number, attempt, call: good(call)
    assert run(server, manifest, out).answered == 2
    assert not out.with_suffix(".failed.jsonl").exists()


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_holds_everyone_back(server, manifest, tmp_path, as_date):
    refused = []

    def script(number, attempt, call):
        if not refused:
            refused.append(time.monotonic())  # a date has whole seconds: this one is 1 to 2 ahead
            return 429, {"Retry-After": email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else 1}, {}
        time.sleep(0.1)
        return good(call)

    server.script = script
    assert run(server, manifest, tmp_path / "answers.jsonl", concurrency=2).answered == 12
    waited = [at - refused[0] for at in server.times]
    assert len(waited) == 13 and max(waited) > 0.9 and not [at for at in waited if 0.3 < at < 0.9]


def test_nonsense_is_asked_again_and_then_given_up(server, manifest, tmp_path):
    nonsense = {
        "2": "I would rather not.",
        "4": '{"reverse_instruction": ',
        "6": None,
        "8": '{"reverse_instruction": "Paint it blue, number 8!"}',
    }
    server.script = lambda number, attempt, call: nonsense[number] if number in nonsense else good(call)
    out = tmp_path / "answers.jsonl"
    counts = run(server, manifest, out)
    assert (counts.answered, counts.failed) == (8, 4)
    assert all(server.asked.count(number) == 3 for number in nonsense)
    told = {row["text"]: row["reason"] for row in failures(out)}
    assert told["I would rather not."] == "unusable answer: no JSON object"
    assert told[nonsense["8"]] == "unusable answer: backwards says the same as forwards"
    assert told[""].startswith("unusable answer: empty answer")
    server.script = lambda number, attempt, call: good(call) if attempt > 4 or number not in nonsense else nonsense[number]
    assert run(server, manifest, out).answered == 4


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


def test_concurrency_is_bounded_and_used(server, manifest, tmp_path):
    def slowly(number, attempt, call):
        time.sleep(0.05)
        return good(call)

    server.script = slowly
    assert run(server, manifest, tmp_path / "answers.jsonl", concurrency=3).answered == 12
    assert server.most == 3


def test_nothing_is_sent_in_a_dry_run(server, manifest, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    counts = annotate_manifest(manifest, out, kind="reverse", endpoint=server.url, model="m", dry_run=True)
    assert counts.left == 12 and not server.asked and not out.exists()
    said = capsys.readouterr().out
    assert "number 2" in said and "number 3" not in said and "12 to ask, 0 answered before; nothing was sent" in said


def test_key_is_sent_and_shown_nowhere(server, manifest, tmp_path, monkeypatch, capsys):
    out = tmp_path / "answers.jsonl"
    monkeypatch.setenv("XPROMPT_API_KEY", KEY + "\n")
    server.script = lambda number, attempt, call: good(call) if number != "3" else (400, {}, {"error": f"you sent {KEY}"})
    annotate_manifest(manifest, out, kind="reverse", endpoint=server.url + "/", model="m", progress=False)
    said = capsys.readouterr().out
    assert f"{out}: 11 answers, 1 failed" in said
    assert "you sent ***" in failures(out)[0]["reason"]
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    monkeypatch.setenv("XPROMPT_API_KEY", "sk-wrong")
    with pytest.raises(UserError, match=f"--endpoint {server.url}: the key was refused.*XPROMPT_API_KEY") as e:
        run(server, manifest, tmp_path / "other.jsonl", concurrency=2)
    assert "\n" not in str(e.value) and "sk-" not in str(e.value)
    for bad in ("sk-\r\nX: y", "sk-schlüssel"):
        monkeypatch.setenv("XPROMPT_API_KEY", bad)
        with pytest.raises(UserError, match="XPROMPT_API_KEY holds characters") as e:
            run(server, manifest, tmp_path / "other.jsonl")
        assert "sk-" not in str(e.value)


def test_key_does_not_follow_redirects(server, manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("XPROMPT_API_KEY", KEY)
    server.script = lambda *_: (302, {"Location": server.url + "/elsewhere"}, {})
    with pytest.raises(UserError, match="HTTP 302"):
        run(server, manifest, tmp_path / "answers.jsonl", concurrency=1)
    assert len(server.asked) == 1


def test_wrong_addresses_are_one_line(server, manifest, tmp_path):
    out = tmp_path / "answers.jsonl"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
    cases = {
        server.url.removesuffix("/v1"): "HTTP 404.*end in /v1",
        closed: "cannot connect.*start the server",
        "file:///etc/passwd": "must be an address",
        "http://user:word@host/v1": "no key or user name",
        "http://host:port/v1": "must be an address",
        "": "must be an address",
    }
    for url, told in cases.items():
        start = time.monotonic()
        with pytest.raises(UserError, match=told) as e:
            annotate_manifest(manifest, out, kind="reverse", endpoint=url, model="m", concurrency=1, progress=False)
        assert "--endpoint" in str(e.value) and "\n" not in str(e.value) and "word" not in str(e.value)
        assert time.monotonic() - start < 5
    with pytest.raises(UserError, match="--model is missing"):
        annotate_manifest(manifest, out, kind="reverse", endpoint=server.url)
    with pytest.raises(UserError, match="kinds are describe"):
        annotate_manifest(manifest, out, kind="descripe", endpoint=server.url, model="m")


def test_hopeless_runs_end(server, tmp_path):
    manifest, out = make_manifest(tmp_path, 60), tmp_path / "answers.jsonl"
    server.script = lambda *_: (400, {}, {"error": "response_format is not supported"})
    with pytest.raises(UserError, match="20 failures in a row.*response_format is not supported"):
        run(server, manifest, out)
    assert GIVE_UP_AFTER == 20 and len(server.asked) <= 20 + 4 and len(failures(out)) == 20


def test_broken_image_fails_alone(server, manifest, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with manifest.open("a") as file:
        file.write(json.dumps({"input": "broken.png", "output": "blue.png", "instruction": "x"}) + "\n")
    out = tmp_path / "answers.jsonl"
    assert run(server, manifest, out).failed == 1
    assert "broken.png: not an image" in failures(out)[0]["reason"] and len(server.asked) == 12


def test_foreign_files_are_not_touched(server, manifest, tmp_path):
    for text in (manifest.read_text(), "a note without a newline", '{"key": 1, "kind": "reverse", "parsed": {}}\n', "\n"):
        out = tmp_path / "out.jsonl"
        out.write_text(text)
        with pytest.raises(UserError, match=r"out.jsonl, line 1: no answer of `annotate`; give --out"):
            run(server, manifest, out)
        assert out.read_text() == text and not server.asked


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


def test_keys_follow_the_words_and_not_the_place(manifest, tmp_path):
    keys = [r.key for r in requests_for(manifest, "reverse")]
    assert len(set(keys)) == 12 and all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "pairs.jsonl").write_text(manifest.read_text())
    assert [r.key for r in requests_for(elsewhere / "pairs.jsonl", "reverse")] == keys
    assert len({next(requests_for(manifest, kind)).key for kind in QUESTIONS}) == len(QUESTIONS)


@pytest.mark.parametrize(
    "kind, answer, told",
    [
        ("describe", {"description": "The input image and the output image differ a lot."}, "no text in 'reverse_description'"),
        ("describe", {"description": "A red ball becomes a blue ball on the floor."}, "does not speak of"),
        ("describe", {"description": "The input image; the output image."}, "has 6 words, not 8 to 300"),
        ("describe", {"description": "The input image and the output image. I'm sorry, I see none."}, "is a refusal"),
        ("describe", {"description": "The input image is red, the output image is blue.", "subtask": "Cooking"}, "not one of Style"),
        ("describe", {"description": "the input image \ud800 and the output image are not alike"}, "surrogates not allowed"),
        ("reverse", {"reverse_instruction": ["a"]}, "no text"),
        ("reverse", {"reverse_instruction": "please turn the red ball into a blue one"}, "the same as forwards"),
        ("holdout", {"reason": "x", "answer": "perhaps"}, "not one of yes, no"),
        ("caption", [], "no JSON object"),
    ],
)  # fmt: skip
def test_useless_answers_are_told_apart(tmp_path, kind, answer, told):
    manifest = make_manifest(tmp_path, 1)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "instruction": "turn the red ball into a blue one"}))
    if told.startswith("not one"):
        answer = {"reverse_description": "The input image is blue, the output image is red.", **answer}
    elif kind == "describe" and "reverse" not in told:
        answer = {"reverse_description": "The input image and the output image, as they are.", "subtask": "OTHER_SUBTASK", **answer}
    with pytest.raises(ValueError, match=told):
        parse_answer(next(requests_for(manifest, kind)), json.dumps(answer))


def test_usable_answers_are_understood(tmp_path):
    manifest = make_manifest(tmp_path, 1)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "instruction": "turn red into blue"}))
    reverse, holdout = (next(requests_for(manifest, kind)) for kind in ("reverse", "holdout"))
    swapped = 'Sure:\n```json\n{"reverse_instruction": "turn blue\\n into red", "more": 1}\n```'
    assert parse_answer(reverse, swapped) == {"reverse_instruction": "turn blue into red"}
    assert parse_answer(holdout, '{"reason": "I cannot say why", "answer": "No."}') == {"reason": "I cannot say why", "answer": "no"}
    with contextlib.suppress(ValueError):  # nesting must not crash
        parse_answer(reverse, '{"a": ' + "[" * 100_000 + "}")


def test_large_images_are_sent_small(manifest, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (500, 2000, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "red.png")
    url = chat_body(next(requests_for(manifest, "caption")), "m")["messages"][0]["content"][0]["image_url"]["url"]
    assert PIL.Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == (768, 192)
