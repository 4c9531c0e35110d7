"""The guard before every route, without a model: hosts, sizes, times, guesses and what is logged."""

import asyncio
import gc
import json
import socket
import sys
import threading
import time

import pytest

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

from smollm_jax.serving import app, guard  # noqa: E402
from smollm_jax.serving.app import hosts_of, listen, server_of  # noqa: E402
from smollm_jax.serving.guard import MOST_FAILURES, Guard, Hosts, Refused, check_json  # noqa: E402

JSON = b"application/json"


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt":"a","stop":[' + ",".join(["1"] * 200_000) + "]}",
        '{"prompt":[' + ",".join(["[]"] * 60_000) + "]}",
        "{" + ",".join(f'"k{i}":0' for i in range(20_000)) + "}",
        '{"prompt":"\\\\","stop":[' + ",".join(['"",[]'] * 60_000) + "]}",
        "[" * 50_000,
        '{"prompt":"a"}'.encode("utf-16").decode("latin-1"),
        '"' + '\\"' * 600_000 + '" [' + "[" * 4_000,
    ],
    ids=range(7),
)
def test_a_body_of_many_things_is_refused_in_milliseconds(body):
    started = time.perf_counter()
    with pytest.raises(Refused) as refused:
        check_json("/v1/completions", JSON, body.encode())
    assert refused.value.args[0] == 400
    assert time.perf_counter() - started < 0.2


@pytest.mark.parametrize("end", ["", "\\", '"'])
def test_a_text_of_many_quotes_is_counted_in_milliseconds(end):
    started = time.perf_counter()
    check_json("/v1/completions", JSON, b'"' + b'\\"' * 600_000 + end.encode())
    assert time.perf_counter() - started < 0.2


@pytest.mark.parametrize("start", ['{"stop":"', '{"stop":'])
def test_quotes_without_an_end_are_read_once(start):
    started = time.perf_counter()
    check_json("/v1/completions", JSON, (start + '"\\' * 20_000).encode())  # for the parser to refuse
    assert time.perf_counter() - started < 0.2
    with pytest.raises(Refused):
        check_json("/v1/completions", JSON, ("[" * 5_000 + '"\\' * 9).encode())


def test_a_text_may_hold_any_signs_and_a_prompt_many_ids():
    check_json("/v1/completions", JSON, json.dumps({"prompt": '[{,:"\\' * 10_000}).encode())
    check_json("/v1/completions", JSON, json.dumps({"prompt": [1] * 90_000}).encode())
    with pytest.raises(Refused):
        check_json("/gradio_api/call/generate", JSON, json.dumps({"data": [1] * 90_000}).encode())


@pytest.mark.parametrize("kind", [b"", b"application/x-www-form-urlencoded", b"text/plain", b"application/jsonx"])
def test_a_body_that_does_not_say_that_it_is_json_is_told_to(kind):
    with pytest.raises(Refused, match="Content-Type: application/json"):
        check_json("/v1/completions", kind, b"{}")
    check_json("/v1/completions", b"application/json; charset=utf-8", b"{}")


def listening_on(host, allowed="", on_space=False):
    with listen(host, 0) as listening:
        return hosts_of(listening, host, allowed, on_space=on_space)


@pytest.mark.parametrize(
    ("host", "origin", "good"),
    [
        ("127.0.0.1:7860", "", True),
        ("LocalHost:1", "http://localhost:2", True),
        ("[::1]:7860", "http://[::1]:7860", True),
        ("", "", True),  # HTTP/1.0, no browser
        ("evil.example:7860", "", False),
        ("x.localhost:7860", "http://x.localhost:7860", False),
        ("127.0.0.1.evil.example", "", False),
        ("127.0.0.1:7860", "http://evil.example", False),
        ("127.0.0.1:7860", "null", False),
        ("127.0.0.1:7860", "http://[::1", False),
    ],
)
def test_a_server_on_loopback_answers_its_own_pages_alone(host, origin, good):
    headers = {name: value.encode() for name, value in ((b"host", host), (b"origin", origin)) if value}
    hosts = listening_on("127.0.0.1")
    if good:
        return hosts.check(headers)
    with pytest.raises(Refused) as refused:
        hosts.check(headers)
    assert refused.value.args[0] == 403


def test_more_hosts_are_named_by_a_flag_and_a_space_has_any():
    proxied = {b"host": b"my.site", b"origin": b"https://my.site"}
    listening_on("127.0.0.1", "other, My.Site").check(proxied)
    listening_on("127.0.0.1", "*").check(proxied)
    listening_on("127.0.0.1", on_space=True).check(proxied)


def test_a_server_on_a_network_has_any_name_but_no_foreign_page():
    hosts = listening_on("0.0.0.0", "proxy.example")
    hosts.check({b"host": b"desk.lan:7860", b"origin": b"http://desk.lan:7860"})
    hosts.check({b"host": b"desk.lan:7860", b"origin": b"https://proxy.example"})
    with pytest.raises(Refused):
        hosts.check({b"host": b"desk.lan:7860", b"origin": b"http://evil.example"})


async def broken(*_):
    raise KeyError("a prompt\n2026-01-01 ERROR forged\x1b[31m")


def answering(status):
    async def app(_, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app


def ask(guarded, path, client="10.0.0.1", **options):
    async def post():
        transport = httpx.ASGITransport(guarded, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as asking:
            return await asking.post(path, **options)

    return asyncio.run(post())


@pytest.mark.parametrize(("path", "wrong"), [("/login", 400), ("/login/", 400), ("/v1/models", 401)])
def test_who_guesses_too_often_waits_and_nobody_else(path, wrong):
    guarded = Guard(answering(wrong), Hosts())
    codes = [ask(guarded, path).status_code for _ in range(MOST_FAILURES + 2)]
    assert codes == [wrong] * MOST_FAILURES + [429] * 2
    assert ask(guarded, path).headers["retry-after"]
    assert ask(guarded, path, client="10.0.0.2").status_code == wrong
    assert ask(guarded, "/config").status_code == wrong  # the page itself is not a guess


def test_a_request_does_not_wait_for_a_thread_that_traces_a_program(monkeypatch):
    """With Python's 5 ms between switches a request waits for up to 0.4 s beside the ladder of the full model."""
    seen = {}

    class Stands:
        def run(self, **_):
            seen.update(interval=sys.getswitchinterval(), frozen=gc.get_freeze_count())

    monkeypatch.setattr(app, "server_of", lambda *_, **__: Stands())
    before = sys.getswitchinterval()
    gc.unfreeze()
    try:
        with listen("127.0.0.1", 0) as listening:
            app.run(None, listening, "127.0.0.1")
    finally:
        sys.setswitchinterval(before)
    assert seen["interval"] <= 0.001
    assert seen["frozen"] > 10_000


@pytest.mark.parametrize("proxied", [False, True])
def test_nobody_gets_new_tries_by_naming_another_client(proxied):
    """Only a Space trusts X-Forwarded-For, and from the private addresses of its proxy alone."""
    config = server_of(Guard(answering(400), Hosts()), frames="'self'", proxied=proxied).config
    config.load()

    def last_code(client):
        named = [{"x-forwarded-for": f"198.51.100.{i}"} for i in range(MOST_FAILURES + 1)]
        return [ask(config.loaded_app, "/login", client, headers=one).status_code for one in named][-1]

    assert last_code("203.0.113.7") == 429
    assert last_code("10.0.0.9") == (400 if proxied else 429)


def test_those_who_are_right_are_not_counted(monkeypatch):
    guarded = Guard(answering(200), Hosts())
    assert {ask(guarded, "/login").status_code for _ in range(2 * MOST_FAILURES)} == {200}
    guarded.app = answering(400)
    assert [ask(guarded, "/login").status_code for _ in range(MOST_FAILURES + 1)][-1] == 429
    monkeypatch.setattr(guard, "FAILURE_SECONDS", 0)  # a minute later
    assert ask(guarded, "/login").status_code == 400


def test_whatever_fails_is_one_line_without_the_request(capsys):
    assert ask(Guard(broken, Hosts()), "/gradio_api/queue/join", json={"data": ["secret"]}).status_code == 500
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "KeyError in test_guard.py" in printed
    assert not [word for word in ("forged", "secret", "\x1b") if word in printed]


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    sent = []

    async def never():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "client": ("x", 1)}
    asyncio.run(Guard(answering(200), Hosts())(scope, never, send))
    assert sent[0]["status"] == 408


def test_a_connection_that_sends_half_a_head_is_closed(monkeypatch):
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.3)
    config = uvicorn.Config(answering(200), http=guard.Impatient, ws="none", log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        for sent in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTT"):
            with socket.create_connection(listening.getsockname(), timeout=3) as connection:
                connection.sendall(sent)
                while connection.recv(4_096):  # a timeout raises
                    pass
        server.should_exit = True
        thread.join(10)


def test_a_refusal_that_the_connection_does_not_take_is_one_line(capsys):
    """As after a broken chunk, which h11 has answered by closing."""

    async def closed(_):
        raise RuntimeError("can't handle event type Response when role=SERVER and state=MUST_CLOSE")

    scope = {"type": "http", "path": "/gradio_api/upload", "method": "POST", "headers": []}
    asyncio.run(Guard(answering(200), Hosts())(scope, None, closed))
    printed = capsys.readouterr().err
    assert printed.startswith("POST '/gradio_api/upload' failed: RuntimeError in test_guard.py:")
    assert printed.count("\n") == 1
