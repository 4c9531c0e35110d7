"""What is known of the devices: peak FLOP/s for the MFU, memory for the remat choice.

Peaks are the vendors' dense bf16 figures (no sparsity); an unknown device has none and reports no MFU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

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
MEMORY_SHARE = 0.9  # of what the device has; the rest is left to the runtime and the evaluation


def peak_flops(device: Any) -> float | None:
    """Dense bf16 FLOP/s of one device, None where it is not known."""
    kind = device.device_kind
    return next((tera * 1e12 for name, tera in PEAK_TFLOPS.items() if name in kind), None)


def memory_bytes(device: Any) -> int:
    """Bytes a program may use on one device; on a CPU, a share of what the machine or container has."""
    stats = device.memory_stats() or {}
    total = stats.get("bytes_limit") or min(_machine_bytes(), _container_bytes())
    return int(total * MEMORY_SHARE)


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
