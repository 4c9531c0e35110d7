"""Serve a model from Python: a server in a thread, its page in the notebook's output."""

import copy
import os
import secrets
import socket
import sys
import threading
import time
from importlib.util import find_spec
from typing import Any

from smollm_jax.api.model import Model, load
from smollm_jax.api.process import as_found
from smollm_jax.runtime.errors import install, require, say
from smollm_jax.runtime.notebook import in_notebook
from smollm_jax.serving import NEW_TOKENS, WAITING

START_SECONDS, END_SECONDS = 60.0, 10.0
# pages that may show ours inside them: notebooks of this machine, Colab's outputs, VS Code
NOTEBOOKS = (
    "'self' http://localhost:* http://127.0.0.1:* https://colab.research.google.com "
    "https://*.googleusercontent.com https://*.colab.dev vscode-webview:"
)


class Server:
    """A running server: `url`, `share_url` if it is public, `auth` if it has a password, `close()`, `wait()`."""

    def __init__(
        self, model: Model, listening: socket.socket, host: str, *, url: str | None, share: bool,
        auth: tuple[str, str] | None, api_key: str | None,
    ):  # fmt: skip
        from smollm_jax.serving.app import build_app, hosts_of, server_of
        from smollm_jax.serving.completion import Completer
        from smollm_jax.serving.scheduler import Scheduler
        from smollm_jax.serving.share import Share

        address, port = listening.getsockname()[:2]
        self.url = url or f"http://{f'[{address}]' if ':' in address else address}:{port}"
        self.auth, self.api_key = auth, api_key
        self._share: Share | None = None
        # Colab's proxy, which alone reaches its machine, names other hosts
        hosts = hosts_of(listening, host, "", on_space=url is not None)
        own = model.completer  # the scheduler's thread must be the only user of what it decodes with
        completer = Completer(copy.copy(own.engine), own.tokenizer, own.about, own.stop_ids)
        self._scheduler = Scheduler(completer, max_waiting=WAITING, max_new_tokens=NEW_TOKENS)
        self._scheduler.try_chat()
        before = dict(os.environ)
        app = build_app(self._scheduler, model.name, auth=auth, api_key=api_key, hosts=hosts, root=url)
        # a server takes proxies and certificates out of the environment; the rest of a notebook needs them
        os.environ.update({name: value for name, value in before.items() if name not in os.environ})
        self._server = server_of(app, frames=NOTEBOOKS)
        run = self._server.run
        self._thread = threading.Thread(target=run, args=([listening],), name="server", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        if not self._server.started:
            self.close()
            raise RuntimeError(f"the server did not start within {START_SECONDS:.0f} s")
        local = "127.0.0.1" if address == "0.0.0.0" else address
        if share:
            self._share = Share(local, port, hosts)

    @property
    def share_url(self) -> str | None:
        """The public address; waits for it. None without share=True, or if the tunnel could not be opened."""
        return self._share.wait() if self._share is not None else None

    def wait(self) -> None:
        """Serve until an interrupt, then close."""
        try:
            while self._thread.is_alive():
                self._thread.join(0.5)
        except KeyboardInterrupt:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """End the server and its tunnel; a second call does nothing."""
        if self._share is not None:
            self._share.close()
        self._server.should_exit = True
        self._thread.join(END_SECONDS)
        self._scheduler.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Server({self.url!r}{'' if self._thread.is_alive() else ', closed'})"


def serve(
    model: Any, *, inline: bool | None = None, share: bool = False, auth: tuple[str, str] | None = None,
    api_key: str | None = None, host: str = "127.0.0.1", port: int = 0, height: int = 900,
) -> Server:  # fmt: skip
    """Serve a model (`Model`, `Run`, folder or Hub id) in a thread: page, API and OpenAI's routes.

    inline: show the page in the notebook's output, by default in every notebook. share: open the page to the
    internet by Gradio's tunnel; without `auth` (user and password) it gets a password. Port 0: any free port.
    The server ends with `close()` or with this process; a script waits for it by `wait()`. Raises `UserError`.
    """
    require(find_spec("gradio") is not None, f"the page needs gradio: {install('serve')}")
    require(not inline or in_notebook(), "inline=True shows the page in a notebook, and there is none")
    good = auth is None or (isinstance(auth, list | tuple) and len(auth) == 2 and all(map(_is_text, auth)))
    require(good, "auth must be (user, password), two texts that are not empty")
    require(api_key is None or _is_text(api_key), "api_key must be a text that is not empty")
    require(isinstance(port, int) and 0 <= port < 2**16, f"port={port!r} must lie in 0 to 65535")
    with as_found():
        from smollm_jax.serving.app import listen
        from smollm_jax.serving.share import for_all

        listening = listen(host, port)  # before the model is loaded, which may take minutes
        try:
            opened = model if isinstance(model, Model) else load(model)
            auth = for_all(*(auth or ("", ""))) if share else auth
            if auth and api_key is None:
                api_key = secrets.token_urlsafe(24)
                say(f"API key for /v1: {api_key}")
            url = _address_on_colab(listening.getsockname()[1])
            server = Server(
                opened, listening, host, url=url, share=share, auth=auth and (auth[0], auth[1]), api_key=api_key
            )
        except BaseException:
            listening.close()
            raise
    if in_notebook() if inline is None else inline:
        from IPython.display import IFrame, display

        display(IFrame(server.url, width="100%", height=height))
    return server


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _address_on_colab(port: int) -> str | None:
    """Return the address under which the browser reaches a port of Colab's machine; None elsewhere."""
    if "google.colab" not in sys.modules or not in_notebook():
        return None
    from google.colab.output import eval_js

    return str(eval_js(f"google.colab.kernel.proxyPort({port})")).rstrip("/")
