"""Requests of every route, by the schema or against it, and bytes that are no request, to a server of its own."""

import json
import os
import random
import signal
import socket
import time
import urllib.request
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from smollm_jax.runtime.errors import require
from tests.fuzz.mutations import as_json, change_bytes, change_value, odd_value
from tests.fuzz.worker import LIMIT_SECONDS, Attempts
from tests.support.server import Server, export_model

WAIT_SECONDS = LIMIT_SECONDS - 2  # for an answer: the worker's own limit must not come first
STREAM_SECONDS = 0.3  # of an answer that goes on is looked at
BEYOND = (  # routes that no schema names
    "/", "/openapi.json", "/config", "/login", "/logout", "/theme.css", "/manifest.json", "/static/x",
    "/assets/../x", "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/queue/status",
    "/gradio_api/run/predict", "/gradio_api/call/generate", "/gradio_api/heartbeat/x", "/gradio_api/upload",
    "/gradio_api/file=/etc/passwd", "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/info",
    "/gradio_api/user", "/gradio_api/app_id", "/file=/etc/passwd", "/proxy=http://localhost/", "//",
    "/..%2f..%2fetc/passwd", "/%00", "/v1/../v1/models", "/v1/models/", "/v1/%ff", "/docs",
    "/v1/completions?x=%00&x=1", "/gradio_api/dev/reload", "/gradio_api/startup-events", "*", "x",
)  # fmt: skip
METHODS = ("GET", "POST", "POST", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "BREW", "get", "")
SOUND_BODIES: dict[str, Any] = {
    "/v1/completions": {
        "prompt": "Once", "max_tokens": 2, "temperature": 0.5, "stop": ["x"], "stream": True, "seed": 1,
    },
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 2, "top_p": 0.9,
        "stream_options": {"include_usage": True}, "stream": True,
    },
    "/gradio_api/call/generate": {"data": ["Once", 2, 0.6, 0.9, 50, 1.1, 1, ["x"]]},
    "/gradio_api/queue/join": {"data": ["Once", [], 0.6, 0.9, 50, 1.1, 2, ""], "fn_index": 1, "session_hash": "a"},
    "/gradio_api/run/predict": {"data": ["Once"], "fn_index": 0, "session_hash": "a"},
    "/gradio_api/cancel": {"session_hash": "a", "fn_index": 0, "event_id": "b"},
    "/gradio_api/reset": {"event_id": "b"},
}  # fmt: skip
HEADERS = (
    b"Content-Type: text/plain", b"Content-Type: application/json; charset=utf-16", b"Content-Type: \xff",
    b"Accept: ", b"Content-Type: multipart/form-data", b"Content-Type: multipart/form-data; boundary=a", b"Origin: http://evil.example",
    b"Host: evil.example", b"Host: ", b"Host: localhost:99999999", b"Host: [::1", b"Origin: null",
    b"Cookie: a=\xff; ;=", b"Authorization: Bearer \xff", b"Authorization: Basic !", b"X-Forwarded-For: x",
    b"X-Forwarded-Proto: gopher", b"Content-Length: -1", b"Content-Length: 5",
    b"Content-Length: 99999999999999999999", b"Content-Length: 1e3", b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip", b"Expect: 100-continue", b"Upgrade: websocket", b"Connection: Upgrade",
    b"Range: bytes=0-99999999999", b"Accept-Encoding: gzip;q=x", b"Accept-Language: " + b"a," * 3_000,
    b"x-gradio-user: app", b"x-gradio-target: http://evil.example", b"x" * 70_000 + b": 1", b": 1", b"a\0b: 1",
    b"no colon", b" folded: 1", b"Content-Encoding: gzip", b"If-None-Match: *", b"Sec-WebSocket-Key: a",
    b"x-ip-token: \x80",
)  # fmt: skip


def value_of(rng: random.Random, schema: Any, parts: dict[str, Any], depth: int = 0) -> Any:
    """Return a value that a JSON schema allows, or now and then any other."""
    schema = schema if isinstance(schema, dict) else {}
    if "$ref" in schema:
        schema = parts.get(schema["$ref"].rsplit("/", 1)[-1], {})
    choices = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if depth > 8 or rng.random() < 0.08:
        return odd_value(rng)
    if choices:
        return value_of(rng, rng.choice(choices), parts, depth + 1)
    if "const" in schema or "enum" in schema:
        return rng.choice(schema.get("enum") or [schema.get("const")])
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        held, needed = schema.get("properties", {}), schema.get("required", ())
        names = [name for name in held if name in needed or rng.random() < 0.4]
        return {name: value_of(rng, held[name], parts, depth + 1) for name in names}
    if kind == "array":
        return [value_of(rng, schema.get("items"), parts, depth + 1) for _ in range(rng.choice([0, 1, 2, 9]))]
    plain = {
        "string": ["", "a", "Once upon", "é🦀", "</s><|im_end|>", "x" * 2_000, "\0"],
        "integer": [0, 1, -1, 2, 50, 2**63], "number": [0, 0.5, 1, 1.5, -1, 1e308],
        "boolean": [True, False], "null": [None],
    }  # fmt: skip
    return rng.choice(plain[str(kind)]) if str(kind) in plain else odd_value(rng)


class Exchange:
    """One connection: sends bytes, and reads an answer."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS)

    def ask(self, content: bytes, *, ends: bool) -> tuple[int | None, bytes]:
        """Return status and body of the answer; None if the server closes the connection without one."""
        with self.socket, suppress(ConnectionError):
            with suppress(OSError):  # it may answer before it has read all
                self.socket.sendall(content)
                if ends:
                    self.socket.shutdown(socket.SHUT_WR)
            return self._answer()
        return None, b""

    def _answer(self) -> tuple[int | None, bytes]:
        answer, until = b"", time.monotonic() + WAIT_SECONDS
        while time.monotonic() < until:
            head, _, body = answer.partition(b"\r\n\r\n")
            if b"text/event-stream" in head and b"\r\n\r\n" in answer:
                self.socket.settimeout(STREAM_SECONDS)
            try:
                more = self.socket.recv(2**16)
            except TimeoutError:
                if self.socket.gettimeout() == STREAM_SECONDS:
                    break
                raise AssertionError(f"no answer within {WAIT_SECONDS:g} s: {answer[:100]!r}") from None
            except ConnectionError:
                more = b""
            answer += more
            if not more or len(answer) > 2**22:
                break
        head, _, body = answer.partition(b"\r\n\r\n")
        words = head.split()
        return (int(words[1]) if len(words) > 1 and words[1].isdigit() else None), body


class Requests:
    """A server over a tiny chat model, and cases that are a request each, or a few of one conversation."""

    def __init__(self, base: Path) -> None:
        sound = base / "sound"
        sound.mkdir(exist_ok=True)
        model = sound / "tiny" if (sound / "tiny").exists() else export_model(sound)
        self.server = Server(
            model, "--max-new-tokens", "4", "--max-waiting", "8", "--backend", os.environ.get("FUZZ_BACKEND",
            "torch")
        )  # fmt: skip
        self.port, self.read = urlsplit(self.server.url).port or 0, 0
        self.routes: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, Any] = {}
        for where in ("/openapi.json", "/gradio_api/openapi.json"):
            with urllib.request.urlopen(self.server.url + where, timeout=30) as answer:
                schema = json.load(answer)
            self.parts |= schema.get("components", {}).get("schemas", {})
            self.routes |= schema["paths"]

    def case(self, rng: random.Random | None, *_: Path) -> tuple[str, Attempts]:
        if rng is None:
            return "nothing", [("sound requests", self.sound)]
        content, told, ends = self.request(rng)
        attempts: Attempts = [("request", partial(self.send, content, ends))]
        if rng.random() < 0.05:
            attempts.append(("a sound request afterwards", self.sound))
        return told, attempts

    def request(self, rng: random.Random) -> tuple[bytes, str, bool]:
        """Return the bytes of a request, what it is, and whether the client ends its side after it."""
        ours = [path for path in SOUND_BODIES if path.startswith("/v1/")]
        path = rng.choice(rng.choice([ours, ours, [*SOUND_BODIES], [*SOUND_BODIES], [*self.routes], [*BEYOND]]))
        operations = self.routes.get(path, {})
        method = (
            rng.choice(list(operations)).upper() if operations and rng.random() < 0.85 else rng.choice(METHODS)
        )
        if path in SOUND_BODIES and rng.random() < 0.9:
            method = "POST"
        body, told = self.body(rng, path, operations.get(method.lower(), {}))
        for name in ("{event_id}", "{session_hash}", "{event_id_or_path}", "{path}", "{api_name}", "{fn_index}"):
            path = path.replace(
                name, rng.choice(["x", "generate", "", "%00", "..", "é", "a" * 3_000, "%2e%2e%2f"])
            )
        if "queue/data" in path:
            path += rng.choice(["?session_hash=x", "?session_hash=", "", "?session_hash=%00"])
        headers = [b"Host: 127.0.0.1", b"Connection: close"]
        if rng.random() < 0.9:
            headers.append(b"Content-Type: application/json")
        headers += [b"Content-Length: %d" % len(body)] if rng.random() < 0.97 else []
        extra = [rng.choice(HEADERS) for _ in range(rng.choice([0, 0, 0, 0, 1, 2]))]
        rng.shuffle(headers)
        target = path.encode("utf-8", "surrogatepass")
        content = b"%b %b HTTP/1.1\r\n%b\r\n\r\n%b" % (
            method.encode(),
            target,
            b"\r\n".join(extra + headers),
            body,
        )
        told = f"{method} {path[:80]!a} {told} {[line[:50] for line in extra]}"
        if rng.random() < 0.06:
            content, what = change_bytes(rng, content)
            return content, f"{told}; {what}", True
        lengthy = (b"Content-Length", b"Transfer-Encoding", b"Expect", b"Upgrade", b"Connection")
        is_unsure = bool(body) and b"Content-Length: %d" % len(body) not in headers
        return content, told, is_unsure or any(line.startswith(lengthy) for line in extra)

    def body(self, rng: random.Random, path: str, operation: Any) -> tuple[bytes, str]:
        """Return a body by the schema, a sound one changed, or odd bytes."""
        media = next(iter(operation.get("requestBody", {}).get("content", {}).values()), {}) if operation else {}
        kind = rng.choice(
            ["schema", "changed", "changed", "changed", "changed", "changed", "odd", "bytes", "many", "none"]
        )
        if kind == "many":
            item = rng.choice(["1,", "[],", '{"a":1},', '"a",', "null,", "[" * 900 + "]" * 900 + ","])
            held = "[" + item * rng.choice([10, 900, 20_000]) + "1]"
            name = rng.choice(["prompt", "stop", "data", "messages", "user", "x"])
            body = f'{{"prompt": "a", "{name}": {held}}}'.encode()
            return body, f"many {item[:9]} in {name}"
        if kind in ("odd", "bytes", "none"):
            odd = (
                as_json(odd_value(rng)).encode() if kind == "odd" else bytes(rng.randrange(256) for _ in range(99))
            )
            return (b"" if kind == "none" else odd), f"{kind} {odd[:30]!r}"
        sound = SOUND_BODIES.get(path)
        if kind == "changed" and sound is not None:
            value, what = json.loads(json.dumps(sound)), []
            if "fn_index" in value:
                value |= {"fn_index": rng.randrange(40), "session_hash": rng.choice(["a", "x", str(rng.random())])}
            for _ in range(rng.choice([0, 0, 1, 1, 1, 2, 3])):
                value, changed = change_value(rng, value)
                what.append(changed)
        else:
            value, what = (
                value_of(rng, media.get("schema") or rng.choice([*self.parts.values(), {}]), self.parts),
                ["schema"],
            )
        body = as_json(value).encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            body, cut = change_bytes(rng, body)
            what.append(cut)
        return body, f"{', '.join(what)} {body[:120]!r}"

    def send(self, content: bytes, ends: bool) -> None:
        """Send a request, and look at its answer and at the log."""
        status, body = Exchange(self.port).ask(content, ends=ends)
        assert self.server.process.poll() is None, "the server has ended"
        assert status is None or status < 500, f"status {status}: {body[:300]!r}; {self.logged()[-500:]}"
        told = self.logged()
        assert "Traceback" not in told, told[-2_500:]
        require(status is not None and status < 400, f"refused with {status}")

    def logged(self) -> str:
        with self.server.log.open("rb") as log:
            log.seek(self.read)
            told = log.read()
        self.read += len(told)
        return told.decode("utf-8", "replace")

    def sound(self) -> None:
        """Ask what must be answered with 200, whatever came before; a full queue may be asked again."""
        for path in ("/v1/completions", "/v1/chat/completions"):
            asked = {name: value for name, value in SOUND_BODIES[path].items() if not name.startswith("stream")}
            body = json.dumps(asked)
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            content = f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            for _ in range(20):
                status, answer = Exchange(self.port).ask(content, ends=False)
                if status != 429:
                    break
                time.sleep(0.2)
            assert status == 200, f"{status} {answer[:300]!r}"
            assert b'"choices"' in answer
        assert "Traceback" not in (told := self.logged()), told[-2_500:]

    def close(self) -> None:
        self.sound()
        self.server.process.send_signal(signal.SIGINT)
        self.server.process.wait(30)


TARGET = Requests
