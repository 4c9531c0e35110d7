"""Define a text that takes a slot, and what a step makes of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from smollm_jax.generation.lengths import bucket, check_prompt
from smollm_jax.generation.sampling import Sampling, SamplingArrays, Score
from smollm_jax.generation.steps import DecodeState


class Row:
    """A text that takes a slot: its prompt, how to go on, and how far it is. Without `sampling` it is only scored.

    `scored` wants the scores of new ids, and `reads_scores` scores of the prompt, each but the first. At the end
    `reason` is "eos", "length", "context", "scored" or "cancelled".
    """

    def __init__(
        self, prompt: Sequence[int], sampling: Sampling | None, *, context: int, vocab_size: int,
        scored: bool = False, reads_scores: bool = False,
    ):  # fmt: skip
        """Raises `UserError` as `check_prompt` does."""
        check_prompt(prompt, context=context + (sampling is None), vocab_size=vocab_size)
        self.prompt, self.sampling, self.scored = list(prompt), sampling or Sampling(), scored
        self.reads_scores = reads_scores or sampling is None
        self.room = min(sampling.max_new_tokens, context - len(prompt)) if sampling else 0
        # parts of a text that is scored begin at multiples of their size, so its cache must be one too
        longest = bucket(context + 1) if self.reads_scores else context
        self.length = min(bucket(len(prompt) + self.room), longest)
        self.arrays = SamplingArrays.from_sampling(self.sampling)
        self.read_to = self.sent = self.made = 0
        self.read: Any = None
        self.state: DecodeState | None = None  # until the row joins the others
        self.reason: str | None = None

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0


class Made(NamedTuple):
    """What a step has made of a row. `scored` has new ids with their scores, a stop id too.

    `reason` ends the row: nothing follows.
    """

    row: Row
    ids: list[int]
    scored: list[tuple[int, Score]]
    prompt_scores: list[Score]
    reason: str | None
