"""What is known of the devices: peak FLOP/s for the MFU, memory for the remat choice.

Peaks are the vendors' dense bf16 figures (no sparsity); an unknown device has none and reports no MFU.
"""

from __future__ import annotations

import os
from typing import Any

# TFLOP/s, bf16, dense: NVIDIA's data sheets, Google Cloud's TPU pages
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
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
    """Bytes a program may use on one device; on a CPU, a share of the machine's memory."""
    stats = device.memory_stats() or {}
    total = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(total * MEMORY_SHARE)
