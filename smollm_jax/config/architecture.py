"""The architecture of a model, and the published presets."""

from __future__ import annotations

from dataclasses import dataclass, field

from smollm_jax.config.fields import ABOVE_0, AT_LEAST_1, FREE, check_fields
from smollm_jax.runtime.errors import require

# The dims of each parameter, by the letters of model/transformer.py, in the order of the model's tree.
PARAMETER_DIMS = {
    "embedding": "VD",
    "blocks/attention_norm/scale": "LD",
    "blocks/attention/q": "LDNH",
    "blocks/attention/k": "LDKH",
    "blocks/attention/v": "LDKH",
    "blocks/attention/o": "LNHD",
    "blocks/mlp_norm/scale": "LD",
    "blocks/mlp/gate": "LDF",
    "blocks/mlp/up": "LDF",
    "blocks/mlp/down": "LFD",
    "final_norm/scale": "D",
    "head": "VD",
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: the numbers of a published `config.json`."""

    vocab_size: int = field(default=49_152, metadata=AT_LEAST_1)
    hidden_size: int = field(default=576, metadata=AT_LEAST_1)
    num_layers: int = field(default=30, metadata=AT_LEAST_1)
    num_heads: int = field(default=9, metadata=AT_LEAST_1)
    num_kv_heads: int = field(default=3, metadata=AT_LEAST_1)
    head_dim: int = field(default=64, metadata=AT_LEAST_1)
    intermediate_size: int = field(default=1_536, metadata=AT_LEAST_1)
    rms_norm_eps: float = field(default=1e-5, metadata=ABOVE_0)
    rope_theta: float = field(default=100_000.0, metadata=ABOVE_0)
    max_seq_len: int = field(default=8_192, metadata=AT_LEAST_1)
    initializer_range: float = field(default=1 / 24, metadata=ABOVE_0)
    tie_embeddings: bool = True
    bos_token_id: int = field(default=0, metadata=FREE)
    eos_token_id: int = field(default=0, metadata=FREE)

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}; "
            "SmolLM2-135M uses 9 and 3",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE turns pairs")

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * block + self.hidden_size

    @property
    def dim_sizes(self) -> dict[str, int]:
        """The size of each letter in `PARAMETER_DIMS`."""
        return {
            "V": self.vocab_size, "D": self.hidden_size, "F": self.intermediate_size, "L": self.num_layers,
            "N": self.num_heads, "K": self.num_kv_heads, "H": self.head_dim,
        }  # fmt: skip

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


def parameter_shapes(config: ModelConfig, *, one_layer: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by its path; `one_layer` leaves the layer dim out."""
    return {
        path: tuple(config.dim_sizes[letter] for letter in letters if not (one_layer and letter == "L"))
        for path, letters in PARAMETER_DIMS.items()
        if not (path == "head" and config.tie_embeddings)
    }
