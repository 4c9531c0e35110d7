"""Serve a model: `python serve.py PATH [--backend torch|jax] [--host 127.0.0.1] [--port 7860]`, or `smollm serve`.

Without PATH it serves the folder "export" beside this file, as on a Hugging Face Space.
"""

import sys

from smollm_jax.cli.arguments import parse_command
from smollm_jax.cli.main import run_and_leave
from smollm_jax.cli.serve import serve


def main() -> int:
    return parse_command(serve, sys.argv[1:], "serve.py")()


if __name__ == "__main__":
    run_and_leave(main)
