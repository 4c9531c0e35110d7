"""Define low-rank adapters: settings, arrays and formula.

An adapter changes a frozen matrix W by s·A·B, with s = alpha / rank (LoRA, Hu et al. 2021). DoRA (Liu et al. 2024)
also learns the length of each output's weights. The formula serves numpy and JAX arrays, in training and on merge.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smollm_jax.config.architecture import ADAPTED, ModelConfig, adapter_dims, sizes_of
from smollm_jax.config.fields import check_fields, setting
from smollm_jax.runtime.errors import require

TARGETS = tuple(path.split("/")[-1] for path in ADAPTED)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank adapters over the frozen weights of --init-from."""

    lora_rank: int = setting(0, "0 or more")
    """Train adapters of this rank, and keep the weights of --init-from as they are (0: train all weights)."""
    lora_alpha: float | None = setting(None, "above 0")
    """Scale of the adapters times their rank. Default: twice the rank."""
    lora_targets: str = ",".join(TARGETS)  # Matrices that get an adapter.
    dora: bool = False  # Learn the length of each output's weights too (DoRA).

    def __post_init__(self) -> None:
        check_fields(self)
        asked = [target.strip() for target in self.lora_targets.split(",")]
        for target in asked:
            require(target in TARGETS, f"lora_targets={target!r}: expected some of {', '.join(TARGETS)}")
        require(len(set(asked)) == len(asked), f"lora_targets={self.lora_targets} names a matrix twice")
        for name in ("lora_alpha", "lora_targets", "dora"):
            value = getattr(self, name)
            used = self.lora_rank > 0 or value == getattr(AdapterConfig, name)
            require(used, f"{name}={value} is for adapters: give --lora-rank, such as 16")

    @property
    def is_on(self) -> bool:
        return self.lora_rank > 0

    @property
    def alpha(self) -> float:
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def scale(self) -> float:
        return self.alpha / self.lora_rank

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the paths of the adapted matrices, in the order of the model's tree."""
        asked = {target.strip() for target in self.lora_targets.split(",")}
        return tuple(path for path in ADAPTED if path.split("/")[-1] in asked)

    def trained_parameters(self, model: ModelConfig) -> int:
        """Return the number of parameters that have an optimizer: of the adapters, or all."""
        return sum(map(math.prod, adapter_shapes(self, model).values())) if self.is_on else model.num_parameters


def adapter_shapes(config: AdapterConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each adapter array by its path: `q_A` (L, in, r), `q_B` (L, r, out), `q_m` (L, out)."""
    sizes = sizes_of(model) | {"R": config.lora_rank}
    return {
        f"{path}_{part}": tuple(sizes[letter] for letter in dims)
        for path in config.targets
        for part, dims in adapter_dims(path).items()
        if part != "m" or config.dora
    }


def apply_adapters(
    weights: dict[str, Any], adapters: dict[str, Any], scale: float, constant: Callable[[Any], Any] = lambda x: x
) -> dict[str, Any]:
    """Return the f32 weights by path with their adapters in them. Paths and arrays have a layer dim or not.

    `constant` stops the gradient of DoRA's norm (Liu et al. 2024, section 4.3).
    """
    merged = dict(weights)
    for path in ADAPTED:
        if f"{path}_A" in adapters:
            A, B, m = adapters[f"{path}_A"], adapters[f"{path}_B"], adapters.get(f"{path}_m")
            merged[path] = adapted(weights[path].astype("float32"), scale * A, B, m, constant)
    return merged


def adapted(W: Any, A: Any, B: Any, m: Any, constant: Callable[[Any], Any]) -> Any:
    """Return W + A·B, with outputs of the lengths `m` unless None. All f32, with leading layer dims or none."""
    lead, rank = A.shape[: A.ndim + B.ndim - W.ndim - 2], A.shape[-1]
    inputs = W.shape[len(lead) : A.ndim - 1]
    product = A.reshape(*lead, -1, rank) @ B.reshape(*lead, rank, -1)
    whole = W + product.reshape(W.shape)
    if m is None:
        return whole
    norm = constant(lengths(whole, len(lead), len(inputs)))
    return whole * (m / norm).reshape(*lead, *(1 for _ in inputs), *m.shape[len(lead) :])


def lengths(W: Any, lead: int, inputs: int) -> Any:
    """Return the length of each output's weights over the `inputs` dims that follow `lead` layer dims."""
    return (W * W).sum(axis=tuple(range(lead, lead + inputs))) ** 0.5
