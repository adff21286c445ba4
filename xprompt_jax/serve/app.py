"""The web server: one page, one drawing at a time, limits that are checked before anything is kept.

    GET  /                     the page, page.css, page.js; nothing is loaded from elsewhere
    GET  /api/about            the model and the limits
    GET  /api/tasks            the compiled prompts of the task folder
    GET  /api/compiled/{key}   a compiled prompt to keep
    POST /api/draw             a form -> lines of JSON, one event each, as they happen:
                               {"event": "queued", "ahead": n}  {"event": "compiled", ...}  {"event": "row", ...}  {"event": "done", ...}
                               {"event": "error", "error": line}

A request waits in a line, first come first served; a visitor who leaves loses his place, and his drawing stops at the next row.
Errors are {"error": one line} with status 400 (the visitor's), 403, 413 (too much), 503 (the line is full).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xprompt_jax.errors import UserError
from xprompt_jax.serve.studio import Order, Studio

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
UPLOAD_SECONDS = 120.0
"""How long a request's body may take."""
SEND_SECONDS, SEND_RATE = 30.0, 50_000
"""How long a visitor may take to read an event, and bytes a second besides: all others in line wait meanwhile."""
_MAX_FIELD = 16 * 1024  # bytes of a form field that is no file
_LINGER = 1.0  # seconds
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _Refused(Exception):
    """Answered with a status and one line."""

    def __init__(self, status: int, line: str):
        self.status, self.line = status, line


class _Line:
    """Who waits, in order; lives on the event loop's one thread."""

    def __init__(self, places: int):
        self._places, self._tickets, self._moved = places, list[object](), asyncio.Event()

    @property
    def full(self) -> bool:
        """Whether another request must be turned away."""
        return len(self._tickets) >= self._places

    def join(self) -> object:
        """A place at the end, until `leave`."""
        ticket = object()
        self._tickets.append(ticket)
        return ticket

    async def turns(self, ticket: object) -> AsyncIterator[int]:
        """How many are ahead, whenever that changes; ends when it is the ticket's turn."""
        while ahead := self._tickets.index(ticket):
            yield ahead
            await self._moved.wait()

    def leave(self, ticket: object) -> None:
        """Makes room; does nothing the second time."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            moved, self._moved = self._moved, asyncio.Event()
            moved.set()


class _Events(StreamingResponse):
    """A stream whose generator is closed when the visitor leaves or stops reading, so that its place in the line is free at once.

    The connection of one who stops reading stays until he closes it, with what was on its way.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]):
        super().__init__(events, media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def soon(message: Message) -> None:
            await asyncio.wait_for(send(message), SEND_SECONDS + len(message.get("body", b"")) / SEND_RATE)

        try:
            await super().__call__(scope, receive, soon)
        except (TimeoutError, ClientDisconnect):  # the latter where Starlette takes the former for a closed connection
            log.warning("a visitor did not read for %g s, and lost his place", SEND_SECONDS)
        finally:
            await self._events.aclose()


class _Guard:
    """Outermost: counts the bytes of a body as they arrive, refuses other sites' requests, adds headers."""

    def __init__(self, app: ASGIApp, max_bytes: int, hosts: Collection[str] | None):
        self._app, self._max_bytes, self._hosts = app, max_bytes, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, seen = Request(scope).headers, 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise _Refused(413, f"more than {self._max_bytes / 1e6:g} MB in one request; send fewer or smaller images")
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.lower().encode(), v.encode()) for k, v in _HEADERS.items())]
            await send(message)

        try:
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length) > self._max_bytes:
                raise _Refused(413, f"{int(length) / 1e6:.1f} MB in one request; this server takes {self._max_bytes / 1e6:g} MB")
            # A link to the page may stand anywhere.
            clicked = scope["method"] == "GET" and scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
            if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not clicked:
                raise _Refused(403, "another site's page may not use this server")
            if self._hosts is not None and _hostname(headers.get("host", "")) not in self._hosts:
                raise _Refused(403, f"this server answers to {', '.join(self._hosts)} only; start it with another --host")
            await self._app(scope, counted, with_headers)
        except _Refused as e:
            if e.status == 413:  # most clients listen only after they have sent, so what comes in a moment is thrown away
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(_discard(receive), _LINGER)
            answer = JSONResponse({"error": e.line}, e.status, {"Connection": "close"} if e.status in (408, 413) else None)
            await answer(scope, receive, with_headers)
        return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit("//" + host).hostname
    except ValueError:  # "[::1"
        return None


async def _discard(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass


def make_app(studio: Studio, *, hosts: Collection[str] | None = None) -> Starlette:
    """The application.

    Args:
      studio: draws.
      hosts: names under which a browser may reach the server; None allows all. Without this, a page elsewhere could have its name point
        here and read the answers (DNS rebinding).
    """
    line, uploads = _Line(studio.limits.queue), asyncio.Semaphore(studio.limits.queue)

    def page(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
        data = resources.files("xprompt_jax.serve").joinpath(name).read_bytes()

        async def answer(_: Request) -> Response:
            return Response(data, media_type=kind, headers={"Cache-Control": "no-cache"})

        return answer

    async def about(_: Request) -> Response:
        return JSONResponse(studio.about())

    async def tasks(_: Request) -> Response:
        return JSONResponse(await run_in_threadpool(studio.tasks))

    async def compiled(request: Request) -> Response:
        data = await run_in_threadpool(studio.download, request.path_params["key"])
        headers = {"Content-Disposition": 'attachment; filename="task.xprompt"'}
        return Response(data, media_type="application/octet-stream", headers=headers)

    async def draw(request: Request) -> Response:
        full = _Refused(503, f"{studio.limits.queue} requests are waiting already; try again in a moment")
        if line.full or uploads.locked():
            raise full
        async with uploads:  # not in line yet, or whoever sends slowly would hold up the others
            try:
                order = await asyncio.wait_for(_read_order(request, studio), UPLOAD_SECONDS)
            except TimeoutError:
                raise _Refused(408, f"the upload took more than {UPLOAD_SECONDS:g} s; send fewer or smaller images") from None
        if line.full:
            raise full
        return _Events(_events(studio, order, line, line.join()))

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, UserError)
        return JSONResponse({"error": str(error)}, 400)

    routes = [
        Route("/", page("page.html", "text/html")), Route("/page.css", page("page.css", "text/css")),
        Route("/page.js", page("page.js", "text/javascript")), Route("/api/about", about), Route("/api/tasks", tasks),
        Route("/api/compiled/{key}", compiled), Route("/api/draw", draw, methods=["POST"]),
    ]  # fmt: skip
    middleware = [Middleware(_Guard, max_bytes=int(studio.limits.upload_mb * 1e6), hosts=hosts)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={UserError: refused})


async def _read_order(request: Request, studio: Studio) -> Order:
    from python_multipart.exceptions import FormParserError

    most = studio.limits.images + 2
    try:
        async with request.form(max_files=most, max_fields=32, max_part_size=_MAX_FIELD) as form:
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            files: dict[str, list[bytes]] = {}
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    files.setdefault(name, []).append(await value.read())
    except ClientDisconnect:
        raise _Refused(400, "the upload was broken off") from None
    except (HTTPException, FormParserError) as e:  # the latter through older Starlette
        raise UserError(f"not a form that can be read ({getattr(e, 'detail', e)}); send at most {most} files") from None
    return await run_in_threadpool(studio.check, fields, files)


async def _events(studio: Studio, order: Order, line: _Line, ticket: object) -> AsyncGenerator[bytes, None]:
    encode: Callable[[dict[str, Any]], bytes] = lambda event: json.dumps(event).encode() + b"\n"
    try:
        async for ahead in line.turns(ticket):
            yield encode({"event": "queued", "ahead": ahead})
        events = studio.draw(order)
        while (event := await run_in_threadpool(next, events, None)) is not None:
            yield encode(event)
    except UserError as e:
        yield encode({"event": "error", "error": str(e)})
    except Exception:
        log.exception("drawing failed")
        yield encode({"event": "error", "error": "the server failed at this request; its log says why"})
    finally:
        line.leave(ticket)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
      UserError: no such address, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as e:  # the last of a name such as a..b
        raise UserError(f"--host {host} --port {port}: cannot listen: {getattr(e, 'strerror', None) or e}; choose another") from None


def serve(studio: Studio, listening: socket.socket, host: str) -> None:
    """Serves until it is told to stop."""
    app = make_app(studio, hosts=LOOPBACK if host in LOOPBACK else None)
    config = uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=3, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
