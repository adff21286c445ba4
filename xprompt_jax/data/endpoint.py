"""The two ways to ask a vision-language model: an OpenAI-compatible chat-completions endpoint, and batch files.

Only the standard library: no client package, and any server that speaks the protocol (vLLM, llama.cpp, hosted ones). The key comes
from an environment variable and is in no message, file or representation; it is never sent on to where an endpoint redirects.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import email.utils
import http.client
import io
import json
import math
import os
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from xprompt_jax.data.images import open_image
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path

MAX_SIDE = 768
"""Pixels; larger images are scaled down before they are sent."""
MAX_TOKENS = 2048
"""Of an answer; bounds what a model that does not stop can cost."""
MAX_BYTES = 8_000_000
"""Of a reply that is read at all."""
NONSENSE_RETRIES = 2
"""How often an answer that cannot be used is asked for again."""
LONGEST_WAIT = 600.0
"""Seconds; longer ones that a server asks for are cut to this."""
TRY_AGAIN = frozenset({408, 425, 429})
"""HTTP statuses that pass, besides 5xx."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One question about one row of a manifest."""

    key: str
    """Names the question for ever: 32 hex digits, from its kind, words and images' paths."""
    kind: str
    images: tuple[Path, ...]
    """None, the input image, or input images and the output image after them."""
    text: str
    instruction: str
    """The row's, for checks of the answer."""
    schema: Mapping[str, Any]
    """JSON schema of the answer."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where the model is."""

    url: str
    """Up to "/v1", e.g. http://localhost:8000/v1."""
    model: str
    key_variable: str = "XPROMPT_API_KEY"
    """Environment variable that holds the key; unset: none is sent. A name of our own, so that no other service's key goes astray."""
    timeout: float = 120.0
    """Seconds of silence after which a request is given up and sent again."""
    backoff: float = 1.0
    """Seconds before the first retry; doubled each time, with jitter, up to a minute."""


class Failed(Exception):
    """One request that cannot be answered; the others can.

    Attributes:
      text: the unusable answer, if there was one.
    """

    def __init__(self, reason: str, text: str = ""):
        super().__init__(reason)
        self.text = text


class _Later(Exception):
    """Send it again, after `wait` seconds if the server said when."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None  # the status then stands as an error, and the key goes nowhere else


class Client:
    """Asks an endpoint; threads may share one.

    Raises:
      UserError: an address that is none, or a key that is none.
    """

    def __init__(self, endpoint: Endpoint, retries: int = 5):
        if not _is_address(endpoint.url):
            raise UserError("--endpoint must be an address like http://localhost:8000/v1, with no key or user name in it")
        self.endpoint, self.retries = endpoint, retries
        self._url = endpoint.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._key = os.environ.get(endpoint.key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"${endpoint.key_variable} holds characters that no key has; set it to the key alone")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock, self._not_before = threading.Lock(), 0.0
        self._reached = False
        self._stopped = threading.Event()

    def ask(self, request: Request, parse: Callable[[str], dict[str, str]]) -> tuple[str, dict[str, str]]:
        """Sends a request until its answer can be used.

        Args:
          parse: answer -> what was understood; raises ValueError saying why it cannot be used.

        Returns:
          the answer's text and what `parse` made of it.

        Raises:
          Failed: unreadable image, refused by the server, or no usable answer after all retries.
          UserError: no request can succeed: wrong address, model or key.
        """
        try:
            data = json.dumps(chat_body(request, self.endpoint.model)).encode()
        except UserError as e:
            raise Failed(str(e)) from None
        interrupted = nonsense = 0
        while True:
            text = ""
            try:
                text = answer_text(self._post(data))
                return text, parse(text)
            except _Later as e:
                interrupted += 1
                if interrupted > self.retries:
                    raise Failed(f"{e}, {interrupted} times") from None
                self._pause(interrupted, e.wait)
            except UserError:
                raise
            except ValueError as e:
                nonsense += 1
                if nonsense > NONSENSE_RETRIES:
                    raise Failed(f"unusable answer: {e}", text) from None

    def close(self) -> None:
        """Lets requests under way end without retries."""
        self._stopped.set()

    def _pause(self, attempt: int, wait: float | None) -> None:
        delay = min(self.endpoint.backoff * 2 ** (attempt - 1), 60.0) * random.uniform(0.5, 1.0)
        if wait:  # the server is busy for everyone, not just for this request
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + min(wait, LONGEST_WAIT))
        else:
            self._stopped.wait(delay)

    def _post(self, data: bytes) -> Any:
        while (delay := self._not_before - time.monotonic()) > 0 and not self._stopped.is_set():
            self._stopped.wait(delay + random.uniform(0.0, 0.1) * min(delay, 10.0))  # not all at the same moment
        if self._stopped.is_set():
            raise Failed("stopped")
        headers = {"Content-Type": "application/json", "User-Agent": "xprompt-jax"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, data, headers)
        try:
            with self._opener.open(request, timeout=self.endpoint.timeout) as response:
                self._reached = True
                said = response.read(MAX_BYTES)
                if response.length:  # a bounded read does not complain of what is missing
                    raise http.client.IncompleteRead(said, response.length)
        except urllib.error.HTTPError as e:
            self._reached = True
            raise self._verdict(e) from None
        except (OSError, http.client.HTTPException) as e:
            cause = getattr(e, "reason", e)
            hopeless = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError)
            if isinstance(cause, hopeless) and not self._reached:
                raise UserError(
                    f"--endpoint {self.endpoint.url}: cannot connect ({cause}); start the server or correct the address"
                ) from None
            raise _Later("timed out" if isinstance(cause, TimeoutError) else f"connection lost ({cause or type(e).__name__})") from None
        try:
            return json.loads(said)
        except (ValueError, RecursionError):
            raise ValueError("the reply is not JSON") from None

    def _verdict(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP error means: try later, this request failed, or all will."""
        said = b""
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            said = error.read(2000)
        words = " ".join(said.decode(errors="replace").split())[:300]
        words = f"HTTP {error.code}: " + (words.replace(self._key, "***") if self._key else words)
        where = f"--endpoint {self.endpoint.url}: "
        if error.code == 401:  # what the server says here may quote the key
            return UserError(
                f"{where}the key was refused (HTTP 401); set the environment variable {self.endpoint.key_variable} to a valid key"
            )
        if error.code in (404, 405) or error.code < 400:
            return UserError(
                f"{where}no model {self.endpoint.model!r} or no chat completions there ({words}); correct --model, "
                "or the address: most end in /v1"
            )
        if error.code in TRY_AGAIN or error.code >= 500:
            return _Later(words, _retry_after(error.headers.get("Retry-After")))
        return Failed(words)


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        plain = url.isascii() and url.isprintable() and " " not in url and "@" not in parts.netloc and not parts.query and parts.port != 0
    except ValueError:  # of the port, or of brackets
        return False
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname)


def _retry_after(value: str | None) -> float | None:
    """Seconds until the time that a Retry-After header gives, as a number or a date; None: it gives none."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (date - datetime.datetime.now(date.tzinfo)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def answer_text(reply: Any) -> str:
    """The text in a chat completion.

    Raises:
      ValueError: there is none.
    """
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("the reply is no chat completion") from None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"empty answer (finish_reason {choice.get('finish_reason')})")
    return text


def chat_body(request: Request, model: str) -> dict[str, Any]:
    """The JSON of a chat-completions call. No temperature: some models refuse the field, and a retry should differ.

    Raises:
      UserError: an image cannot be read.
    """
    inputs = len(request.images) - 1
    names = [f"Input image {i}:" if inputs > 1 else "Input image:" for i in range(1, inputs + 1)] + ["Output image:" if inputs > 0 else ""]
    content: list[dict[str, Any]] = []
    for name, path in zip(names, request.images, strict=False):  # a question about words alone has no image
        content += [{"type": "text", "text": name}] if name else []
        content.append({"type": "image_url", "image_url": {"url": data_url(path)}})
    content.append({"type": "text", "text": request.text})
    answer = {"name": request.kind, "strict": True, "schema": request.schema}
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": MAX_TOKENS,
        "response_format": {"type": "json_schema", "json_schema": answer},
    }


def data_url(path: Path) -> str:
    """An image file as a JPEG data: URL of at most MAX_SIDE pixels a side, colours at full resolution.

    Raises:
      UserError: the image cannot be read.
    """
    image = open_image(path)
    image.thumbnail((MAX_SIDE, MAX_SIDE), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_batch(
    requests: Iterable[Request], path: Path, model: str, *, max_bytes: int = 200_000_000, max_lines: int = 50_000
) -> list[Path]:  # fmt: skip
    """Writes requests as OpenAI batch files, for a hosted batch service or `vllm run-batch`.

    Args:
      path: of the first file; further ones are named STEM-2, STEM-3, ...
      max_bytes, max_lines: of one file; the defaults are OpenAI's limits.

    Returns:
      the files written.

    Raises:
      UserError: an image cannot be read, or a file cannot be written; files before it stay.
    """
    calls = ({"custom_id": r.key, "method": "POST", "url": "/v1/chat/completions", "body": chat_body(r, model)} for r in requests)
    lines = (json.dumps(call).encode() + b"\n" for call in calls)
    line = next(lines, None)
    paths: list[Path] = []
    while line is not None:
        part = path.with_stem(f"{path.stem}-{len(paths) + 1}") if paths else path
        with atomic_path(part) as temporary, temporary.open("wb") as file:
            count = 0
            while line is not None and count < max_lines and (not count or file.tell() + len(line) <= max_bytes):
                file.write(line)
                count += 1
                line = next(lines, None)
        paths.append(part)
    return paths


def batch_answers(paths: Sequence[Path]) -> Iterator[tuple[str, str, str, str]]:
    """(key, text, model, why there is no text) of every line of a batch's output and error files.

    Raises:
      UserError: naming the file and line that is no batch answer.
    """
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                        key, response = str(row["custom_id"]), row.get("response") or {}
                        body, status = response.get("body") or {}, response.get("status_code", 200)
                    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                        raise UserError(f"{path}, line {number}: no batch answer; give the output file of the batch, whole") from None
                    if row.get("error") or status != 200:
                        yield key, "", "", f"HTTP {status}: {json.dumps(row.get('error') or body)[:300]}"
                        continue
                    try:
                        yield key, answer_text(body), str(body.get("model", "")), ""
                    except ValueError as e:
                        yield key, "", "", str(e)
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(
                f"{path}: cannot read: {getattr(e, 'strerror', None) or 'not a text file'}; give a batch's output file"
            ) from None
