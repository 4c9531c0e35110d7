"""The routes for programs in this process, over a small model in a folder, on a port of this machine."""

import contextlib
import socket
import threading
import time

from smollm_jax.serving import ladder
from smollm_jax.serving.completion import open_completer
from smollm_jax.serving.openai_api import add_routes
from smollm_jax.serving.scheduler import Scheduler


@contextlib.contextmanager
def serving(folder, *, backend="jax", slots=3, api_key=None, **numbers):
    """The address of a server, and its scheduler. Programs are compiled when a request needs them."""
    import uvicorn
    from fastapi import FastAPI

    ahead, ladder.climb, first, ladder.first_rung = ladder.climb, _nothing, ladder.first_rung, _nothing
    limits = {"max_waiting": 8, "max_new_tokens": 200} | numbers
    completer = open_completer(folder, backend=backend)
    scheduler = Scheduler(completer, slots=slots, **limits)
    app = FastAPI()
    add_routes(app, scheduler, model="tiny", api_key=api_key)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", scheduler
    finally:
        server.should_exit = True
        thread.join(20)
        scheduler.close()
        ladder.climb, ladder.first_rung = ahead, first


def _nothing(*_, **__):
    pass
