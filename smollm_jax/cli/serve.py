"""Serve a model: `smollm serve PATH`, or `python serve.py PATH`.

One process serves the page at /, Gradio's API at /generate, and OpenAI's at /v1. All requests share one queue.
The server fetches nothing from elsewhere, and reads or writes no file for a client.
"""

import os
import secrets
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from smollm_jax.cli.arguments import check_model
from smollm_jax.runtime.errors import UserError, install, one_line, require, say
from smollm_jax.serving import MOST_SLOTS, NEW_TOKENS, WAITING

ON_A_SPACE = "SPACE_ID" in os.environ  # set by Hugging Face, whose proxy is in front of the port


def serve(
    path: Annotated[str, tyro.conf.Positional] = "",
    *,
    backend: Literal["torch", "jax", "llama"] | None = None,
    host: str = "0.0.0.0" if ON_A_SPACE else "127.0.0.1",
    port: int = 7_860,
    allow_hosts: str = "",
    auth: str | None = None,
    auth_file: Path | None = None,
    api_key: str | None = None,
    api_key_file: Path | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    max_new_tokens: int = NEW_TOKENS,
    max_waiting: int = WAITING,
    slots: int | None = None,
    special_tokens: Literal["text", "parse"] | None = None,
    share: bool = False,
) -> int:
    """Serve a model as a page and an API, by default to this machine only.

    For example: smollm serve runs/quickstart

    Args:
        path: Exported folder, Hub id or run. Default: the folder "export" beside the program.
        backend: Default: llama (llama.cpp) for a GGUF file and torch for a folder, if installed, else jax.
        host: Address to listen on. 0.0.0.0 opens the page to the network.
        port: Port to listen on (0: any free port).
        allow_hosts: More host names under which pages may use the server, separated by commas (*: any).
        auth: USER:PASSWORD required by the page. Others on this machine can read flags: a file is better.
        auth_file: File that holds USER:PASSWORD. Default: the variable SMOLLM_JAX_AUTH.
        api_key: Key required by /v1. With a password the default is a random key, printed at the start.
        api_key_file: File that holds the key. Default: the variable SMOLLM_JAX_API_KEY.
        dtype: Compute dtype. auto: float32 on a CPU, bfloat16 elsewhere.
        max_new_tokens: Most new tokens per request.
        max_waiting: Most requests in the queue.
        slots: Most texts decoded together, by JAX alone. Each takes the cache of 2,048 tokens. Default: 8.
        special_tokens: Whether special tokens in a prompt stay text or become ids. Default: as in training.
        share: Open the page to the internet by a tunnel of Gradio's. Without a password it gets one.
    """
    check_numbers(port, slots)
    user, password = login(secret("auth", auth, auth_file))
    require(not (share and ON_A_SPACE), "--share: a Space is public already; leave it out")
    api_key = secret("api-key", api_key, api_key_file)
    folder = place_of(path)
    require(find_spec("gradio") is not None, f"the page needs gradio: {install('serve')}")
    # only now, so that --help and mistakes answer at once
    from smollm_jax.serving.app import build_app, for_all, hosts_of, listen, open_scheduler, run

    listening = listen(host, port)  # before the model is loaded, which may take minutes
    user, password = for_all(user, password) if share else (user, password)
    scheduler, name, facts = open_scheduler(
        folder, backend=backend, dtype=dtype, max_waiting=max_waiting, max_new_tokens=max_new_tokens,
        special_tokens=special_tokens, slots=slots,
    )  # fmt: skip
    hosts, pair = hosts_of(listening, host, allow_hosts, on_space=ON_A_SPACE), (user, password) if user else None
    app = build_app(scheduler, name, facts, auth=pair, api_key=key_for(user, api_key), hosts=hosts)
    run(app, listening, host, on_space=ON_A_SPACE, share=hosts if share else None)
    scheduler.close()
    return 0


def check_numbers(port: int, slots: int | None) -> None:
    """Raise `UserError` for a number out of range."""
    require(0 <= port < 2**16, f"--port {port} must lie in 0 to 65535")
    require(slots is None or 0 < slots <= MOST_SLOTS, f"--slots {slots} must lie in 1 to {MOST_SLOTS}")


def place_of(path: str) -> str:
    """Return the folder or Hub id to serve. Raises `UserError` if there is no such folder."""
    folder = path or str(Path(sys.argv[0]).parent / "export")
    require(bool(path) or Path(folder).is_dir(), "give the PATH of an exported folder, a Hub id or a run")
    check_model(folder)
    return folder


def login(auth: str | None) -> tuple[str, str]:
    """Return user and password, both empty if there are none; raises `UserError`."""
    user, _, password = (auth or "").partition(":")
    require(auth is None or bool(user and password), "--auth must read USER:PASSWORD")
    return user, password


def key_for(user: str, api_key: str | None) -> str | None:
    """Return the key of /v1: beside a password a new one, printed, unless it is given."""
    if user and api_key is None:
        api_key = secrets.token_urlsafe(24)
        say(f"API key for /v1: {api_key}")
    return api_key


def secret(name: str, given: str | None, file: Path | None) -> str | None:
    """Return a secret from its flag, file or environment variable. Raises `UserError` if it is empty."""
    variable, flag = f"SMOLLM_JAX_{name.upper().replace('-', '_')}", f"--{name}"
    require(given is None or file is None, f"give {flag} or {flag}-file, not both")
    if file is not None:
        flag = f"{flag}-file {file}"
        try:
            given = file.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"{flag} cannot be read: {one_line(error)}") from None
    elif given is None:
        flag, given = variable, os.environ.get(variable)
    require(given != "", f"{flag} is empty")
    return given
