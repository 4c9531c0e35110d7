"""The architecture of a model, and the published presets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from smollm_jax.runtime.errors import require


def require_finite(settings: Any) -> None:
    """Raise `ValueError` naming a field that is NaN or infinite."""
    for name, value in vars(settings).items():
        require(not isinstance(value, float) or math.isfinite(value), f"{name}={value} must be a finite number")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: the numbers of a published `config.json`."""

    vocab_size: int = 49_152
    hidden_size: int = 576
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    intermediate_size: int = 1_536
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100_000.0
    max_seq_len: int = 8_192
    initializer_range: float = 1 / 24
    tie_embeddings: bool = True
    bos_token_id: int = 0
    eos_token_id: int = 0

    def __post_init__(self) -> None:
        require_finite(self)
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "intermediate_size", "max_seq_len"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}; "
            "SmolLM2-135M uses 9 and 3",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above 0")

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * block + self.hidden_size

    def flops_per_token(self, seq_len: int) -> int:
        """Forward and backward FLOPs a token of a causal row of `seq_len` tokens, remat not counted.

        6 a matrix weight (Kaplan et al. 2020, the head included), and 6·L·T·N·H for attention: the
        causal half of PaLM's 12·L·T·N·H (Chowdhery et al. 2022, appendix B).
        """
        lookup_only = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        attention = 6 * self.num_layers * seq_len * self.num_heads * self.head_dim
        return 6 * (self.num_parameters - lookup_only) + attention


MODELS = {
    "135M": ModelConfig(),
    "360M": ModelConfig(hidden_size=960, num_layers=32, num_heads=15, num_kv_heads=5, intermediate_size=2_560),
    "1.7B": ModelConfig(
        hidden_size=2_048,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        intermediate_size=8_192,
        rope_theta=130_000.0,
        initializer_range=0.02,
    ),
    "quickstart": ModelConfig(
        vocab_size=4_096,
        hidden_size=256,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=704,
        rope_theta=10_000.0,
        max_seq_len=1_024,
        initializer_range=1 / 16,
    ),
}
