"""The Python interface: train, load, generate, score and serve, text in and text out, in scripts and notebooks."""

from smollm_jax.api.model import Model, TokenLogprob, load
from smollm_jax.api.run import Run
from smollm_jax.api.server import Server, serve
from smollm_jax.api.training import train

__all__ = ["Model", "Run", "Server", "TokenLogprob", "load", "serve", "train"]
