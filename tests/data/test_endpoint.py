"""The client against a server that misbehaves in every way servers do, and its key."""

import email.utils
import socket
import time

import pytest

from tests.data.endpoint_server import KEY, failures, good, make_manifest, run
from xprompt_jax.data.annotate import GIVE_UP_AFTER, annotate_manifest
from xprompt_jax.errors import UserError


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


def test_concurrency_is_bounded_and_used(server, manifest, tmp_path):
    def slowly(number, attempt, call):
        time.sleep(0.05)
        return good(call)

    server.script = slowly
    assert run(server, manifest, tmp_path / "answers.jsonl", concurrency=3).answered == 12
    assert server.most == 3


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
