"""Files of a Hugging Face dataset, read range by range from a Hub that may misbehave.

`datasets` finds the files; their bytes are asked for here, a block at a time, because every answer has to be
the very range that was asked for: a short one would pass for the end of a file. A block that fails is asked
for again until `timeout` seconds have gone by without one, so a parser above never sees a fault of the
network, and what it cannot parse is the file's own fault. Knows nothing of documents.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from smollm_jax.ahead import Ahead
from smollm_jax.config import UserError

WAYS_OUT = "without the Hub use local files (--data 'FILES' --tokenizer FOLDER) or --recipe quickstart"
FRESH_SECONDS = 8.0  # a new run in vain waits no longer than this for an answer; one that resumes, --data-timeout
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 20.0
POLL_SECONDS = 0.1
BLOCK_BYTES = 4 * 2**20
BLOCK_SECONDS = 60.0  # a block that drips in more slowly than this is given up and asked for again
LISTING_SECONDS = 120.0  # some calls inside `datasets` have no time limit of their own
PASSING = (408, 425, 429)  # HTTP status codes below 500 that go away by themselves

T = TypeVar("T")
logger = logging.getLogger(__name__)


class SourceTimeout(RuntimeError):
    """A source has not answered for --data-timeout seconds."""


class Refused(UserError):
    """The Hub will not give a file: a token that ran out, a file that is gone. Waiting does not help."""


@dataclass(frozen=True)
class Remote:
    """One file: its name without a revision, where it is read, and a hash of its content."""

    name: str
    url: str
    size: int
    content: str


def list_files(spec: str, split: str, *, patience: float) -> list[Remote]:
    """The files of `OWNER/NAME:CONFIG`, in order.

    Raises `ValueError` when there is no such dataset, config or split, and `SourceTimeout` when the Hub has
    not answered for `patience` seconds.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    repo, _, config = spec.partition(":")

    def ask() -> list[Remote]:
        return Ahead(partial(_list, repo, config or None, split)).result(LISTING_SECONDS)

    try:
        return patiently(ask, spec, patience, threading.Event())
    except SourceTimeout:
        raise
    except RepositoryNotFoundError:
        known = "no such file here and no such dataset on the Hub, or one that is private: then set HF_TOKEN"
        raise UserError(f"--data {spec}: {known}") from None
    except Exception as error:  # whatever a library made of it: without the list of files there is no stream
        ways_out = f"; {WAYS_OUT}" if isinstance(error, OSError) else ""
        raise UserError(f"--data {spec}: {brief(error)}{ways_out}") from None


def _list(repo: str, config: str | None, split: str) -> list[Remote]:
    import datasets
    from huggingface_hub import HfApi, HfFileSystem

    be_quiet()
    # one plain question first: `datasets` would hide a Hub that is away behind half a minute of retries
    HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(repo, timeout=request_seconds())
    builder = datasets.load_dataset_builder(repo, config)
    found = builder.config.data_files or {}
    if split not in found:
        raise UserError(f"no split {split!r} but {', '.join(found) or 'none at all'}")
    paths = [str(path).removeprefix("hf://") for path in found[split]]
    filesystem = HfFileSystem(endpoint=datasets.config.HF_ENDPOINT, skip_instance_cache=True)
    folders = sorted({path.rpartition("/")[0] for path in paths})
    entries: dict[str, Any] = {e["name"]: e for folder in folders for e in _entries(filesystem, folder)}
    files = []
    for path in paths:
        entry: dict[str, Any] = entries.get(path) or filesystem.info(path)
        content = (entry.get("lfs") or {}).get("sha256") or entry.get("blob_id") or ""
        files.append(Remote(_without_revision(path), filesystem.url(path), entry["size"], content))
    return files


def _entries(filesystem: Any, folder: str) -> list[dict[str, Any]]:
    return filesystem.ls(folder, detail=True)


def _without_revision(path: str) -> str:
    """A commit that leaves the data files alone leaves their names alone."""
    head, _, tail = path.partition("@")
    return f"{head}/{tail.partition('/')[2]}" if tail else path


def be_quiet() -> None:
    """Silence what the libraries say of each retry: it is said here once, in one line."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()


def request_seconds() -> float:
    """Silence after which a request is given up: HF_HUB_DOWNLOAD_TIMEOUT, by default 10."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def patiently(ask: Callable[[], T], name: str, patience: float, closed: threading.Event) -> T:
    """`ask()`, again and again while its failure may pass, each wait shown.

    Raises `SourceTimeout` after `patience` seconds, or when `closed` is set meanwhile.
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
                raise SourceTimeout(f"{name} has not answered for {silent:.0f} s ({brief(error)})") from None
            pause = min(max(wait, _asked_to_wait(error)), max(patience - silent, 0.0))
            logger.warning("waiting for %s: %s; trying again in %.1f s", name, brief(error), pause)
            if closed.wait(pause):
                raise SourceTimeout(f"{name}: closed while waiting") from None
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def may_pass(error: Exception) -> bool:
    """Whether a failed request may succeed when it is made again."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    response = getattr(error, "response", None)
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError) and response is not None:
        return response.status_code >= 500 or response.status_code in PASSING
    if isinstance(error, ValueError | FileNotFoundError | PermissionError):
        return False
    # httpx under whatever name huggingface_hub ships it
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0].startswith("http")


def _asked_to_wait(error: Exception) -> float:
    """Seconds that the answer asks for, within reason."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), LONGEST_WAIT_SECONDS) if asked.isdecimal() else 0.0


def brief(error: BaseException) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines()
    text = " ".join(lines[0].split())[:200] if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class HubFile(io.RawIOBase):
    """A remote file; every read gives all the bytes asked for, or raises `SourceTimeout` or `Refused`."""

    def __init__(self, file: Remote, *, timeout: float, closed: threading.Event):
        self.file, self.timeout, self._stopped = file, timeout, closed
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.file.size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self.file.size - self._position), 0)
        for at in range(0, count, BLOCK_BYTES):
            size = min(BLOCK_BYTES, count - at)
            ask = partial(self._ask, self._position, size)
            try:
                view[at : at + size] = patiently(ask, self.file.name, self.timeout, self._stopped)
            except (OSError, ValueError) as error:
                raise Refused(f"the Hub refuses {self.file.name}: {brief(error)}") from None
            self._position += size
        return count

    def _ask(self, start: int, size: int) -> bytes:
        """One request, in a thread that can be left behind: a stalled one must not hold Arrow when Python ends."""
        request = Ahead(partial(fetch_range, self.file, start, size))
        while not request.wait(POLL_SECONDS):
            if self._stopped.is_set():
                raise SourceTimeout(f"{self.file.name}: closed while reading")
        return request.result()


def fetch_range(file: Remote, start: int, size: int) -> bytes:
    """One request for `size` bytes from `start`; raises `OSError` unless the answer is exactly that."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {"range": f"bytes={start}-{start + size - 1}", "accept-encoding": "identity", **build_hf_headers()}
    deadline, parts, received = time.monotonic() + BLOCK_SECONDS, [], 0
    with get_session().stream("GET", file.url, headers=headers, timeout=request_seconds()) as response:
        hf_raise_for_status(response)
        if response.status_code != 206 and (start, size) != (0, file.size):
            raise OSError(f"status {response.status_code} where a part of the file was asked for")
        for part in response.iter_bytes():
            parts.append(part)
            received += len(part)
            if received > size or time.monotonic() > deadline:
                break
        said = response.headers.get("content-range", "")
    if said and said.partition("/")[0] != f"bytes {start}-{start + size - 1}":
        raise OSError(f"range {said} came where bytes {start}-{start + size - 1} were asked for")
    if received != size:
        raise OSError(f"{received} bytes came where {size} were asked for")
    return b"".join(parts)
