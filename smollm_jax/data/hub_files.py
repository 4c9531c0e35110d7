"""Read a Hugging Face dataset's files in byte ranges, from a Hub that may fail.

`datasets` finds the files. This module requests their bytes, one block at a time. Every answer must be exactly the
range requested: a short answer would pass for the end of a file. A failed block is requested again until `timeout`
seconds have passed without an answer. So a parser never sees a fault of the network. If it cannot parse a file,
the file is at fault.
"""

import io
import re
import threading
import time
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from smollm_jax.runtime.background import BackgroundTask
from smollm_jax.runtime.errors import SourceTimeout, UserError, one_line
from smollm_jax.runtime.retry import WAYS_OUT, be_quiet, request_seconds, retry

POLL_SECONDS = 0.1
BLOCK_BYTES = 4 * 2**20
BLOCK_SECONDS = 60.0  # a block that takes longer than this to arrive is requested again
LISTING_SECONDS = 120.0  # some calls inside `datasets` have no time limit of their own


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset: name without revision, URL, and a hash of its content."""

    name: str
    url: str
    size: int
    content: str


@dataclass(frozen=True)
class HubListing:
    """The files of a dataset, in order, and what the Hub tells about it."""

    files: list[HubFile]
    revision: str | None = None
    license: str | None = None


@cache  # held-out and training documents come from the same revision
def list_files(spec: str, split: str, *, patience: float) -> HubListing:
    """List the files of `OWNER/NAME:CONFIG`. The listing stays the same for the rest of the process.

    Raises `UserError` if there is no such dataset, config or split. Raises `SourceTimeout` if the Hub has not
    answered for `patience` seconds.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    repo, _, config = spec.partition(":")
    listing = partial(_list, repo, config or None, split)
    try:
        return retry(lambda: BackgroundTask(listing).result(LISTING_SECONDS), spec, patience, threading.Event())
    except SourceTimeout:
        raise
    except RepositoryNotFoundError:
        known = "no such file here and no such dataset on the Hub, or a private one: then set HF_TOKEN"
        raise UserError(f"--data {spec}: {known}") from None
    except Exception as error:  # whatever a library raises: without the list of files there is no stream
        ways_out = f"; {WAYS_OUT}" if isinstance(error, OSError) else ""
        raise UserError(f"--data {spec}: {one_line(error)}{ways_out}") from None


def _list(repo: str, config: str | None, split: str) -> HubListing:
    import datasets
    from huggingface_hub import HfApi, HfFileSystem

    be_quiet()
    # one plain request first: `datasets` would hide a Hub that is down behind half a minute of retries
    info = HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(repo, timeout=request_seconds())
    found = datasets.load_dataset_builder(repo, config).config.data_files or {}
    if split not in found:
        raise UserError(f"no split {split!r} but {', '.join(found) or 'none at all'}")
    paths = [str(path).removeprefix("hf://") for path in found[split]]
    filesystem: Any = HfFileSystem(endpoint=datasets.config.HF_ENDPOINT, skip_instance_cache=True)
    folders = sorted({path.rpartition("/")[0] for path in paths})
    entries = {entry["name"]: entry for folder in folders for entry in filesystem.ls(folder, detail=True)}
    files = []
    for path in paths:
        entry = entries.get(path) or filesystem.info(path)
        content = (entry.get("lfs") or {}).get("sha256") or entry.get("blob_id") or ""
        # without the revision: a commit that leaves the data files alone must leave their names alone
        name = re.sub("@[^/]*", "", path, count=1)
        files.append(HubFile(name, filesystem.url(path), entry["size"], content))
    card: Any = info.card_data
    told = card.get("license") if hasattr(card, "get") else None
    license_ = ", ".join(map(str, told)) if isinstance(told, list) else told and str(told)
    read = re.search("@([^/]*)", paths[0]) if paths else None  # a commit may have come since `info`
    return HubListing(files, read.group(1) if read else info.sha, license_)


class HubReader(io.RawIOBase):
    """A `HubFile` open for reading. A read gives all bytes, or raises `SourceTimeout` or `UserError`."""

    def __init__(self, file: HubFile, *, timeout: float, closed: threading.Event):
        self.file, self.timeout, self._stopped = file, timeout, closed
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.file.size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self.file.size - self._position), 0)
        for at in range(0, count, BLOCK_BYTES):
            size = min(BLOCK_BYTES, count - at)
            try:
                ask = partial(self._ask, self._position, size)
                view[at : at + size] = retry(ask, self.file.name, self.timeout, self._stopped)
            except SourceTimeout:
                raise
            except Exception as error:
                # the token expired, or the file is gone: waiting does not help
                raise UserError(f"the Hub refuses {self.file.name}: {one_line(error)}") from None
            self._position += size
        return count

    def _ask(self, start: int, size: int) -> bytes:
        """Send one request, in a thread that can be abandoned. A stall must not hold Arrow when Python ends."""
        request = BackgroundTask(partial(fetch_range, self.file, start, size))
        while not request.wait(POLL_SECONDS):
            if self._stopped.is_set():
                raise SourceTimeout(f"{self.file.name}: closed while reading")
        return request.result()


def fetch_range(file: HubFile, start: int, size: int) -> bytes:
    """Request `size` bytes from `start`. Raises `OSError` unless the answer is exactly that range."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    asked = f"bytes={start}-{start + size - 1}"
    headers = {"range": asked, "accept-encoding": "identity", **build_hf_headers()}
    deadline, body = time.monotonic() + BLOCK_SECONDS, bytearray()
    with get_session().stream("GET", file.url, headers=headers, timeout=request_seconds()) as response:
        hf_raise_for_status(response)
        if response.status_code != 206 and (start, size) != (0, file.size):
            raise OSError(f"status {response.status_code} where a part of the file was asked for")
        for part in response.iter_bytes():
            body += part
            if len(body) > size or time.monotonic() > deadline:
                break
        got = response.headers.get("content-range", "").partition("/")[0].replace(" ", "=")
    if got not in {"", asked} or len(body) != size:
        raise OSError(f"{len(body)} bytes came where {size} were asked for; got {got or 'no range'} for {asked}")
    return bytes(body)
