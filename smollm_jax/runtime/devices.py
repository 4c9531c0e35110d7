"""What is known of the devices: peak FLOP/s for the MFU, memory for the remat choice, and how fast memory and
interconnect are, for plans.

Peaks are the vendors' dense bf16 figures (no sparsity); an unknown device has none and reports no MFU.
"""

from __future__ import annotations

import os
import sys
from glob import glob
from pathlib import Path
from typing import Any

import jax

from smollm_jax.config.settings import Config

# TFLOP/s, bf16, dense: NVIDIA's data sheets, Google Cloud's TPU pages
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "T4": 65,
    "V100": 125,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
}


TRITON_CAPABILITY = 8.0  # Ampere: what the GPU kernels are compiled by begins with it
DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
MEMORY_SHARE = 0.9  # of what the device has; the rest is left to the runtime and the evaluation
# On a CPU a run's process lives in the same memory: libraries and compiler; of each parameter, a save's copy of
# the state (12 bytes), and what the writer makes of the moments (8). Three runs of 135M, with steps of 3.3, 7.2
# and 20 GiB, took within 8 % of all that.
PROCESS_BYTES, SAVED_BYTES = 600 * 2**20, 20


def has_accelerator() -> bool:
    """Whether the machine seems to have a GPU or TPU, and JAX may use it; told without JAX, which would take its
    memory."""
    return os.environ.get("JAX_PLATFORMS") != "cpu" and any(glob(files) for files in DEVICE_FILES)


def peak_flops(device: Any) -> float | None:
    """Dense bf16 FLOP/s of one device, None where it is not known."""
    kind = device.device_kind
    return next((tera * 1e12 for name, tera in PEAK_TFLOPS.items() if name in kind), None)


def memory_bytes(device: Any, parameters: int, *, devices: int = 1) -> int:
    """Bytes that the step of a model may use on each of the `devices` of a process."""
    beside = beside_the_step(device.platform, parameters, devices=devices)
    return max(0, int(total_bytes(device, devices=devices) * MEMORY_SHARE) - beside)


def beside_the_step(platform: str, parameters: int, *, devices: int = 1) -> int:
    """Bytes that a run takes of a device's memory besides its step; on a CPU the process's `devices` share it."""
    return (PROCESS_BYTES + SAVED_BYTES * parameters) // devices if platform == "cpu" else 0


def total_bytes(device: Any, *, devices: int = 1) -> int:
    """Bytes of one device's memory; on a CPU, its part of the machine's or the container's."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or min(_machine_bytes(), _container_bytes()) // devices


def compute_dtype(asked: str, platform: str) -> Any:
    """The dtype that "auto" comes to on a platform, or the one asked for."""
    import jax.numpy as jnp

    if asked == "auto":
        return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    return jnp.dtype(asked)


def use_precision_of(dtype: Any) -> None:
    """Have matrix products of float32 done in float32: GPU and TPU would round the operands down."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest" if dtype.name == "float32" else None)


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_bytes() -> int:
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return sys.maxsize


def use_compilation_cache(config: Config) -> None:
    if config.compute.compilation_cache_dir:
        folder = os.path.expanduser(config.compute.compilation_cache_dir)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
