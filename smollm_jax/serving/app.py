"""The web app on one port: page, OpenAI's routes and the middleware that guards them."""

import asyncio
import contextlib
import gc
import ipaddress
import os
import socket
import sys
from collections.abc import AsyncGenerator
from importlib.util import find_spec
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from smollm_jax.hf.reader import is_gguf
from smollm_jax.runs.load import is_run, newest_step
from smollm_jax.runtime.errors import UserError, one_line, require, say
from smollm_jax.serving import SLOTS
from smollm_jax.serving.completion import Backend, Dtype, open_completer
from smollm_jax.serving.facts import Facts, read_facts
from smollm_jax.serving.guard import LOCAL, Guard, Hosts, Impatient
from smollm_jax.serving.openai_api import add_routes
from smollm_jax.serving.scheduler import Scheduler
from smollm_jax.serving.share import Share, for_all
from smollm_jax.serving.weights import Weights
from smollm_jax.tokenizer.tokenizer import SpecialTokens

__all__ = ["build_app", "for_all", "hosts_of", "listen", "open_scheduler", "run", "server_of"]
# the browser fetches nothing from other sites, whatever text a model writes
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'"
# contrast of at least 4.5 to 1 (WCAG AA), because Gradio's own colours have less
COLOURS = {
    "body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300",
    "input_placeholder_color": "*neutral_500", "input_placeholder_color_dark": "*neutral_400",
    "block_label_text_color": "*neutral_700", "block_title_text_color": "*neutral_700",
    "button_primary_background_fill": "*primary_700", "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
    "button_cancel_background_fill": "#b91c1c", "button_cancel_background_fill_hover": "#991b1b",
}  # fmt: skip
PROXIES = "127.0.0.1,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16"  # of a Space, which append the client's address
# of Python's lock, a fifth of the default: a thread that traces a program made a request wait for up to 0.4 s
SWITCH_SECONDS = 0.001
# a lost client: three probes after half a minute of silence. A client that no longer reads: one minute
KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}


def open_scheduler(
    path: str, *, backend: Backend | None, dtype: Dtype, max_waiting: int, max_new_tokens: int,
    special_tokens: SpecialTokens | None = None, slots: int | None = None,
) -> tuple[Scheduler, str, Facts]:  # fmt: skip
    """Load the model at `path` and return its scheduler, public name and facts. Raises `UserError`."""
    if backend is None:
        backend = default_backend(path)
    run = Path(path).expanduser() if is_run(path) else None
    step = newest_step(run) if run else None
    completer = open_completer(path, backend=backend, dtype=dtype, special_tokens=special_tokens, step=step)
    name = Path(path).resolve().name if Path(path).exists() else path
    if name in ("export", "export-ema"):  # the Space or the parent folder has a better name
        name = os.environ.get("SPACE_ID", Path(path).resolve().parent.name)
    say(f"{name}: {completer.about}; context {completer.context:,} tokens")
    weights = Weights(completer.engine, run=run, step=step, rebuild=completer.rebuild)
    numbers = {"max_waiting": max_waiting, "max_new_tokens": max_new_tokens}
    scheduler = Scheduler(completer, **numbers, weights=weights, slots=SLOTS if slots is None else slots)
    together = scheduler.turns.count
    other = f"--slots {slots}: this back end decodes one text at a time; give --backend jax, or leave it out"
    require(slots in (None, together), other)
    if scheduler.turns.slots is not None:
        most = scheduler.turns.slots.cache_bytes / 2**30
        say(f"decodes up to {together} texts together; their caches take {most:.1f} GiB at most")
    say(completer.tokenizer.describe_special())
    scheduler.try_chat()
    return scheduler, name, read_facts(path, completer.num_parameters, has_chat=scheduler.has_chat, step=step)


def default_backend(path: str) -> Backend:
    """Return the back end that serves `path`: what is installed and fastest for it. JAX opens everything."""
    if is_gguf(path):
        return "llama" if _loads_llama() else "jax"
    has_torch = all(find_spec(library) is not None for library in ("torch", "transformers"))
    return "torch" if has_torch and not is_run(path) else "jax"


def _loads_llama() -> bool:
    """Return whether llama.cpp's library is installed and can be loaded."""
    if find_spec("llama_cpp") is None:
        return False
    try:
        import llama_cpp  # noqa: F401
    except Exception as error:  # of the loader of shared libraries, any
        say(f"llama-cpp-python is installed and cannot be loaded ({one_line(error)}); JAX serves instead")
        return False
    return True


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises `UserError` if the address is taken or unknown."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); give another --host or --port") from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # connections inherit the options
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):  # not on every system
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return listening


def hosts_of(listening: socket.socket, host: str, allowed: str, *, on_space: bool) -> Hosts:
    """Return the host names that the server accepts. `allowed` adds names, or * for any name."""
    more = {name.strip().lower().strip("[]") for name in allowed.split(",")} - {""}
    if on_space or "*" in more:
        return Hosts(any_host=True, any_origin=True)
    if ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        return Hosts(LOCAL | {host.lower()} | more)
    return Hosts(frozenset(more), any_host=True)


def build_app(
    scheduler: Scheduler,
    name: str,
    facts: Facts | None = None,
    *,
    auth: tuple[str, str] | None,
    api_key: str | None,
    hosts: Hosts | None = None,
    root: str | None = None,
) -> FastAPI:
    """Build the FastAPI app: page at /, its API at /generate, OpenAI's routes at /v1.

    `root` is the address of the page, needed if a proxy does not send it.
    """
    # Gradio reads these on import. By default it sends telemetry and keeps statistics of each request
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ |= {"GRADIO_ANALYTICS_MAX_EVENTS": "1", "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(2**60)}
    # on import Gradio opens a client, which fails if httpx cannot use a proxy or certificate. Neither is needed
    for variable in [key for key in os.environ if key.lower().endswith("_proxy") or key.startswith("SSL_CERT_")]:
        del os.environ[variable]
    import gradio as gr

    from smollm_jax.serving.page import SCRIPT, STYLE, build_page
    from smollm_jax.serving.sessions import end_unread, keep_little, refuse_clearly

    @contextlib.asynccontextmanager
    async def ending_unread(_: FastAPI) -> AsyncGenerator[None, None]:
        task = asyncio.create_task(end_unread(page, scheduler))
        yield
        task.cancel()

    # FastAPI's documentation pages would load scripts from other sites
    app = FastAPI(title=name, docs_url=None, redoc_url=None, lifespan=ending_unread)
    add_routes(app, scheduler, model=name, api_key=api_key)
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    theme = gr.themes.Default(primary_hue="teal", font=fonts, font_mono=("ui-monospace", "Consolas", "monospace"))
    theme.set(**COLOURS)
    page = build_page(scheduler, name, with_key=api_key is not None, facts=facts)
    keep_little(page)
    gr.mount_gradio_app(
        app, page, path="/", auth=auth, root_path=root, theme=theme, css=STYLE, js=SCRIPT, footer_links=[],
        run_history=False, ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
    )  # fmt: skip
    refuse_clearly(app.routes[-1].app)  # type: ignore[attr-defined]
    app.add_middleware(Guard, hosts=hosts or Hosts())  # added last, so it runs before Gradio's middleware
    return app


def run(
    app: FastAPI, listening: socket.socket, host: str, *, on_space: bool = False, share: Hosts | None = None
) -> None:
    """Print the address and serve until SIGINT or SIGTERM. `share` opens a tunnel and receives its name."""
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listening.getsockname()[1]}", flush=True)
    say("open it in a browser; Ctrl-C ends the server")
    server = server_of(app, frames="" if on_space else "'self'", proxied=on_space)
    gc.freeze()  # else a request of many lists makes the collector scan all libraries: everyone waits a second
    sys.setswitchinterval(SWITCH_SECONDS)
    address, port = listening.getsockname()[:2]
    local = "127.0.0.1" if address == "0.0.0.0" else address
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as ending:
        if share is not None:
            ending.callback(Share(local, port, share).close)
        server.run(sockets=[listening])


def server_of(app: FastAPI, *, frames: str, proxied: bool = False) -> uvicorn.Server:
    """Return a server of the app. `frames` are the pages that may embed its page, any if empty.

    `proxied` is for a Space, which a page of Hugging Face embeds. Hugging Face's proxy names the client.
    """
    policy = f"{POLICY}; frame-ancestors {frames}" if frames else POLICY
    config = uvicorn.Config(
        app, headers=[("content-security-policy", policy)], log_level="error", timeout_graceful_shutdown=3,
        limit_concurrency=512, http=Impatient, ws="none", proxy_headers=proxied, forwarded_allow_ips=PROXIES,
    )  # fmt: skip
    return uvicorn.Server(config)
