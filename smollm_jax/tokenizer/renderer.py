"""Render chat templates in a child process. A template comes with a model, and may not end.

The child ends itself when a template takes too long, also inside a single call. The child cannot take more memory
than allowed. The next conversation starts another child.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

from smollm_jax.runtime.errors import UserError
from smollm_jax.tokenizer.chat_template import Turns, render_chat

SECONDS, MEMORY_BYTES = 2, 2**30
LONGEST_TEXT = 1_000_000  # characters


class RenderingLimit(UserError):
    """A template that takes more time, memory or text than it may."""


class Renderer:
    """A child process that renders one conversation at a time. The first conversation starts it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, messages: Turns, names: dict[str, str]) -> str:
        """Return what `render_chat` returns. Raises `UserError` as `render_chat` does, and `RenderingLimit`."""
        with self._lock:
            child = self._child = self._child or _start()
            answer = ""
            if child.stdin and child.stdout:
                with contextlib.suppress(OSError):  # the child has ended
                    child.stdin.write(json.dumps([template, messages, names]) + "\n")
                    child.stdin.flush()
                    answer = child.stdout.readline()
            if not answer:
                self._end()
                limits = f"{SECONDS} s, {MEMORY_BYTES / 2**30:g} GiB or {LONGEST_TEXT:,} characters"
                raise RenderingLimit(f"the chat template takes more than {limits} for this conversation")
        text, refusal = json.loads(answer)
        if refusal is not None:
            raise UserError(refusal)
        return str(text)

    def close(self) -> None:
        """End the child, whatever it is doing."""
        if self._child is not None:
            self._child.kill()

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _start() -> "subprocess.Popen[str]":
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-m", __name__]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    # no limit counts its start
    if child.stdout is None or child.stdout.readline() != "ready\n":
        raise RuntimeError("the process that renders chat templates does not start")
    return child


def _serve() -> None:
    """Render the conversations of stdin, one a line, under limits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's alone
    pages = Path("/proc/self/statm")
    if pages.exists():  # elsewhere, time alone is limited
        most = int(pages.read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # its signal ends the process
        text, refusal = None, None
        try:
            text = render_chat(*json.loads(line))
        except UserError as error:
            refusal = str(error)
            if isinstance(error.__context__, MemoryError):
                return
        if text is not None and len(text) > LONGEST_TEXT:
            return
        answer = json.dumps([text, refusal])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
