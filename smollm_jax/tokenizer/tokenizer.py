"""Text to ids and back: a thin face on the `tokenizers` library, and a tokenizer trained on the spot.

The files a tokenizer came with are kept as they are, so that a run's export holds the very same ones.
transformers is not needed; nothing here knows of documents, rows or models.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.runtime.errors import SourceTimeout, UserError, one_line, require
from smollm_jax.runtime.files import written_aside
from smollm_jax.runtime.retry import FRESH_SECONDS, WAYS_OUT, be_quiet, may_pass, request_seconds, retry

EOS = "<|endoftext|>"
BYTES = 256
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Tokenizer:
    """A fast tokenizer and the files it was read from. Text becomes ids without bos or eos."""

    def __init__(self, folder: str | Path):
        """Read a folder; raises `ValueError` when it holds no usable tokenizer."""
        from tokenizers import Tokenizer as Fast

        folder = Path(folder)
        path = folder / "tokenizer.json"
        require(folder.is_dir(), f"no tokenizer folder {folder}; give a folder, a Hub id or train:VOCAB")
        require(path.is_file(), f"{folder} holds no tokenizer.json; only fast tokenizers are read")
        self.files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        try:
            self._fast = Fast.from_str(self.files["tokenizer.json"].decode())
        except Exception as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}") from None
        self._fast.no_truncation()
        self._fast.no_padding()
        # a document that spells out <|endoftext|> must not end itself
        self._fast.encode_special_tokens = True
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        settings = self._json("tokenizer_config.json", folder)
        self.chat_template = _default_template(settings.get("chat_template"))
        if "chat_template.jinja" in self.files:
            self.chat_template = self.files["chat_template.jinja"].decode("utf-8", "replace")
        self.eos_id = self._eos_id(settings, folder)

    def _json(self, name: str, folder: Path) -> dict[str, Any]:
        """What a file says; nothing if there is none."""
        try:
            value = json.loads(self.files.get(name, b"{}"))
        except ValueError as error:
            raise UserError(f"{folder / name} cannot be read: {one_line(error)}") from None
        require(isinstance(value, dict), f"{folder / name} cannot be read: it is not a JSON object")
        return value

    def _eos_id(self, settings: dict[str, Any], folder: Path) -> int:
        eos = settings.get("eos_token")
        if eos is None:
            eos = self._json("special_tokens_map.json", folder).get("eos_token", EOS)
        if isinstance(eos, dict):
            eos = eos.get("content")
        found = self._fast.token_to_id(str(eos))
        if found is None:
            raise UserError(f"the tokenizer in {folder} has no end-of-text token {eos!r}; documents need one")
        return found

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, int32, without special tokens."""
        encoded = self._fast.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int32) for one in encoded]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return self._fast.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for: (V,) int32, 0 for special tokens.

        A byte-level token spells each byte as one character, so its length is the count.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        special = {i for i, token in self._fast.get_added_tokens_decoder().items() if token.special}
        byte_level = "ByteLevel" in str(json.loads(self.files["tokenizer.json"]).get("decoder"))
        for token, i in self._fast.get_vocab(with_added_tokens=True).items():
            if i not in special:
                lengths[i] = len(token) if byte_level else len(self._fast.decode([i]).encode())
        return lengths

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the files it came with."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            with written_aside(folder / name) as part:
                part.write_bytes(content)


def _default_template(given: Any) -> str | None:
    """The template itself, or the one named default of the list that older files hold."""
    if isinstance(given, list):
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


def load_tokenizer(name: str, *, documents: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer of a folder, of a Hub id, or trained on `documents` for `train:VOCAB`.

    Raises `ValueError` when there is none, or the Hub does not answer.
    """
    if name.startswith("train:"):
        size = name.removeprefix("train:")
        require(size.isdecimal(), f"--tokenizer {name}: expected train:VOCAB with a number, such as train:4096")
        smallest = BYTES + 1
        require(
            int(size) >= smallest, f"--tokenizer {name}: a byte-level vocabulary has at least {smallest} entries"
        )
        require(documents is not None, f"--tokenizer {name} needs documents to be trained on")
        return train(documents or (), int(size))
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return Tokenizer(Path(name).expanduser())
    return Tokenizer(_download(name))


def _download(repo: str) -> Path:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    be_quiet()
    try:
        return _fetch(repo)
    except SourceTimeout as error:
        raise UserError(f"--tokenizer {error}; {WAYS_OUT}") from None
    except GatedRepoError:
        raise UserError(f"--tokenizer {repo} is gated: accept its terms on the Hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise UserError(f"--tokenizer {repo}: no such folder here and no such repository on the Hub") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tokenizer {repo} cannot be fetched from the Hub ({one_line(error)}); {WAYS_OUT}"
        ) from None


def _fetch(repo: str) -> Path:
    """The files as they are on the Hub now; where it does not answer, as they were last, or it is waited for."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    # one plain question first: the download would hide a Hub that is away behind minutes of retries
    ask = partial(HfApi().model_info, repo, timeout=request_seconds())
    get = partial(snapshot_download, repo, allow_patterns=list(FILES), etag_timeout=request_seconds())
    try:
        ask()
    except Exception as error:
        if not may_pass(error) and not isinstance(error, OfflineModeIsEnabled):
            raise
        try:
            return Path(get(local_files_only=True))
        except LocalEntryNotFoundError:
            retry(ask, repo, FRESH_SECONDS, threading.Event())
    return Path(retry(get, repo, FRESH_SECONDS, threading.Event()))


def train(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) of `vocab_size` entries, eos first."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator(documents, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    folder = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    try:
        fast.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        return Tokenizer(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
