"""The whole app over an engine that waits: what Gradio keeps, computes and logs for clients that do not read."""

import contextlib
import json
import threading
import time

import pytest

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

from smollm_jax.serving import sessions  # noqa: E402 - they need gradio
from smollm_jax.serving.app import build_app, listen  # noqa: E402
from smollm_jax.serving.completion import Completer  # noqa: E402
from smollm_jax.serving.scheduler import Scheduler  # noqa: E402
from smollm_jax.tokenizer.load import train_tokenizer  # noqa: E402
from tests.serving.test_scheduler import Gated  # noqa: E402
from tests.support.server import TEXTS  # noqa: E402

CALL, ASKED = "/gradio_api/call/generate", ["O", 8, 1.0, 1.0, 0, 1.0, 1, None]


@contextlib.contextmanager
def served(engine):
    scheduler = Scheduler(Completer(engine, train_tokenizer(TEXTS, 300)), max_waiting=16, max_new_tokens=8)
    app = build_app(scheduler, "one", auth=None, api_key=None)
    page = app.routes[-1].app.get_blocks()
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=30) as client:
            yield scheduler, page, client
        server.should_exit = True
        for _ in range(99):
            engine.gate.release()
        thread.join(10)
        scheduler.close()


def until(condition):
    ends = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.02)


def test_events_that_nobody_reads_end_and_leave_nothing(monkeypatch):
    monkeypatch.setattr(sessions, "UNREAD_SECONDS", 0.5)
    with served(Gated()) as (scheduler, page, client):
        for i in range(5):
            assert client.post(CALL, json={"data": ASKED}).status_code == 200
            joined = {"data": ASKED, "fn_index": max(page.fns), "session_hash": f"visitor {i}"}
            assert client.post("/gradio_api/queue/join", json=joined).status_code == 200
        until(lambda: scheduler.waiting == 10)
        until(lambda: scheduler.waiting == 1)  # which is held up inside the engine
        scheduler.completer.engine.gate.release()
        until(lambda: scheduler.waiting == 0)
        queue = page._queue
        kept = (queue.pending_messages_per_session, queue.pending_event_ids_session, queue.event_ids_to_events)
        until(lambda: not any(kept))


def test_an_event_that_is_read_is_not_ended_however_long_it_waits(monkeypatch):
    monkeypatch.setattr(sessions, "UNREAD_SECONDS", 0.3)
    with served(Gated()) as (scheduler, _, client):
        event = client.post(CALL, json={"data": ASKED}).json()["event_id"]
        with client.stream("GET", f"{CALL}/{event}") as reply:
            time.sleep(1.5)
            assert scheduler.waiting == 1
            scheduler.completer.engine.gate.release()
            text = "".join(reply.iter_text())
        assert "event: complete" in text
        assert '"stop_reason": "length"' in text


def test_sessions_are_few_and_a_failed_event_logs_one_line(monkeypatch, capfd):
    monkeypatch.setattr(sessions, "MOST_SESSIONS", 5)
    with served(Gated()) as (_, page, client):
        forged = "secret\n2026-01-01 ERROR forged\x1b[31m"
        for _ in range(12):
            assert client.post(CALL, json={"data": [forged, 2]}).status_code == 200
        until(lambda: not page._queue.event_ids_to_events)
        assert len(page.state_holder.session_data) <= 6
    printed = capfd.readouterr().err
    assert printed.count("a request to the page failed") == 12
    assert not [word for word in ("forged", "secret", "\x1b", "Traceback") if word in printed]
    assert len(printed.splitlines()) < 20, json.dumps(printed)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("reset", '{"event_id": 1e999}'),  # no JSON can quote these two
        ("reset", '{"x": "\\ud800"}'),
        ("run/predict", '{"data": [], "fn_index": 99, "session_hash": "a"}'),
        ("run/predict", '{"data": ["secret"], "fn_index": 0, "session_hash": "a"}'),
        ("call/generate", '{"data": 1e999}'),
    ],
)
def test_what_gradio_does_not_take_is_the_clients_mistake(capfd, path, body):
    with served(Gated()) as (_, _, client):
        given = {"content": body, "headers": {"Content-Type": "application/json"}}
        answer = client.post(f"/gradio_api/{path}", **given)
        assert answer.status_code == 400
        assert "the page does not take this request" in answer.text
    printed = capfd.readouterr().err
    assert not [word for word in ("secret", "Traceback") if word in printed]
    assert len(printed.splitlines()) < 5


def test_a_components_own_error_is_not_printed_with_what_it_quotes(capfd):
    with served(Gated()) as (_, page, client):
        choice = next(
            i for i, event in page.fns.items() if type(event.inputs and event.inputs[0]).__name__ == "Radio"
        )
        asked = {"data": ["secret"], "fn_index": choice, "session_hash": "a"}
        client.post("/gradio_api/queue/join", json=asked).raise_for_status()
        until(lambda: not page._queue.event_ids_to_events)
    assert "secret" not in capfd.readouterr().err


def test_an_event_whose_session_is_gone_ends_without_a_traceback(capfd):
    """Such as one that `end_unread` ends between two steps of Gradio's queue."""
    with served(Gated()) as (scheduler, page, client):
        client.post(CALL, json={"data": ASKED}).raise_for_status()
        until(lambda: scheduler.waiting == 1)
        page._queue.pending_messages_per_session.clear()
        for _ in range(9):
            scheduler.completer.engine.gate.release()
        until(lambda: scheduler.waiting == 0)
        time.sleep(0.5)
    assert "Traceback" not in capfd.readouterr().err


def test_a_server_that_nobody_asks_computes_next_to_nothing():
    with served(Gated()) as (_, _, client):
        assert client.get("/config").status_code == 200  # which starts the loops of Gradio's queue
        time.sleep(1)
        spent = []
        for _ in range(3):  # the least, because tests before this one may have left a thread at work
            began = time.process_time()
            time.sleep(1)
            spent.append(time.process_time() - began)
        assert min(spent) < 0.02
