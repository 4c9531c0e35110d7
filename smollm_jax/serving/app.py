"""The web app: the page, OpenAI's routes and the middleware that guards them, on one port."""

import contextlib
import os
import re
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from smollm_jax.runs.load import is_run
from smollm_jax.runtime.errors import UserError, say
from smollm_jax.serving.completion import Backend, Dtype, open_completer
from smollm_jax.serving.openai_api import add_routes, error_response
from smollm_jax.serving.scheduler import Scheduler
from smollm_jax.tokenizer.tokenizer import SpecialTokens

LARGEST_BODY = 4 * 2**20  # bytes; enough for a prompt that is too long to get an error naming its length
# whatever a model writes, the browser fetches nothing from elsewhere
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'"
# all that the page and gradio_client need; Gradio also has uploads, files, proxies, recordings and a code editor
OPEN = re.compile(
    r"/gradio_api/(info|openapi\.json|user|login_check|token|app_id|startup-events|theme\.css|reset|cancel"
    r"|heartbeat/[^/]+|queue/(join|data|status)|run/predict|call/.+)/?"
)


def open_scheduler(
    path: str, *, backend: Backend | None, dtype: Dtype, max_waiting: int, max_new_tokens: int,
    special_tokens: SpecialTokens | None = None,
) -> tuple[Scheduler, str]:  # fmt: skip
    """Load the model at `path`: its scheduler and its public name; raises `UserError`."""
    if backend is None:
        has_torch = all(find_spec(library) is not None for library in ("torch", "transformers"))
        backend = "torch" if has_torch and not is_run(path) else "jax"
    completer = open_completer(path, backend=backend, dtype=dtype, special_tokens=special_tokens)
    name = Path(path).resolve().name if Path(path).exists() else path
    if name == "export":  # the Space or the folder around it has a better name
        name = os.environ.get("SPACE_ID", Path(path).resolve().parent.name)
    print(f"{name}: {completer.about}; context {completer.context:,} tokens", file=sys.stderr, flush=True)
    say(completer.tokenizer.describe_special())
    return Scheduler(completer, max_waiting=max_waiting, max_new_tokens=max_new_tokens), name


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; raises `UserError` if the address is taken or unknown."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); give another --host or --port") from None


def build_app(scheduler: Scheduler, name: str, *, auth: tuple[str, str] | None, api_key: str | None) -> FastAPI:
    """Build the FastAPI app: the page at /, its API at /generate, and OpenAI's routes at /v1."""
    # Gradio reads these when it is imported, and would report to its makers
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # Gradio opens a client on import, which fails for a proxy or certificate that httpx cannot use; none is needed
    for variable in [key for key in os.environ if key.lower().endswith("_proxy") or key.startswith("SSL_CERT_")]:
        del os.environ[variable]
    import gradio as gr

    from smollm_jax.serving.page import SCRIPT, STYLE, build_page

    # FastAPI's documentation pages would load scripts from elsewhere
    app = FastAPI(title=name, docs_url=None, redoc_url=None)
    add_routes(app, scheduler, model=name, api_key=api_key)
    app.add_middleware(Guard)
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    theme = gr.themes.Default(primary_hue="teal", font=fonts, font_mono=("ui-monospace", "Consolas", "monospace"))
    page = build_page(scheduler, name, with_key=api_key is not None)
    return gr.mount_gradio_app(
        app, page, path="/", auth=auth, theme=theme, css=STYLE, js=SCRIPT, footer_links=["api"],
        run_history=False, ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
    )  # fmt: skip


def run(app: FastAPI, listening: socket.socket, host: str) -> None:
    """Print the address and serve until SIGINT or SIGTERM."""
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        app, headers=[("content-security-policy", POLICY)], log_level="warning", timeout_graceful_shutdown=3,
        limit_concurrency=512,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


class Guard:
    """ASGI middleware: no files through Gradio, and no body above `LARGEST_BODY`."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        read, announced = 0, dict(scope["headers"]).get(b"content-length", b"0")
        if scope["path"].startswith("/gradio_api/") and not OPEN.fullmatch(scope["path"]):
            return await JSONResponse({"detail": "this is closed"}, 403)(scope, receive, send)
        if announced.isdigit() and int(announced) > LARGEST_BODY:
            too_long = f"the body is above {LARGEST_BODY:,} bytes"
            return await error_response(413, too_long)(scope, receive, send)

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            return message if read <= LARGEST_BODY else {"type": "http.disconnect"}

        await self.app(scope, counted, send)
