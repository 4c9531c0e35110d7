"""Encode text to ids and decode ids to text, with a loaded tokenizer or one trained on the data.

A thin layer over the `tokenizers` library, without transformers. The files of a tokenizer are kept unchanged,
so that the export of a run holds the same files. Nothing here knows of documents, rows or models.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.runtime.errors import SourceTimeout, UserError, one_line, require
from smollm_jax.runtime.files import written_aside
from smollm_jax.runtime.retry import WAYS_OUT, be_quiet, download_snapshot

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


@contextlib.contextmanager
def _no_panic() -> Iterator[None]:
    """Raise a `RuntimeError` for a panic of the library, which is a BaseException: nobody would catch it."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the tokenizer fails on this text: {one_line(error)}") from None


class Tokenizer:
    """A fast tokenizer and the files it was read from; `encode` adds neither bos nor eos."""

    def __init__(self, folder: str | Path):
        """Read a folder; raises `UserError` if it holds no usable tokenizer."""
        from tokenizers import Tokenizer as Fast

        folder = Path(folder)
        require(folder.is_dir(), f"no tokenizer folder {folder}; give a folder, a Hub id or train:VOCAB")
        self.files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        require("tokenizer.json" in self.files, f"{folder} holds no tokenizer.json; only fast tokenizers are read")
        try:
            with _no_panic():
                self._fast = Fast.from_str(self.files["tokenizer.json"].decode())
        except Exception as error:
            raise UserError(f"{folder}/tokenizer.json cannot be read: {one_line(error)}") from None
        self._fast.no_truncation()
        self._fast.no_padding()
        # a document that spells out <|endoftext|> must not end itself
        self._fast.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(self.files["tokenizer.json"]).hexdigest()
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        self.settings = self._json("tokenizer_config.json", folder)
        self.chat_template = _default_template(self.settings.get("chat_template"))
        if "chat_template.jinja" in self.files:
            self.chat_template = self.files["chat_template.jinja"].decode("utf-8", "replace")
        self.eos_id = self._eos_id(folder)

    def _json(self, name: str, folder: Path) -> dict[str, Any]:
        """Parse a JSON file; empty if there is none."""
        try:
            value = json.loads(self.files.get(name, b"{}"))
        except ValueError as error:
            raise UserError(f"{folder / name} cannot be read: {one_line(error)}") from None
        require(isinstance(value, dict), f"{folder / name} cannot be read: it is not a JSON object")
        return value

    def _eos_id(self, folder: Path) -> int:
        eos = self.settings.get("eos_token")
        if eos is None:
            eos = self._json("special_tokens_map.json", folder).get("eos_token", EOS)
        found = self._fast.token_to_id(token_text(eos))
        if found is None:
            raise UserError(f"the tokenizer in {folder} has no end-of-text token {eos!r}; documents need one")
        return found

    @_no_panic()
    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32 (n,), without special tokens."""
        encoded = self._fast.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int32) for one in encoded]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    @_no_panic()
    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return self._fast.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The id of each special token."""
        added = self._fast.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text per id: int32 (V,), 0 for special tokens.

        A byte-level token spells each byte as one character, so its length is the count.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        special = set(self.special_tokens.values())
        byte_level = "ByteLevel" in str(json.loads(self.files["tokenizer.json"]).get("decoder"))
        for token, i in self._fast.get_vocab(with_added_tokens=True).items():
            if i not in special:
                lengths[i] = len(token) if byte_level else len(self._fast.decode([i]).encode())
        return lengths

    def save(self, folder: str | Path) -> None:
        """Write the files that the tokenizer was read from."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            with written_aside(folder / name) as part:
                part.write_bytes(content)


def token_text(token: Any) -> str:
    """Return the text of a token in a settings file: a string, an object with its content, or null."""
    return str((token.get("content") if isinstance(token, dict) else token) or "")


def _default_template(given: Any) -> str | None:
    """Return a chat template as it is, or the entry named default of a list, as older files hold."""
    if isinstance(given, list):
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


def load_tokenizer(name: str, *, documents: Iterable[str] | None = None) -> Tokenizer:
    """Load the tokenizer of a folder or Hub id, or train one on `documents` for `train:VOCAB`.

    Raises `UserError` if there is none, or the Hub does not answer.
    """
    if name.startswith("train:"):
        size = name.removeprefix("train:")
        require(
            size.isdecimal() and int(size) > BYTES,
            f"--tokenizer {name}: expected train:VOCAB, such as train:4096, with VOCAB of {BYTES + 1} or more",
        )
        require(documents is not None, f"--tokenizer {name} needs documents to be trained on")
        return train_tokenizer(documents or (), int(size))
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return Tokenizer(Path(name).expanduser())
    return Tokenizer(_download(name))


def _download(repo: str) -> Path:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        be_quiet()
        return download_snapshot(repo, FILES)
    except SourceTimeout as error:
        reason = f"{error}; {WAYS_OUT}"
    except GatedRepoError:
        reason = f"{repo} is gated: accept its terms on the Hub and set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = f"{repo}: no such folder here and no such repository on the Hub"
    except (OSError, ValueError) as error:
        reason = f"{repo} cannot be fetched from the Hub ({one_line(error)}); {WAYS_OUT}"
    raise UserError(f"--tokenizer {reason}")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) of `vocab_size` entries, eos first."""
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
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOS),
        "clean_up_tokenization_spaces": False,
    }
    with tempfile.TemporaryDirectory(prefix="tokenizer-", ignore_cleanup_errors=True) as folder:
        fast.save(f"{folder}/tokenizer.json")
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        return Tokenizer(folder)
