"""Compute the model's functions faster on each device, checked against the reference."""

from smollm_jax.kernels.select import select_ops

__all__ = ["select_ops"]
