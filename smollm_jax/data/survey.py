"""Survey conversations before training: targets, lengths, and the rows that they fill."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice

import numpy as np

from smollm_jax.config.settings import DataConfig
from smollm_jax.data.best_fit import BestFitPacker, ids_of
from smollm_jax.data.chat import encode_to_fit
from smollm_jax.data.documents import Document
from smollm_jax.data.shuffle import TOKENIZED_TOGETHER, tokenize, without
from smollm_jax.data.sources import mixture, open_source
from smollm_jax.runtime.errors import require
from smollm_jax.tokenizer.tokenizer import Tokenizer
from smollm_jax.tokenizer.turns import turn_end

HEAD = 1_000  # documents of each source, unless all are counted
SHOWN_TOKENS = 400
OPEN, CLOSE = "[[", "]]"  # around the trained tokens of the conversation that is shown


class Survey:
    """Counts of conversations and texts, and the rows that they fill."""

    def __init__(self, seq_len: int, end: int | None):
        self.conversations = self.texts = 0
        self.dropped = self.cut = 0  # conversations of which nothing is trained, or that lose turns
        self.longest = self.tokens = self.trained = self.rows = 0
        self.ends = 0  # trained tokens that end a turn
        self.tokens_of: Counter[str] = Counter()  # of each source
        self.first: np.ndarray | None = None  # the conversation to show
        self._end, self._packer = end, BestFitPacker[int](seq_len)

    def add(self, tokens: np.ndarray, length: int, source: str, *, talk: bool) -> None:
        """Count a document of `length` tokens, of which the `tokens` are for training."""
        self.tokens_of[source] += len(tokens)
        self.conversations += talk
        self.texts += not talk
        self.dropped += not len(tokens)
        self.cut += 0 < len(tokens) < length
        self.longest = max(self.longest, length)
        self.tokens += len(tokens)
        self.trained += int((tokens[1:] >= 0).sum())
        if talk and len(tokens):
            self.ends += int((tokens[1:] == self._end).sum())
            self.first = tokens if self.first is None else self.first
        if len(tokens):
            self._packer.add(0, tokens)
        while not self._packer.wants(1):
            self._packer.batch(1)
            self.rows += 1

    def rows_of(self, epochs: int, shares: list[tuple[str, float]]) -> int:
        """Return the rows of so many epochs, in a mixture of the source that ends first: then its shares end."""
        most = min(epochs * self.tokens_of[source] / share for source, share in shares)
        return int(self.rows * most / max(self.tokens, 1))

    def finish(self) -> None:
        """Count the rows of what is left in the buffer."""
        while self._packer.batch(1).segment_ids.any():
            self.rows += 1


def survey(config: DataConfig, tokenizer: Tokenizer, excluded: dict[int, int], *, whole: bool) -> Survey:
    """Read all documents once, or if not `whole` the head of each source. `excluded` as for `without`.

    Raises `UserError` as the loader would, and if no trained token ends a turn: no model would learn to stop.
    """
    end = turn_end(tokenizer)
    found, documents = Survey(config.seq_len, end), _documents(config, excluded, None if whole else HEAD)
    while group := list(islice(documents, TOKENIZED_TOGETHER)):
        talks = [document for document in group if document.conversation]
        for document, (tokens, length) in zip(talks, encode_to_fit(talks, tokenizer, config), strict=True):
            found.add(tokens, length, document.source, talk=True)
        for document, ids in tokenize((document for document in group if not document.conversation), tokenizer):
            found.add(ids, len(ids), document.source, talk=False)
    found.finish()
    never = f"the token {end}, which ends a turn, is never trained, so that no model would learn to stop"
    require(found.first is None or found.ends > 0, f"--data {config.data}: {never}")
    return found


def _documents(config: DataConfig, excluded: dict[int, int], most: int | None) -> Iterator[Document]:
    sources = (open_source(spec, config).documents() for spec, _ in mixture(config.data))
    return without(excluded, chain.from_iterable(islice(source, most) for source in sources))


def marked(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """Return the text of a conversation as `fitted` gives it, with trained tokens between brackets."""
    parts = []
    pieces = np.split(tokens, np.flatnonzero(np.diff(tokens >= 0)) + 1)
    for piece in pieces:
        text = tokenizer.decode(ids_of(piece), skip_special=False)
        parts.append(f"{OPEN}{text}{CLOSE}" if piece[0] >= 0 else text)
    return "".join(parts)


def describe(found: Survey, tokenizer: Tokenizer, *, whole: bool, pairs: bool = False) -> list[str]:
    """Return lines that say what `survey` found, with a conversation and its trained tokens marked."""
    read = "all data" if whole else f"the first {HEAD:,} of each source"
    texts = f" and {found.texts:,} texts" if found.texts else ""
    end = tokenizer.decode([turn_end(tokenizer) or 0], skip_special=False)
    what, lost, why = "conversations", "turns that do not fit", "no answer fits"
    if pairs:
        what, lost, why = "pairs", "the end of an answer", "their answers are equal or do not fit"
    lines = [
        f"talks       {found.conversations:,} {what}{texts}, by {read}: {found.tokens:,} tokens, "
        f"{found.trained / max(found.tokens, 1):.1%} of them trained",
        f"turns       {end} ends a turn and is trained {found.ends:,} times",
        f"lengths     the longest has {found.longest:,} tokens; {found.cut:,} lose {lost}, "
        f"{found.dropped:,} are dropped because {why}",
    ]
    if found.first is not None:
        shown = found.first[:SHOWN_TOKENS]
        more = " ..." if len(found.first) > SHOWN_TOKENS else ""
        lines += [f"trained     what stands between {OPEN} and {CLOSE}:", marked(shown, tokenizer).rstrip() + more]
    return lines
