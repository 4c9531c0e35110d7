"""Define the transformer and its loss in plain JAX. No mesh, no kernel and no Hugging Face name here."""

from smollm_jax.model.attention import packed_attention
from smollm_jax.model.loss import summed_nll, token_logprobs
from smollm_jax.model.ops import REFERENCE, Ops
from smollm_jax.model.transformer import SmolLM, init_params, params_of

__all__ = [
    "REFERENCE",
    "Ops",
    "SmolLM",
    "init_params",
    "packed_attention",
    "params_of",
    "summed_nll",
    "token_logprobs",
]
