"""Manage the process and its machine: errors, exit codes, signals, threads, files, retries and devices."""

from smollm_jax.runtime.errors import SourceTimeout, UserError, require, run_main
from smollm_jax.runtime.signals import StopRequest

__all__ = ["SourceTimeout", "StopRequest", "UserError", "require", "run_main"]
