"""The flags of every command that generates text."""

import dataclasses
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smollm_jax.runtime.errors import say

if TYPE_CHECKING:
    from smollm_jax.generation.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    """Maximum number of new tokens."""
    temperature: float = 0.0
    """Sampling temperature (0: always the most likely token)."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this."""
    top_k: int = 0
    """Sample from the k most likely tokens (0: all)."""
    min_p: float = 0.0
    """Sample from tokens at least this likely, relative to the most likely token."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred before become less likely."""
    seed: int | None = 0
    """Seed of the sampling. Default of a conversation: another each time."""

    def sampling(self, usual: "SamplingFlags") -> "Sampling":
        """Return the settings of the generator. Raises `UserError`.

        Logs flags that choose nothing, unless they are the `usual` ones of the command, which nobody gave.
        """
        from smollm_jax.generation.sampling import Sampling

        if self.temperature == 0 and self._chosen not in (SamplingFlags()._chosen, usual._chosen):
            say("--top-p, --top-k and --min-p choose nothing at --temperature 0: always the most likely token")
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return Sampling(**dataclasses.asdict(self) | {"seed": seed})

    @property
    def _chosen(self) -> tuple[float, int, float]:
        return self.top_p, self.top_k, self.min_p
