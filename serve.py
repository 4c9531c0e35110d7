"""Serve a model: `python serve.py PATH [--backend torch|jax] [--host 127.0.0.1] [--port 7860]`.

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

from smollm_jax.cli.arguments import parse_command
from smollm_jax.runtime.errors import require, run_main, say

ON_A_SPACE = "SPACE_ID" in os.environ  # set by Hugging Face, whose proxy is in front of the port


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
    special_tokens: Literal["text", "parse"] | None = None,
) -> int:
    """Serve a model as a page and an API, to this machine only unless --host says otherwise.

    Args:
        path: Exported folder, Hub id or run; default: the folder "export" beside serve.py.
        backend: Compute with PyTorch or JAX; default: jax for a run, torch for a folder if installed, else jax.
        host: Address to listen on; 0.0.0.0 opens the page to the network.
        port: Port to listen on; 0: any free port.
        auth: USER:PASSWORD required by the page.
        api_key: Key required by /v1; with --auth the default is a random key, printed at the start.
        dtype: Compute dtype; auto: float32 on a CPU, bfloat16 elsewhere.
        max_new_tokens: Most new tokens per request.
        max_waiting: Most requests in the queue; further requests are refused.
        special_tokens: Special tokens that a prompt or message spells out: stay text, or parse them to ids, as
            transformers does; default: as the run was trained, else text.
    """
    require(0 <= port < 2**16, f"--port {port} must lie in 0 to 65535")
    user, _, password = (auth or "").partition(":")
    require(auth is None or bool(user and password), "--auth must read USER:PASSWORD")
    require(api_key != "", "--api-key is empty")
    folder = path or str(Path(__file__).parent / "export")
    require(bool(path) or Path(folder).is_dir(), "give the PATH of an exported folder, a Hub id or a run")
    require(find_spec("gradio") is not None, "the page needs gradio: pip install 'smollm-jax[serve]'")
    # only now, so that --help and mistakes answer at once
    from smollm_jax.serving.app import build_app, listen, open_scheduler, run

    listening = listen(host, port)  # before the model is loaded, which may take minutes
    if auth and api_key is None:
        api_key = secrets.token_urlsafe(24)
        say(f"API key for /v1: {api_key}")
    scheduler, name = open_scheduler(
        folder, backend=backend, dtype=dtype, max_waiting=max_waiting, max_new_tokens=max_new_tokens,
        special_tokens=special_tokens,
    )  # fmt: skip
    app = build_app(scheduler, name, auth=(user, password) if auth else None, api_key=api_key)
    run(app, listening, host)
    scheduler.close()
    return 0


def main() -> int:
    return parse_command(serve, sys.argv[1:], "serve.py")()


if __name__ == "__main__":
    sys.exit(run_main(main))
