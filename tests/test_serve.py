"""`xprompt serve`: a real server and real requests, its limits, and its page in a real browser."""

import base64
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import jax
import numpy as np
import PIL.Image
import pytest

from tests.helpers import CTRL_C, FP32, TINY
from tests.test_cli import ROOT, fails
from xprompt_jax import CompiledPrompt, Example, XPrompt
from xprompt_jax.data.images import save_png

pytest.importorskip("uvicorn", reason="pip install 'xprompt-jax[serve]'")

from tools.screenshot_serve import CHROMIUM, Browser
from xprompt_jax.serve import app
from xprompt_jax.serve.app import listen, make_app
from xprompt_jax.serve.studio import Limits, Studio


def photo(seed, size=(20, 17)):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def png(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


PAIR = {"before": [png(photo(0))], "after": [png(photo(1))]}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model


@pytest.fixture(scope="module")
def loaded(model):
    return XPrompt.from_pretrained(model, compute=FP32)


@pytest.fixture(scope="module")
def tasks(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    loaded.compile([Example(photo(2), photo(3), "add rain")]).save(folder / "rain.xprompt")
    (folder / "broken.xprompt").write_bytes((folder / "rain.xprompt").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def server(model, tasks):
    """A server process: its address and all it said so far."""
    flags = ["--tasks", str(tasks), "--port", "0", "--max-upload-mb", "0.1", "--max-images", "4", "--max-queue", "2"]
    code = CTRL_C + "import runpy; runpy.run_module('xprompt_jax', run_name='__main__')"
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", "--model", str(model), *flags], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    said = [process.stdout.readline() for _ in range(2)]
    yield said[0].split()[1], said
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "broken.xprompt: not a readable compiled prompt" in errors and "Traceback" not in errors
    assert process.returncode == 130


@pytest.fixture
def url(server):
    return server[0]


def ask(url, path, body=None, headers=(), method=None):
    """(status, headers, body) of a request."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    connection.request(method or ("GET" if body is None else "POST"), path, body, dict(headers))
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), data


def form(fields, files):
    """Body and headers of a form."""
    parts = [(f'name="{name}"', str(value).encode()) for name, value in fields.items()]
    parts += [(f'name="{name}"; filename="{i}.png"', data) for name, many in files.items() for i, data in enumerate(many)]
    body = b"".join(b"--edge\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (head.encode(), data) for head, data in parts)
    return body + b"--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}


def draw(url, fields, files):
    status, headers, data = ask(url, "/api/draw", *form(fields, files))
    assert status == 200 and headers["content-type"] == "application/x-ndjson", data
    return [json.loads(line) for line in data.splitlines()]


def pixels(uri):
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


def test_it_says_its_limits_and_listens_here_only(server, tasks, loaded):
    url, said = server
    assert url.startswith("http://127.0.0.1:") and "at most 0.1 MB and 4 images a request, 2 requests in line" in said[1]
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, body = ask(url, path)
        assert status == 200 and headers["content-type"].startswith(kind) and b"://" not in body.replace(b"http://www.w3.org", b"")
        assert headers["content-security-policy"].startswith("default-src 'self'")
    about = json.loads(ask(url, "/api/about")[2])
    assert about["limits"] == {"upload_mb": 0.1, "images": 4, "queue": 2, "instruction": 500} and about["model"] == loaded.fingerprint
    broken, rain = json.loads(ask(url, "/api/tasks")[2])
    assert "not a readable compiled prompt" in broken["error"] and str(tasks) not in broken["error"]
    assert (rain["name"], rain["instruction"], rain["examples"], len(rain["thumbnails"])) == ("rain", "add rain", 1, 1)


def test_rows_appear_and_the_images_are_those_of_python(url, loaded, tmp_path):
    inputs = [photo(4), photo(5)]
    fields = {"instruction": "remove the rain", "seed": 7, "num_images": 2, "guidance": 1.5, "top_k": 9}
    events = draw(url, fields, PAIR | {"inputs": [png(i) for i in inputs]})
    grid = TINY.vq.grid
    assert [e["event"] for e in events] == ["compiled", *["row"] * (grid - 1), "done"]
    assert [e["row"] for e in events[1:-1]] == list(range(1, grid)) and not events[0]["known"]
    want = loaded.generate(
        [Example(photo(0), photo(1), "remove the rain")], inputs, seed=7, num_images=2, guidance=1.5, top_k=9
    )  # fmt: skip
    for uri, image in zip(events[-1]["images"], want, strict=True):
        np.testing.assert_array_equal(pixels(uri), np.asarray(image))

    status, headers, data = ask(url, f"/api/compiled/{events[0]['key']}")
    assert status == 200 and "attachment" in headers["content-disposition"]
    (tmp_path / "t.xprompt").write_bytes(data)
    again = loaded.generate(CompiledPrompt.load(tmp_path / "t.xprompt"), inputs, seed=7, num_images=2, guidance=1.5, top_k=9)
    np.testing.assert_array_equal(np.asarray(again[3]), np.asarray(want[3]))
    assert draw(url, fields, PAIR | {"inputs": [png(inputs[0])]})[0]["known"]
    status, _, data = ask(url, "/api/compiled/0000")
    assert status == 400 and "has been forgotten" in json.loads(data)["error"]


def test_a_task_of_the_folder(url, loaded):
    (want,) = loaded.generate([Example(photo(2), photo(3), "add rain")], [photo(4)], seed=1)
    events = draw(url, {"task": "rain", "seed": 1, "instruction": ""}, {"inputs": [png(photo(4))]})
    assert events[0]["event"] == "row"
    np.testing.assert_array_equal(pixels(events[-1]["images"][0]), np.asarray(want))


BAD = png(photo(0))[:99]


@pytest.mark.parametrize("fields, files, message", [
    ({}, PAIR, "no image to work on"),
    ({}, {"inputs": PAIR["before"]}, "no example; drop an image before and after, or choose a compiled prompt"),
    ({}, {"inputs": PAIR["before"], "before": PAIR["before"]}, "the example has no output"),
    ({}, {"inputs": PAIR["before"], "after": PAIR["before"]}, "the example has no input"),
    ({}, PAIR | {"inputs": [BAD]}, "an input: image of 99 bytes: damaged"),
    ({}, PAIR | {"after": [b"hello"], "inputs": PAIR["after"]}, "the example's output: image of 5 bytes: not an image"),
    ({}, PAIR | {"inputs": [b""]}, "empty"),
    ({"seed": "z"}, PAIR | {"inputs": PAIR["after"]}, "seed 'z' must be a whole number from 0"),
    ({"seed": -1}, PAIR | {"inputs": PAIR["after"]}, "seed '-1' must be"),
    ({"guidance": "nan"}, PAIR | {"inputs": PAIR["after"]}, "guidance 'nan' must be a number from 0 to 20"),
    ({"num_images": 3}, PAIR | {"inputs": PAIR["after"] * 2}, "6 images in one request; this server draws 4"),
    ({}, PAIR | {"inputs": PAIR["after"] * 5}, "at most 6 files"),
    ({"instruction": "a" * 501}, PAIR | {"inputs": PAIR["after"]}, "has 501 letters"),
    ({"task": "../m"}, {"inputs": PAIR["after"]}, "no compiled prompt '../m'"),
    ({"task": "broken"}, {"inputs": PAIR["after"]}, "broken.xprompt: not a readable"),
])  # fmt: skip
def test_bad_requests_are_one_line(url, fields, files, message):
    status, _, data = ask(url, "/api/draw", *form(fields, files))
    error = json.loads(data)["error"]
    assert status == 400 and message in error and "\n" not in error


@pytest.mark.parametrize("body", [b"garbage", b"--edge\r\nContent-Disposition: form-data\r\n\r\n\r\n--edge--\r\n"])
def test_what_is_no_form_is_one_line(url, body):
    status, _, data = ask(url, "/api/draw", body, {"Content-Type": "multipart/form-data; boundary=edge"})
    assert status == 400 and "not a form that can be read" in json.loads(data)["error"]


def test_too_large_and_foreign_requests_are_refused(url):
    host = urlsplit(url).netloc
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.putrequest("POST", "/api/draw")
    connection.putheader("Content-Length", str(10**9))
    connection.endheaders()  # refused by what it promises, before it sends
    answer = connection.getresponse()
    assert answer.status == 413 and "this server takes 0.1 MB" in json.loads(answer.read())["error"]
    body, headers = form({}, PAIR | {"inputs": [bytes(150_000)]})
    pieces = (body[i : i + 10_000] for i in range(0, len(body), 10_000))
    status, _, data = ask(url, "/api/draw", pieces, headers)  # in chunks, which promise nothing
    assert status == 413 and "more than 0.1 MB" in json.loads(data)["error"]

    here = "answers to 127.0.0.1"
    for headers, message in (
        ({"Host": "evil.example"}, here),
        ({"Host": "[::1"}, here),
        ({"Sec-Fetch-Site": "cross-site"}, "another site's page"),
    ):
        status, _, data = ask(url, "/api/about", headers=headers)
        assert status == 403 and message in json.loads(data)["error"]
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert [ask(url, path, headers=link)[0] for path in ("/", "/api/about", "/page.js")] == [200, 403, 403]
    assert ask(url, "/", b"", link)[0] == ask(url, "/", headers=link | {"Sec-Fetch-Mode": "no-cors"})[0] == 403
    assert ask(url, "/api/about", headers={"Host": host.replace("127.0.0.1", "localhost")})[0] == 200


def test_mistakes_of_the_command_are_one_line(capsys, url, model):
    port = urlsplit(url).port
    for flags, message in (
        (["--port", port], f"--port {port}: cannot listen: Address already in use"),
        (["--port", 0, "--tasks", "/none"], "--tasks /none: no such folder"), (["--max-images", 99], "--max-images 99 must be in 1..16"),
        (["--max-upload-mb", 0], "--max-upload-mb 0 must be a number above 0"), (["--max-queue", 0], "--max-queue 0"),
        (["--max-upload-mb", "inf"], "--max-upload-mb inf must be a number above 0"),
        (["--host", "no.such.host.invalid"], "cannot listen"), (["--host", "a..b"], "--host a..b --port 7861: cannot listen"),
    ):  # fmt: skip
        assert message in fails(capsys, "serve", "--model", model, *flags)


class Gated(Studio):
    """Tells an event when it may."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gate, self.told = threading.Semaphore(0), []

    def draw(self, order):
        for event in super().draw(order):
            self.gate.acquire()
            self.told.append(event["event"])
            yield event


@contextlib.contextmanager
def serving(studio):
    """The address of a server in this process, so that a test can hold up its work."""
    import uvicorn

    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(studio), log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def test_a_task_s_name_need_not_be_utf8(loaded, tasks, tmp_path):
    shutil.copy(tasks / "rain.xprompt", tmp_path / "caf\udce9.xprompt")
    shutil.copy(tasks / "broken.xprompt", tmp_path / "\udce9.xprompt")
    with serving(Studio(loaded, tasks=tmp_path)) as url:
        status, _, data = ask(url, "/api/tasks")
        assert status == 200
        good, broken = sorted(json.loads(data), key=lambda task: "error" in task)
        assert "not a readable compiled prompt" in broken["error"]
        assert draw(url, {"task": good["name"]}, {"inputs": [png(photo(4))]})[-1]["event"] == "done"
        status, _, data = ask(url, "/api/draw", *form({"task": broken["name"]}, {"inputs": [png(photo(4))]}))
        assert status == 400 and "not a readable compiled prompt" in json.loads(data)["error"]


def test_uploads_are_limited_in_number_and_in_time(loaded, monkeypatch):
    body, headers = form({}, PAIR | {"inputs": PAIR["after"]})
    with serving(Studio(loaded, limits=Limits(queue=2))) as url:
        slow = [http.client.HTTPConnection(urlsplit(url).netloc, timeout=60) for _ in range(2)]
        monkeypatch.setattr(app, "UPLOAD_SECONDS", 3.0)
        for connection in slow:
            connection.putrequest("POST", "/api/draw")
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                connection.putheader(name, value)
            connection.endheaders(body[:99])
        time.sleep(0.5)
        assert ask(url, "/api/draw", body, headers)[0] == 503
        for connection in slow:
            answer = connection.getresponse()
            assert answer.status == 408 and "more than 3 s" in json.loads(answer.read())["error"]
            connection.close()
        assert ask(url, "/api/draw", body, headers)[0] == 200


def test_the_line_is_bounded_in_order_and_left_by_those_who_go(loaded):
    studio = Gated(loaded, limits=Limits(queue=2))

    def begin():
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        connection.request("POST", "/api/draw", *form({}, PAIR | {"inputs": PAIR["after"]}))
        return connection, connection.getresponse()

    with serving(studio) as url, contextlib.ExitStack() as stack:
        stack.callback(studio.gate.release, 99)
        first = begin()
        leaver, waiting = begin()
        assert json.loads(waiting.readline()) == {"event": "queued", "ahead": 1}
        status, _, data = ask(url, "/api/draw", *form({}, PAIR))
        assert status == 503 and "2 requests are waiting already" in json.loads(data)["error"]
        waiting.close()
        leaver.close()
        end = time.monotonic() + 30
        while (third := begin())[1].status == 503:
            assert time.monotonic() < end, "who leaves keeps his place"
            time.sleep(0.02)
        assert json.loads(third[1].readline()) == {"event": "queued", "ahead": 1}
        studio.gate.release()
        assert json.loads(first[1].readline())["event"] == "compiled"
        for end in reversed(first):  # who leaves while his images are drawn
            end.close()
        time.sleep(1)  # for the server to notice, while the next row is held up
        studio.gate.release(99)
        assert json.loads(third[1].read().splitlines()[-1])["event"] == "done"
        stopped = studio.told.index("compiled", 1)
        assert stopped < TINY.vq.grid and studio.told.count("done") == 1, "drawing went on for nobody"
        assert ask(url, "/api/draw", *form({}, PAIR))[0] == 400  # room again: this one is told that it has no image


class Wordy(Studio):
    """Tells more than the buffers between a server and a visitor hold."""

    def draw(self, order):
        for event in super().draw(order):
            yield event | {"words": "x" * 8_000_000}


def test_who_stops_reading_loses_his_place(loaded, monkeypatch):
    monkeypatch.setattr(app, "SEND_SECONDS", 1.0)
    monkeypatch.setattr(app, "SEND_RATE", 1e9)
    body, headers = form({}, PAIR | {"inputs": PAIR["after"]})
    with serving(Wordy(loaded)) as url:
        silent = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        silent.request("POST", "/api/draw", body, headers)
        assert silent.getresponse().status == 200  # and reads nothing
        assert json.loads(ask(url, "/api/draw", body, headers)[2].splitlines()[-1])["event"] == "done"
        silent.close()


def test_a_task_that_is_gone_is_told_beside_the_others(loaded, tasks, tmp_path):
    (tmp_path / "gone.xprompt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "rain.xprompt").symlink_to(tasks / "rain.xprompt")
    gone, rain = Studio(loaded, tasks=tmp_path).tasks()
    assert "no such file" in gone["error"] and rain["instruction"] == "add rain"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(url, loaded, tmp_path):
    for i in range(4):
        save_png(photo(i), tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(BAD)
    with Browser() as browser:
        browser.open(url)
        browser.wait("document.getElementById('about').textContent.includes('at most 0.1 MB and 4 images a request')")
        browser.wait("document.querySelectorAll('#task option').length === 3")
        assert browser.evaluate("[...document.querySelectorAll('#task option')].map((o) => o.disabled)") == [False, True, False]
        press = lambda: browser.evaluate("document.getElementById('draw').click()")
        error = "!document.getElementById('error').hidden && document.getElementById('error').textContent"
        press()
        assert "no image to work on" in browser.wait(error)
        browser.choose("#before input", tmp_path / "0.png")
        browser.choose("#after input", tmp_path / "1.png")
        browser.choose("#inputs input", tmp_path / "2.png", tmp_path / "bad.png")
        press()
        assert "an input: image of 99 bytes: damaged" in browser.wait(error)
        browser.evaluate("document.querySelector('#chosen li:nth-child(2) button').click()")
        browser.evaluate("document.getElementById('form').elements.instruction.value = 'remove the rain'")
        press()
        browser.wait("document.getElementById('status').textContent.startsWith('1 image in')")
        (uri,) = browser.evaluate("[...document.querySelectorAll('#rows figure:nth-child(2) img')].map((image) => image.src)")
        (want,) = loaded.generate([Example(photo(0), photo(1), "remove the rain")], [photo(2)])
        np.testing.assert_array_equal(pixels(uri), np.asarray(want))
        seen = np.asarray(browser.picture())
        assert seen.std() > 10
        browser.evaluate("const t = document.getElementById('task'); t.value = 'rain'; t.onchange()")
        assert browser.evaluate("document.getElementById('pair').hidden && document.querySelectorAll('#shown img').length") == 1
        press()
        browser.wait("document.getElementById('status').textContent.startsWith('1 image in')")
