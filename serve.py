"""Serve a model: `python serve.py PATH [--backend torch|jax] [--host 127.0.0.1] [--port 7860]`.

PATH is an exported folder, a Hub id or a run. One process has it all: the page at /, Gradio's API at /generate,
OpenAI's at /v1. Every door leads to one worker, which serves in turn and checks every number. It listens on this
machine alone unless told otherwise, fetches nothing from elsewhere and lets no file in or out.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from smollm_jax.cli.arguments import parse_command
from smollm_jax.runtime.console import run_main
from smollm_jax.runtime.errors import require

if TYPE_CHECKING:
    from fastapi import FastAPI

    from smollm_jax.serving.scheduler import Scheduler

ON_A_SPACE = "SPACE_ID" in os.environ  # set by Hugging Face, whose proxy stands before the port
# whatever a model writes, the browser fetches nothing from elsewhere
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'"
# what the page and gradio_client need; Gradio has more: uploads, files, proxies, recordings, an editor of its code
OPEN = re.compile(
    r"/gradio_api/(info|openapi\.json|user|login_check|token|app_id|startup-events|theme\.css|reset|cancel"
    r"|heartbeat/[^/]+|queue/(join|data|status)|run/predict|call/.+)/?"
)


def serve(
    path: Annotated[str, tyro.conf.Positional] = "",
    *,
    backend: Literal["torch", "jax"] | None = None,
    host: str = "0.0.0.0" if ON_A_SPACE else "127.0.0.1",
    port: int = 7_860,
    auth: str | None = None,
    api_key: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    max_new_tokens: int = 2_048,
    max_waiting: int = 16,
) -> int:
    """Serve a model as a page and an API, to this machine only unless --host says otherwise.

    Args:
        path: Exported folder, Hub id or run; default: the folder "export" beside serve.py.
        backend: What computes; default: jax for a run, torch for a folder where it is installed, else jax.
        host: Address to listen on; 0.0.0.0 opens the page to the network.
        port: Port to listen on; 0: any that is free.
        auth: USER:PASSWORD that the page asks for.
        api_key: Key that /v1 asks for; with --auth one is made and shown where none is given.
        dtype: What is computed in; auto: float32 on a CPU, bfloat16 elsewhere.
        max_new_tokens: Longest text that a request may ask for.
        max_waiting: Requests that may wait; more are turned away.
    """
    require(0 <= port < 2**16, f"--port {port} must lie in 0 to 65535")
    user, _, password = (auth or "").partition(":")
    require(auth is None or bool(user and password), "--auth must read USER:PASSWORD")
    require(api_key != "", "--api-key is empty")
    folder = path or str(Path(__file__).parent / "export")
    require(bool(path) or Path(folder).is_dir(), "give the PATH of an exported folder, a Hub id or a run")
    require(find_spec("gradio") is not None, "the page needs gradio: pip install 'smollm-jax[serve]'")
    listening = listen(host, port)
    if auth and api_key is None:
        api_key = secrets.token_urlsafe(24)
        say(f"API key for /v1: {api_key}")
    worker, name = open_worker(folder, backend, dtype, max_new_tokens, max_waiting)
    app = build_app(worker, name, auth=(user, password) if auth else None, api_key=api_key)
    import uvicorn

    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3, limit_concurrency=512)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
    worker.close()
    return 0


def open_worker(
    path: str,
    backend: Literal["torch", "jax"] | None,
    dtype: Literal["auto", "float32", "bfloat16"],
    max_new_tokens: int,
    max_waiting: int,
) -> tuple[Scheduler, str]:
    """The model at `path` behind its worker, and the name it goes by; raises `ValueError` in one line."""
    from smollm_jax.runs.load import is_run
    from smollm_jax.serving.completion import open_completer
    from smollm_jax.serving.scheduler import Scheduler

    if backend is None:
        has_torch = find_spec("torch") is not None and find_spec("transformers") is not None
        backend = "torch" if has_torch and not is_run(path) else "jax"
    completer = open_completer(path, backend=backend, dtype=dtype)
    name = Path(path).resolve().name if Path(path).exists() else path
    if name == "export":  # whose, says the Space or the folder around it
        name = os.environ.get("SPACE_ID", Path(path).resolve().parent.name)
    say(f"{name}: {completer.about}; context {completer.context:,} tokens")
    return Scheduler(completer, max_waiting=max_waiting, max_new_tokens=max_new_tokens), name


def listen(host: str, port: int) -> socket.socket:
    """A socket on that address, before the model is loaded; raises `ValueError` where it is not to be had."""
    reason = None
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        reason = error
    require(False, f"cannot listen on {host}:{port} ({reason}); give another --host or --port")
    raise AssertionError("unreachable")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def build_app(worker: Scheduler, name: str, *, auth: tuple[str, str] | None, api_key: str | None) -> FastAPI:
    """The page at /, its API at /generate, and OpenAI's routes at /v1."""
    # Gradio would otherwise report home, when it is imported
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import gradio as gr
    from fastapi import FastAPI

    from smollm_jax.serving.openai_api import BodyLimit, add_routes
    from smollm_jax.serving.page import STYLE, build_page

    # FastAPI's own documentation pages load their scripts from elsewhere
    app = FastAPI(title=name, docs_url=None, redoc_url=None)
    add_routes(app, worker, model=name, api_key=api_key)
    app.add_middleware(Guard)
    app.add_middleware(BodyLimit)
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    theme = gr.themes.Default(primary_hue="teal", font=fonts, font_mono=("ui-monospace", "Consolas", "monospace"))
    return gr.mount_gradio_app(
        app,
        build_page(worker, name, with_key=api_key is not None),
        path="/",
        auth=auth,
        theme=theme,
        css=STYLE,
        footer_links=["api"],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )


class Guard:
    """ASGI middleware: no file goes in or out through Gradio, and the page may fetch from here alone."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from fastapi.responses import JSONResponse

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].startswith("/gradio_api/") and not OPEN.fullmatch(scope["path"]):
            return await JSONResponse({"detail": "this is closed"}, status_code=403)(scope, receive, send)

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        return await self.app(scope, receive, with_policy)


def main() -> int:
    return parse_command(serve, sys.argv[1:], "serve.py")()


if __name__ == "__main__":
    sys.exit(run_main(main))
