"""A real HTTP server that speaks the protocol of a vision-language model and misbehaves in every way servers do; and runs against it."""

import base64
import io
import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import PIL.Image

from xprompt_jax.data.annotate import annotate
from xprompt_jax.data.endpoint import Endpoint
from xprompt_jax.data.questions import requests_for

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
        back = both.format(*shown[::-1]) + " Seen backwards." * (shown[0] == shown[1])  # which must not say the same
        answer = {"description": both.format(*shown), "reverse_description": back, "subtask": "Object modification"}
    elif name == "reverse":
        answer = {"reverse_instruction": f"paint the square {shown[0]} again"}
    elif name == "caption":
        answer = {"caption": f"one {shown[0]} square that fills the whole image"}
    elif name == "relation":
        answer = {"relation": f"the {shown[0]} of image 1 lives on, and the form of image {len(shown) - 1}"}
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
