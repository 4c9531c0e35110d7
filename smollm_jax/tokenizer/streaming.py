"""Turn ids into text while they are generated. The pieces add up to the decoded text of all ids."""

from collections.abc import Sequence
from itertools import takewhile

from smollm_jax.tokenizer.tokenizer import Tokenizer

CONTEXT_IDS = 4  # decoded with new ids: some tokenizers decode the start of a text differently


class TextOfIds:
    """An incremental decoder of the ids after `prompt`. Holds back text that may still change."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special_tokens.values())
        self._shorten(list(prompt))

    def feed(self, ids: Sequence[int]) -> str:
        """Return the text that `ids` complete."""
        self._window += ids
        settled = self._tokenizer.decode_settled(self._window)
        new = self._after_shown(settled)
        if new:
            self._shown = settled
        if len(self._window) > CONTEXT_IDS and settled == self._tokenizer.decode(self._window):
            self._shorten(self._window)
        return new

    def rest(self) -> str:
        """Return the text after the last id: the mark of an unfinished character, or nothing."""
        return self._after_shown(self._tokenizer.decode(self._window))

    def _shorten(self, ids: list[int]) -> None:
        count, inside = CONTEXT_IDS, self._tokenizer.unsettled
        ids = [token for token in ids if token not in self._special]  # no text: a long run of them costs nothing
        # not from inside a run of bytes: what follows would be the start of a text
        while count < len(ids) and ids[-count] in inside:
            count *= 2
        self._window = ids[-count:]
        self._shown = self._tokenizer.decode(self._window)

    def _after_shown(self, text: str) -> str:
        # not a count of characters: the last ones of a prompt may be completed, and are then others
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self._shown, text, strict=False))
        return text[sum(1 for _ in same) :]
