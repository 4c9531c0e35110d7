"""Generate token ids from a model: decoder with a cache, generator, sampling. No tokenizer here."""

from smollm_jax.generation.generator import Generator, generate
from smollm_jax.generation.sampling import Sampling

__all__ = ["Generator", "Sampling", "generate"]
