"""Find a device's peak FLOP/s (for MFU), memory (for remat), compute dtype, compilation cache.

Peaks are the vendors' dense figures (no sparsity). An unknown device or dtype has no peak, and its run no MFU.
"""

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from glob import glob
from pathlib import Path
from typing import Any

from smollm_jax.runtime.errors import require, say

# TFLOP/s in bfloat16, float16 and float32, dense, sums in float32: NVIDIA's data sheets, Google Cloud's TPU pages.
# The first name that is part of a device's kind counts. GPUs compute float32 without tensor cores here
# (`use_precision_of`). A TPU has no float32 products, and takes several of bfloat16 for one
PEAK_TFLOPS: dict[str, tuple[float | None, float | None, float | None]] = {
    "B200": (2_250, 2_250, 75), "H200": (989, 989, 67), "H100 PCIe": (756, 756, 51), "H100 NVL": (835, 835, 60),
    "H100": (989, 989, 67), "A100": (312, 312, 19.5), "A10G": (70, 70, 35), "A10": (125, 125, 31.2),
    "RTX 4090": (165, 165, 82.6), "L40S": (362, 362, 91.6), "L40": (181, 181, 90.5), "L4": (121, 121, 30.3),
    "T4": (None, 65, 8.1), "V100": (None, 125, 15.7),
    "TPU v4": (275, None, None), "TPU v5 lite": (197, None, None), "TPU v5e": (197, None, None),
    "TPU v5p": (459, None, None), "TPU v5": (459, None, None), "TPU v6 lite": (918, None, None),
    "TPU v6e": (918, None, None),
}  # fmt: skip
PEAK_DTYPES = ("bfloat16", "float16", "float32")
TRITON_CAPABILITY = 8.0  # Ampere: older GPUs have no bfloat16, and Triton compiles our kernels for none
# libtpu must not ask the network which TPU this is, complain that there is none, or claim a TPU for this process
# alone, because another plan or a run may hold that TPU. Set before libtpu is loaded
QUIET_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg", *TPU_FILES)
MEMORY_SHARE = 0.9  # of a device's memory. The rest is for the runtime and the evaluation
# A CPU run's process shares the memory: libraries and compiler take PROCESS_BYTES. A save copies the state, and
# the writer converts the moments: of AdamW 12 and 8 bytes a parameter. Three runs of 135M, with steps of 3.3, 7.2
# and 20 GiB, took within 8 % of this sum.
PROCESS_BYTES = 600 * 2**20
CACHED_COMPILE_SECONDS = 0.5  # a program that compiles faster than this is not worth a file


def has_accelerator() -> bool:
    """Return whether JAX may use a GPU or TPU here. Does not ask JAX, which would take the device's memory."""
    return os.environ.get("JAX_PLATFORMS") != "cpu" and any(glob(files) for files in DEVICE_FILES)


def quiet_libtpu() -> None:
    """Keep libtpu, which may be installed to plan with, from asking and complaining. Call before JAX starts."""
    os.environ |= QUIET_LIBTPU | os.environ


def device_name(device: Any) -> str:
    """Return the kind of a device; of a CPU, the processor's name if the system tells it."""
    info = Path("/proc/cpuinfo")
    if device.platform != "cpu" or not info.is_file():
        return str(device.device_kind)
    names = (line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name"))
    return next(names, device.device_kind)


def peak_flops(device: Any, dtype: Any) -> float | None:
    """Return the dense FLOP/s of one device in a compute dtype, None if unknown."""
    peaks = next((peaks for name, peaks in PEAK_TFLOPS.items() if name in device.device_kind), ())
    tera = dict(zip(PEAK_DTYPES, peaks, strict=False)).get(dtype.name)
    return None if tera is None else tera * 1e12


def memory_bytes(device: Any, saved_bytes: int, *, devices: int = 1, share: float = MEMORY_SHARE) -> int:
    """Return the bytes that a step may use on each of a process's `devices`. A save takes `saved_bytes`."""
    beside = beside_the_step(device.platform, saved_bytes, devices=devices)
    return max(0, int(free_bytes(device, devices=devices) * share) - beside)


def beside_the_step(platform: str, saved_bytes: int, *, devices: int = 1) -> int:
    """Return the bytes per device that a run needs besides its step. A CPU's `devices` share the process."""
    return (PROCESS_BYTES + saved_bytes) // devices if platform == "cpu" else 0


def total_bytes(device: Any, *, devices: int = 1) -> int:
    """Return the memory of one device in bytes. A CPU device has its share of the machine or container."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        container = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        container = machine
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or min(machine, container) // devices


def free_bytes(device: Any, *, devices: int = 1) -> int:
    """Return the memory of a device that a run can have. On a CPU: what nobody holds now, swap included."""
    total = total_bytes(device, devices=devices)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        free = (kib["MemAvailable"] + kib["SwapFree"]) * 1_024
    except (OSError, ValueError, KeyError, IndexError):  # not Linux
        return total
    return min(total, free // devices) if device.platform == "cpu" else total


def matmul_rate(device: Any, dtype: Any) -> float:
    """Return the FLOP/s of one large matmul on `device`. A step can come only near this speed."""
    import jax
    import jax.numpy as jnp

    size = 1_024 if device.platform == "cpu" else 8_192
    with jax.default_device(device):
        x = jnp.ones((size, size), dtype)
        multiply = jax.jit(jnp.matmul).lower(x, x).compile()
        times = []
        for _ in range(4):
            began = time.perf_counter()
            multiply(x, x).block_until_ready()
            times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def peak_memory(device: Any) -> int:
    """Return the most memory in bytes that this process has held, on accelerator or machine."""
    stats = device.memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1_024
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compute_dtype(asked: str, platform: str) -> Any:
    """Return the compute dtype requested. "auto" is float32 on a CPU and bfloat16 elsewhere."""
    import jax.numpy as jnp

    auto = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(auto if asked == "auto" else asked)


def training_dtype(asked: str, device: Any) -> Any:
    """Return the dtype that a run computes in on `device`. Raises `UserError` for float16 on a TPU.

    As `compute_dtype`, but "auto" is float16 on a GPU without bfloat16: such a GPU computes bfloat16 in float32.
    """
    fits = asked != "float16" or device.platform != "tpu"
    require(fits, "--dtype float16 is for GPUs without bfloat16; a TPU computes in bfloat16: give that, or auto")
    half = "float16" if asked == "auto" and lacks_bfloat16(device) else asked
    return compute_dtype(half, device.platform)


def lacks_bfloat16(device: Any) -> bool:
    """Return whether a device is an NVIDIA GPU before Ampere, such as T4 and V100."""
    try:
        return device.platform == "gpu" and float(device.compute_capability) < TRITON_CAPABILITY
    except (AttributeError, ValueError):  # AMD has names such as gfx942
        return False


def use_precision_of(dtype: Any) -> None:
    """Compute this process's float32 matmuls in float32. GPU and TPU would round the operands down."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest" if dtype.name == "float32" else None)


@contextmanager
def precision_of(dtype: Any) -> Iterator[None]:
    """Do as `use_precision_of` for what is traced inside, whatever the process has set."""
    import jax

    with jax.default_matmul_precision("highest") if dtype.name == "float32" else nullcontext():
        yield


def use_compilation_cache(folder: str) -> None:
    """Keep compiled programs in `folder` between processes. Keeps none for "", or for an unknown home folder."""
    import jax

    folder = os.path.expanduser(folder)
    if folder.startswith("~"):
        say(f"compiled programs are not kept: there is no {folder}; set HOME to keep them")
    elif folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", CACHED_COMPILE_SECONDS)
