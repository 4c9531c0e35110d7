"""Faster forms of the model's functions for each device, checked against the reference."""

from smollm_jax.kernels.select import select_ops

__all__ = ["select_ops"]
