"""Define the architecture of a model, and the published presets."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from smollm_jax.config.fields import check_fields, setting
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

# How many dims of each matrix, after the layer dim, are its inputs. An adapter goes around these matrices, and
# Muon orthogonalizes their updates.
ADAPTED = {
    "blocks/attention/q": 1,
    "blocks/attention/k": 1,
    "blocks/attention/v": 1,
    "blocks/attention/o": 2,
    "blocks/mlp/gate": 1,
    "blocks/mlp/up": 1,
    "blocks/mlp/down": 1,
}


def adapter_dims(path: str) -> dict[str, str]:
    """Return the dims of the adapter arrays A, B and m of a matrix. R is the rank."""
    dims, count = PARAMETER_DIMS[path].removeprefix("L"), ADAPTED[path]
    inputs, outputs = dims[:count], dims[count:]
    return {"A": f"L{inputs}R", "B": f"LR{outputs}", "m": f"L{outputs}"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: the numbers of a published `config.json`."""

    vocab_size: int = setting(49_152, "at least 1")
    """Entries of the embedding. Default: the tokenizer's, unless it is the recipe's own."""
    hidden_size: int = setting(576, "at least 1")
    num_layers: int = setting(30, "at least 1")
    num_heads: int = setting(9, "at least 1")
    num_kv_heads: int = setting(3, "at least 1")
    head_dim: int = setting(64, "at least 1")
    intermediate_size: int = setting(1_536, "at least 1")
    rms_norm_eps: float = setting(1e-5, "above 0")
    rope_theta: float = setting(100_000.0, "above 0")
    max_seq_len: int = setting(8_192, "at least 1")
    initializer_range: float = setting(1 / 24, "above 0")
    tie_embeddings: bool = True
    bos_token_id: int | None = setting(0, resume="free")
    eos_token_id: int | None = setting(0, resume="free")
    extra_eos_token_ids: tuple[int, ...] = setting((), resume="free")  # Further ids that end a text.
    pad_token_id: int | None = setting(None, resume="free")

    def __post_init__(self) -> None:
        check_fields(self)
        heads, kv = self.num_heads, self.num_kv_heads
        fits = heads % kv == 0
        require(fits, f"num_heads={heads} must be a multiple of num_kv_heads={kv}; SmolLM2-135M uses 9 and 3")
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE turns pairs")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the ids that end a text."""
        eos = () if self.eos_token_id is None else (self.eos_token_id,)
        return (*eos, *self.extra_eos_token_ids)

    def ending_at(self, ids: Iterable[int]) -> Self:
        """Return the same model, but ending a text at `ids`. The first id is the eos."""
        once = tuple(dict.fromkeys(ids))
        return replace(self, eos_token_id=next(iter(once), None), extra_eos_token_ids=once[1:])

    @property
    def num_parameters(self) -> int:
        """Count the parameters, a tied head once."""
        return sum(map(math.prod, parameter_shapes(self).values()))

    def flops_per_token(self, seq_len: int) -> int:
        """Count forward and backward FLOPs per token of a causal row, without remat.

        The row has `seq_len` tokens. Each matrix weight counts 6 (Kaplan et al. 2020, the head included).
        Attention counts 6·L·T·N·H, the causal half of PaLM's 12·L·T·N·H (Chowdhery et al. 2022, appendix B).
        """
        lookup_only = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        attention = 6 * self.num_layers * seq_len * self.num_heads * self.head_dim
        return 6 * (self.num_parameters - lookup_only) + attention


MODELS = {
    "135M": ModelConfig(),
    "360M": ModelConfig(hidden_size=960, num_layers=32, num_heads=15, num_kv_heads=5, intermediate_size=2_560),
    "1.7B": ModelConfig(
        hidden_size=2_048, num_layers=24, num_heads=32, num_kv_heads=32, intermediate_size=8_192,
        rope_theta=130_000.0, initializer_range=0.02,
    ),
    "quickstart": ModelConfig(
        vocab_size=4_096, hidden_size=256, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=704,
        rope_theta=10_000.0, max_seq_len=1_024, initializer_range=1 / 16,
    ),
}  # fmt: skip


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """Return the size of each dim by its letter."""
    return {
        "V": config.vocab_size, "D": config.hidden_size, "F": config.intermediate_size, "L": config.num_layers,
        "N": config.num_heads, "K": config.num_kv_heads, "H": config.head_dim,
    }  # fmt: skip


def parameter_shapes(config: ModelConfig, *, one_layer: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by its path. `one_layer` leaves the layer dim out."""
    sizes = sizes_of(config)
    return {
        path: tuple(sizes[letter] for letter in dims if not (one_layer and letter == "L"))
        for path, dims in PARAMETER_DIMS.items()
        if not (path == "head" and config.tie_embeddings)
    }
