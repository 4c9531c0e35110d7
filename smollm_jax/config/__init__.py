"""Define the settings of a run: dataclasses with checks, recipes, presets, and their JSON."""

from smollm_jax.config.architecture import MODELS, ModelConfig
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.serialization import from_dict, to_dict
from smollm_jax.config.settings import ComputeConfig, Config, DataConfig, OptimizerConfig, RunConfig

__all__ = [
    "MODELS", "RECIPES", "ComputeConfig", "Config", "DataConfig", "ModelConfig", "OptimizerConfig", "RunConfig",
    "from_dict", "to_dict",
]  # fmt: skip
