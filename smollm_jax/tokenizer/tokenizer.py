"""Encode text to ids and decode ids to text, with a loaded or trained tokenizer.

A thin layer over the `tokenizers` library, without transformers. The files of a tokenizer are kept unchanged, so
that the export of a run holds the same files. Nothing here knows of documents, rows or models.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.runtime.files import leads_out, read_whole, written_aside

EOS = "<|endoftext|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")  # of ChatML: the start and the end of a turn
HALF = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no whole character decode to
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")  # of tokenizers with byte fallback
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SpecialTokens = Literal["text", "parse"]
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
    """Raise a `UserError` for an error of the library, a bare Exception, and for its panics, BaseExceptions."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer fails on this text: {one_line(error)}") from None


class Encoded(NamedTuple):
    """The ids of a text, and the characters from `begin` to `end` of each: int32 (n,)."""

    ids: np.ndarray
    begin: np.ndarray
    end: np.ndarray


class Tokenizer:
    """A fast tokenizer and the files it was read from.

    `encode` adds what the tokenizer's own post-processor adds, unless `template` is off. A special token that a
    text spells out stays text, or becomes its id if `special_tokens` is "parse".
    """

    def __init__(self, folder: str | Path, *, special_tokens: SpecialTokens = "text"):
        """Read a folder. Raises `UserError` if it holds no usable tokenizer."""
        folder = Path(folder)
        require(folder.is_dir(), f"no tokenizer folder {folder}; give a folder, a Hub id or train:VOCAB")
        self.files = {name: read_whole(folder / name) for name in FILES if (folder / name).is_file()}
        self.outside = next((folder / name for name in self.files if leads_out(folder / name)), None)
        require("tokenizer.json" in self.files, f"{folder} holds no tokenizer.json; only fast tokenizers are read")
        try:
            # a document that spells out <|endoftext|> must not end itself
            with _no_panic():
                self._fast = self._open(spelled_out="text")
        except Exception as error:
            raise UserError(f"{folder}/tokenizer.json cannot be read: {one_line(error)}") from None
        self.mode, self.template, self.spells = special_tokens, True, True
        self.texts = self.texts_with_special = 0  # encoded so far, and how many of them spell out a special token
        self._vocab = self._fast.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values(), default=-1) + 1
        require(self.vocab_size > 0, f"{folder}/tokenizer.json has no entries")
        self.settings = self._json("special_tokens_map.json", folder) | self._json("tokenizer_config.json", folder)
        self.chat_template = _default_template(self.settings.get("chat_template"))
        if "chat_template.jinja" in self.files:
            self.chat_template = self.files["chat_template.jinja"].decode("utf-8", "replace")
        self.eos_id = self._eos_id(folder)

    def _open(self, *, spelled_out: SpecialTokens, content: str = "") -> Any:
        from tokenizers import Tokenizer as Fast

        fast = Fast.from_str(content or self.files["tokenizer.json"].decode())
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = spelled_out == "text"
        return fast

    @cached_property
    def _parsing(self) -> Any:
        return self._open(spelled_out="parse")  # a second one: threads share the first

    @cached_property
    def _spelling(self) -> Any:
        """Return the tokenizer for texts that spell out special tokens and mean them as text.

        A Unigram model has special tokens in its own vocabulary. Here other names stand there, which no text has.
        """
        tokenizer, special = json.loads(self.files["tokenizer.json"]), set(self.special_tokens.values())
        if tokenizer["model"].get("type") != "Unigram":
            return self._fast
        pieces = enumerate(tokenizer["model"]["vocab"])
        tokenizer["model"]["vocab"] = [[f"\ufdd0{i}" if i in special else p, score] for i, (p, score) in pieces]
        return self._open(spelled_out="text", content=json.dumps(tokenizer))

    def _spells_special(self, text: str) -> bool:
        return any(token in text for token in self.special_tokens)

    def _json(self, name: str, folder: Path) -> dict[str, Any]:
        """Parse a JSON file without its nulls. Empty if there is none."""
        try:
            value = json.loads(self.files.get(name, b"{}"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{folder / name} cannot be read: {one_line(error)}") from None
        require(isinstance(value, dict), f"{folder / name} cannot be read: it is not a JSON object")
        return {key: item for key, item in value.items() if item is not None}

    def _eos_id(self, folder: Path) -> int:
        eos = self.settings.get("eos_token", EOS)
        found = self._fast.token_to_id(token_text(eos))
        if found is None:
            raise UserError(f"the tokenizer in {folder} has no end-of-text token {eos!r}; documents need one")
        return found

    @property
    def bos_id(self) -> int | None:
        """Return the id of the token that begins a text. None if the tokenizer names none."""
        return self._fast.token_to_id(token_text(self.settings.get("bos_token")))

    @property
    @_no_panic()
    def fingerprint(self) -> str:
        """Hash tokenizer.json, any ids that `encode` adds to a text, and whether special tokens are spelled."""
        bare, added = (self._fast.encode("", add_special_tokens=on).ids for on in (False, self.template))
        more = b"" if added == bare else repr(added).encode()
        more += b"spelled" if self.spells and self._spelling is not self._fast else b""
        return hashlib.sha256(self.files["tokenizer.json"] + more).hexdigest()

    def encode_as_of(self, fingerprint: str) -> None:
        """Encode as the run with this `fingerprint` did.

        Early runs left out what the post-processor adds, and with a Unigram model took spelled special tokens as
        ids.
        """
        for self.spells, self.template in product((True, False), repeat=2):
            if self.fingerprint.startswith(fingerprint):
                return

    @_no_panic()
    def encode_batch(self, texts: list[str], special_tokens: SpecialTokens | None = None) -> list[np.ndarray]:
        """Return the ids of each text, int32 (n,). `special_tokens` overrides the tokenizer's own mode."""
        self.texts += len(texts)
        special = [i for i, text in enumerate(texts) if self._spells_special(text)]
        self.texts_with_special += len(special)
        parse = (special_tokens or self.mode) == "parse"
        fast = self._parsing if parse else self._fast
        encoded = fast.encode_batch_fast(texts, add_special_tokens=self.template)
        for i in () if parse or not self.spells or self._spelling is fast else special:
            encoded[i] = self._spelling.encode(texts[i], add_special_tokens=self.template)
        arrays = [np.asarray(one.ids, dtype=np.int32) for one in encoded]
        self._require_known(max((ids.max() for ids in arrays if ids.size), default=0))
        return arrays

    def encode(self, text: str, special_tokens: SpecialTokens | None = None) -> np.ndarray:
        return self.encode_batch([text], special_tokens)[0]

    def encode_part(self, text: str, special_tokens: SpecialTokens) -> list[int]:
        """Return the ids of a part of a text: the post-processor adds nothing."""
        return list(self.encode_parts([text], special_tokens)[0].ids.tolist())

    @_no_panic()
    def encode_parts(self, texts: list[str], special_tokens: SpecialTokens) -> list[Encoded]:
        """Return what `encode_part` does, of several parts and with their characters."""
        spelled = self.spells and any(map(self._spells_special, texts))
        spelling = self._spelling if spelled else self._fast
        fast = self._parsing if special_tokens == "parse" else spelling
        found = []
        for one in fast.encode_batch(texts, add_special_tokens=False):
            self._require_known(max(one.ids, default=0))
            begin, end = np.array(one.offsets, np.int32).reshape(-1, 2).T
            found.append(Encoded(np.array(one.ids, np.int32), begin, end))
        return found

    def _require_known(self, largest: int) -> None:
        """Raise `UserError` for an id of no entry, which a model's embedding would silently take for another."""
        known = f"the tokenizer gives id {largest}, and has entries up to {self.vocab_size - 1}"
        require(largest < self.vocab_size, known)

    @_no_panic()
    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return self._fast.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_settled(self, ids: Sequence[int]) -> str:
        """Return the part of the decoded text that no further id can change.

        A run of bytes decodes to its characters only if the whole run is valid, so its last byte decides.
        """
        end = len(ids)
        while end and ids[end - 1] in self.unsettled:
            end -= 1
        return self.decode(ids[:end]).rstrip(HALF)

    @cached_property
    def _decoder(self) -> str:
        return str(json.loads(self.files["tokenizer.json"]).get("decoder"))

    @cached_property
    def _byte_ids(self) -> set[int]:
        named = self._vocab.items() if "ByteFallback" in self._decoder else ()
        return {i for token, i in named if BYTE_TOKEN.fullmatch(token)}

    @cached_property
    def unsettled(self) -> set[int]:
        """Return the ids that do not end a run of bytes. Special tokens are not part of a text."""
        return self._byte_ids | set(self.special_tokens.values())

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Return the id of each special token."""
        added = self._fast.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    @property
    def named_tokens(self) -> dict[str, str]:
        """Return the texts of the tokens with a name, such as bos_token, which a chat template may use."""
        found = {name: token_text(self.settings.get(name)) for name in NAMED_TOKENS}
        return {name: text for name, text in found.items() if text}

    def describe_special(self) -> str:
        """Return a sentence on special tokens in texts, and how many texts had any."""
        what, other = ("become ids", "text") if self.mode == "parse" else ("stay text", "parse")
        count = f"; {self.texts_with_special:,} of {self.texts:,} texts so far spell one out" if self.texts else ""
        return f"special tokens in a text {what} (other: --special-tokens {other}){count}"

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes of each id inside a text: int32 (V,), 0 if special.

        A byte-level token spells each byte as one character, so its length is the count.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        added = self._fast.get_added_tokens_decoder()
        for token, i in self._vocab.items():
            if i in added:
                lengths[i] = 0 if added[i].special else len(added[i].content.encode())
            elif "ByteLevel" in self._decoder or i in self._byte_ids:
                lengths[i] = 1 if i in self._byte_ids else len(token)
            else:  # the second of two: a decoder may take a space off the first
                once, twice = self._fast.decode([i]), self._fast.decode([i, i])
                lengths[i] = len(twice.encode()) - len(once.encode())
        return lengths

    @_no_panic()
    def byte_counts(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Return the UTF-8 bytes of `text` that each of its `ids` stands for: together all.

        `ids` may end with an eos that the tokenizer did not add. A tokenizer may change the text: lower case,
        added space, unknown words. No count per id is right in this case, so offsets in the text count.
        """
        counts, total = self.token_bytes[ids], len(text.encode())
        if counts.sum() == total or not ids.size:
            return counts
        fast = self._parsing if self.mode == "parse" else self._fast
        bounds = np.cumsum([0, *(len(character.encode()) for character in text)])
        offsets = fast.encode(text, add_special_tokens=self.template).offsets
        ends = np.maximum.accumulate([*(bounds[min(end, len(text))] for _, end in offsets), total])[: len(ids)]
        ends[-1] = total  # what the tokenizer drops at the end counts for the last id
        return np.diff(ends, prepend=0).astype(np.int32)

    def save(self, folder: str | Path) -> None:
        """Write the files that were read. Raises `UserError` if one was a link out of its folder."""
        require(self.outside is None, f"{self.outside} is a link out of its folder, not copied; put a file there")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            with written_aside(folder / name) as part:
                part.write_bytes(content)


def token_text(token: Any) -> str:
    """Return a token's text in a settings file: a string, an object or null."""
    text = str((token.get("content") if isinstance(token, dict) else token) or "")
    return text.encode(errors="backslashreplace").decode()  # no tokenizer takes half a character


def _default_template(given: Any) -> str | None:
    """Return a chat template as it is, or the entry "default" of a list. Older files hold lists."""
    if isinstance(given, list):
        entries = [entry for entry in given if isinstance(entry, dict) and entry.get("name") == "default"]
        given = entries[-1].get("template") if entries else None
    return given if isinstance(given, str) else None
