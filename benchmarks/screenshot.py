"""Photograph the page after one Continue: `python -m benchmarks.screenshot runs/quickstart`.

Needs the extra `test` and Debian's `chromium`, which is driven without a screen.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.harness.tables import ROOT, as_command
from smollm_jax.runtime.errors import require

SECONDS = 120
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def screenshot(
    path: Annotated[str, tyro.conf.Positional],
    *,
    out: Path = Path("docs/images/page.png"),
    prompt: str = "The following example",
    seed: int = 1,
    width: int = 1_280,
    height: int = 800,
    dark: bool = False,
) -> int:
    """Photograph the page after one Continue.

    Args:
        path: Run, exported folder or Hub id.
        out: PNG to write.
        prompt: Text to type.
        seed: Seed of the sampling.
        width: Width of the window in pixels.
        height: Height of the window in pixels.
        dark: Ask for the dark colours.
    """
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    require(chromium is not None, "there is no Chromium on this machine (apt-get install chromium)")
    command = [sys.executable, str(ROOT / "serve.py"), path, "--backend", "jax", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        require(url.startswith("http"), f"the server of {path} did not start")
        out.parent.mkdir(parents=True, exist_ok=True)
        window = {"viewport": {"width": width, "height": height}, "color_scheme": "dark" if dark else "light"}
        photograph(url, str(chromium), out, prompt=prompt, seed=seed, **window)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(SECONDS)
    print(json.dumps({"picture": str(out)}))
    return 0


def photograph(url: str, chromium: str, out: Path, *, prompt: str, seed: int, **window: Any) -> None:
    """Open the page, type `prompt`, press Continue, wait for the end of the text and take the picture."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(**window)
        page.set_default_timeout(SECONDS * 1_000)
        page.goto(url)
        page.wait_for_selector("[role=tab], #sheet textarea", state="attached")
        notebook = page.get_by_role("tab", name="Notebook")  # a model with a chat template opens on its chat
        if notebook.count():
            notebook.click()
        page.wait_for_function("() => document.querySelector('#continue')?.offsetParent")
        page.locator("#seed input, #seed textarea").first.fill(str(seed))
        page.fill("#sheet textarea", prompt)
        page.click("#continue")
        page.wait_for_function("() => /reached|ended/.test(document.querySelector('#status').innerText)")
        page.wait_for_timeout(500)  # of the page's transitions
        page.screenshot(path=str(out))
        browser.close()


if __name__ == "__main__":
    as_command(screenshot, "screenshot")
