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
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from smollm_jax.runtime.background import BackgroundTask
from smollm_jax.runtime.errors import SourceTimeout, UserError, one_line
from smollm_jax.runtime.retry import WAYS_OUT, be_quiet, request_seconds, retry

POLL_SECONDS = 0.1
BLOCK_BYTES = 4 * 2**20
BLOCK_SECONDS = 60.0  # a block that drips in more slowly than this is given up and asked for again
LISTING_SECONDS = 120.0  # some calls inside `datasets` have no time limit of their own


T = TypeVar("T")
logger = logging.getLogger(__name__)


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
        return BackgroundTask(partial(_list, repo, config or None, split)).result(LISTING_SECONDS)

    try:
        return retry(ask, spec, patience, threading.Event())
    except SourceTimeout:
        raise
    except RepositoryNotFoundError:
        known = "no such file here and no such dataset on the Hub, or one that is private: then set HF_TOKEN"
        raise UserError(f"--data {spec}: {known}") from None
    except Exception as error:  # whatever a library made of it: without the list of files there is no stream
        ways_out = f"; {WAYS_OUT}" if isinstance(error, OSError) else ""
        raise UserError(f"--data {spec}: {one_line(error)}{ways_out}") from None


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
                view[at : at + size] = retry(ask, self.file.name, self.timeout, self._stopped)
            except (OSError, ValueError) as error:
                raise Refused(f"the Hub refuses {self.file.name}: {one_line(error)}") from None
            self._position += size
        return count

    def _ask(self, start: int, size: int) -> bytes:
        """One request, in a thread that can be left behind: a stalled one must not hold Arrow when Python ends."""
        request = BackgroundTask(partial(fetch_range, self.file, start, size))
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
