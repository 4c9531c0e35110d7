"""Refuse foreign web sites, oversized or slow bodies, and password guesses before any route runs.

A server on this machine answers only this machine's pages. Items of a body are counted before it is parsed,
because a parser builds an object for every item. The parser also builds an error for every wrong item.
"""

import asyncio
import contextlib
import re
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from smollm_jax.runtime.errors import say
from smollm_jax.serving.limits import LONGEST_PROMPT
from smollm_jax.serving.openai_errors import error_response

LARGEST_BODY = 13 * LONGEST_PROMPT  # bytes: a character may take 12 in JSON
LARGEST_FORM = 10_000  # bytes, for a login
MOST_OBJECTS = 3_000  # lists, objects and keys in a body. Lists of /v1 may have `LONGEST_PROMPT` items in all
HEAD_SECONDS, BODY_SECONDS = 10, 20  # for a client to send head and body
MOST_FAILURES, FAILURE_SECONDS = 10, 60  # wrong passwords or keys of a client within these seconds
MOST_CLIENTS = 10_000  # with recorded failures
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
# an unclosed string ends with the body, because trying each of its quotes again takes quadratic time
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
# all that the page and gradio_client need. Gradio also has uploads, files, proxies, recordings, a code editor
OPEN = re.compile(
    r"/gradio_api/(info|openapi\.json|user|login_check|token|app_id|startup-events|theme\.css|reset|cancel"
    r"|heartbeat/[^/]+|queue/(join|data|status)|run/predict|call/.+)/?"
)
API = ("/v1/", "/tokenize", "/detokenize")  # the routes for programs, which take long lists
Scope = dict[str, Any]


class Refused(Exception):
    """A request that is refused: status, reason and headers."""


@dataclass(frozen=True)
class Hosts:
    """Names that the server accepts as Host and Origin. `any_host` and `any_origin` accept every name."""

    names: frozenset[str] = LOCAL
    any_host: bool = False
    any_origin: bool = False
    shared: set[str] = field(default_factory=set, compare=False)  # names of a tunnel, known after it opens

    def check(self, headers: dict[bytes, bytes]) -> None:
        """Raise `Refused` unless a request comes from this server's page or from no page."""
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        asked = _name(f"//{host}")
        names = self.names | self.shared
        if host and not self.any_host and asked not in names:
            raise Refused(
                403, f"Host {host!r:.80} is not served here; start serve.py with --allow-hosts to add it"
            )
        if origin and not self.any_origin and _name(origin) not in {asked, *names}:
            raise Refused(403, f"Origin {origin!r:.80} may not use this server; --allow-hosts of serve.py adds it")


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


class Guard:
    """ASGI middleware that runs before all others."""

    def __init__(self, app: Any, hosts: Hosts):
        self.app, self.hosts = app, hosts
        self._failures: OrderedDict[tuple[str, bool], list[float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, guess = False, self._guess(scope)

        async def watched(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if message["status"] == 500 and scope["path"].startswith("/gradio_api/"):
                    message = message | {"status": 400}  # Gradio answers 500 to wrong requests
                if guess and message["status"] == (400 if guess[1] else 401):
                    self._failed(guess)
            await send(message)

        try:
            try:
                self._check(scope, guess)
                await self.app(scope, await _whole_body(scope, receive), watched)
            except Refused as refused:
                status, reason, *headers = refused.args
                await error_response(status, reason, *headers)(scope, receive, watched)
        except Exception as error:
            # an error of Gradio or a parser may quote the request, so the log has only its type and place
            say(f"{scope['method']} {scope['path'][:80]!r} failed: {place_of(error)}")
            if not started:
                with contextlib.suppress(Exception):  # the connection may take no answer
                    await error_response(500, "the server failed; its log says where")(scope, receive, send)

    def _check(self, scope: Scope, guess: tuple[str, bool] | None) -> None:
        self.hosts.check(dict(scope["headers"]))
        if scope["path"].startswith("/gradio_api/") and not OPEN.fullmatch(scope["path"]):
            raise Refused(403, "this is closed")
        recent = (
            [at for at in self._failures.get(guess, ()) if at > time.monotonic() - FAILURE_SECONDS]
            if guess
            else ()
        )
        if len(recent) >= MOST_FAILURES:
            wait = {"Retry-After": str(FAILURE_SECONDS)}
            raise Refused(429, f"{MOST_FAILURES} wrong tries came from here; wait {FAILURE_SECONDS} s", wait)

    def _guess(self, scope: Scope) -> tuple[str, bool] | None:
        """Return the client and whether the request is a login. None if no secret can be guessed."""
        is_login = scope["path"].rstrip("/") == "/login"
        client = (scope.get("client") or [""])[0]
        return (client, is_login) if is_login or scope["path"].startswith(API) else None

    def _failed(self, guess: tuple[str, bool]) -> None:
        self._failures[guess] = [*self._failures.pop(guess, ())[1 - MOST_FAILURES :], time.monotonic()]
        if len(self._failures) > MOST_CLIENTS:
            self._failures.popitem(last=False)


async def _whole_body(scope: Scope, receive: Any) -> Any:
    """Read the body within its limits, and return a `receive` that repeats it. Raises `Refused`."""
    body, more, headers = bytearray(), True, dict(scope["headers"])
    is_json = scope["path"].startswith((*API, "/gradio_api/"))
    largest = LARGEST_BODY if is_json else LARGEST_FORM
    too_long = Refused(413, f"the body is above {largest:,} bytes")
    announced = headers.get(b"content-length", b"0")
    if announced.isdigit() and (len(announced) > 20 or int(announced) > largest):
        raise too_long
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    break
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > largest:
                    raise too_long
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_SECONDS} s") from None
    if is_json and body:
        check_json(scope["path"], headers.get(b"content-type", b""), body)
    given = False

    async def again() -> Any:
        nonlocal given
        if given or more:
            return await receive() if given else {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return again


def check_json(path: str, content_type: bytes, body: bytes | bytearray) -> None:
    """Raise `Refused` unless a body declares JSON with few enough items to parse at once."""
    if path.startswith(API) and not re.match(rb"application/([\w.]+\+)?json\b", content_type.lower()):
        came = content_type.decode("latin-1")[:80] or "none"
        raise Refused(400, f"the body must be JSON: send Content-Type: application/json ({came!r} came)")
    if b"\0" in body:
        raise Refused(400, "the body must be JSON in UTF-8; a NUL byte came")
    signs = STRING.sub(b"", body)
    most_items = LONGEST_PROMPT if path.startswith(API) else MOST_OBJECTS
    objects = signs.count(b"[") + signs.count(b"{") + signs.count(b":")
    if objects > MOST_OBJECTS or signs.count(b",") > most_items:
        raise Refused(400, f"the JSON of the body has above {MOST_OBJECTS:,} objects or {most_items:,} items")


def place_of(error: BaseException) -> str:
    """Return type and line of an error, without anything that a client sent."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = f" in {Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}" if last else ""
    return f"{type(error).__name__}{where}"


class Impatient(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
    """A uvicorn protocol that closes a connection if a request's head takes too long."""

    def connection_made(self, transport: Any) -> None:
        self._timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_head()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._timer is not None:
            self._timer.cancel()

    def _wait_for_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)
