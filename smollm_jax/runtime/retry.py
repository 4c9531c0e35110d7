"""Retry requests to the Hugging Face Hub that may succeed when repeated."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from smollm_jax.runtime.errors import SourceTimeout, one_line

T = TypeVar("T")
logger = logging.getLogger(__name__)

WAYS_OUT = "without the Hub use local files (--data 'FILES' --tokenizer FOLDER) or --recipe quickstart"
FRESH_SECONDS = 8.0  # a new run waits this long for a first answer, a resumed run --data-timeout
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 20.0
PASSING = (408, 425, 429)  # HTTP status codes below 500 that may pass: timeout, too early, too many requests


def be_quiet() -> None:
    """Silence the libraries' own reports of retries: `retry` logs one line per wait."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()


def request_seconds() -> float:
    """Return the seconds after which a silent request is given up: HF_HUB_DOWNLOAD_TIMEOUT, by default 10."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def retry(ask: Callable[[], T], name: str, patience: float, closed: threading.Event) -> T:
    """Return `ask()`. Repeats it while its failure may pass, and logs every wait.

    Raises `SourceTimeout` after `patience` seconds, or once `closed` is set. Raises any other failure at once.
    """
    began, wait = time.monotonic(), FIRST_WAIT_SECONDS
    while True:
        try:
            return ask()
        except Exception as error:
            if not may_pass(error):
                raise
            silent = time.monotonic() - began
            if silent >= patience:
                raise SourceTimeout(f"{name} has not answered for {silent:.0f} s ({one_line(error)})") from None
            pause = min(max(wait, _asked_to_wait(error)), max(patience - silent, 0.0))
            logger.warning("waiting for %s: %s; trying again in %.1f s", name, one_line(error), pause)
            if closed.wait(pause):
                raise SourceTimeout(f"{name}: closed while waiting") from None
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def download_snapshot(repo: str, patterns: Iterable[str], *, patience: float = FRESH_SECONDS) -> Path:
    """Download the files of a model repository that match `patterns`, and return their folder.

    If the Hub does not answer, falls back to the cache, else retries for `FRESH_SECONDS`. A broken download is
    resumed until `patience` seconds have passed. Raises `SourceTimeout`, or the error of huggingface_hub for a
    request that no retry helps.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    # one plain request first: the download would hide a Hub that is down behind minutes of retries
    ask = partial(HfApi().model_info, repo, timeout=request_seconds())
    get = partial(snapshot_download, repo, allow_patterns=list(patterns), etag_timeout=request_seconds())
    try:
        ask()
    except Exception as error:
        if not may_pass(error) and not isinstance(error, OfflineModeIsEnabled):
            raise
        try:
            return Path(get(local_files_only=True))
        except LocalEntryNotFoundError:
            retry(ask, repo, FRESH_SECONDS, threading.Event())
    return Path(retry(get, f"the download of {repo}", patience, threading.Event()))


def may_pass(error: Exception) -> bool:
    """Return whether a failed request may succeed if repeated."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    response = getattr(error, "response", None)
    if isinstance(error, HfHubHTTPError) and response is not None:
        return response.status_code >= 500 or response.status_code in PASSING
    if isinstance(error, ValueError | FileNotFoundError | PermissionError | OfflineModeIsEnabled):
        return False
    # httpx under whatever name huggingface_hub ships it
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0].startswith("http")


def _asked_to_wait(error: Exception) -> float:
    """Return the seconds that the answer asks to wait (Retry-After), at most the longest wait."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), LONGEST_WAIT_SECONDS) if asked.isdecimal() else 0.0
