"""Stream the ids of an engine that makes one token at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

from smollm_jax.generation.sampling import Sampling, Score


class Stepwise:
    """An engine with `steps`, which yields new ids with the logits (1, V) that chose them, the stop id too.

    `scores` gives the scores of targets (T) from logits (T, V) before any rule of sampling.
    """

    def steps(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[tuple[int, Any]]:
        raise NotImplementedError

    def scores(self, logits_TV: Any, targets: Sequence[int]) -> list[Score]:
        raise NotImplementedError

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[list[int]]:
        """Yield new ids one by one, without the stop id. Closing the iterator ends the work."""
        for token, _ in self.steps(prompt, sampling):
            if token not in sampling.stop_ids:
                yield [token]

    def stream_scored(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[list[tuple[int, Score]]]:
        """Yield new ids with their scores one by one, the stop id too."""
        for token, logits_1V in self.steps(prompt, sampling):
            yield [(token, self.scores(logits_1V, [token])[0])]
