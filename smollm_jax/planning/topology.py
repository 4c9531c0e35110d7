"""The devices that a plan is for: a TPU slice as libtpu knows it, GPUs by what is known of them, CPU devices.

Only the first and the last have a compiler at hand. No network is asked, and no TPU is claimed.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from smollm_jax.runtime.devices import total_bytes
from smollm_jax.runtime.errors import UserError, require

TPUS = ("v4", "v5e", "v5p", "v6e")
GPUS_A_MACHINE = 8
GPUS = {"gpu-a100": "8.0", "gpu-h100": "9.0", "gpu-h200": "9.0"}  # compute capability
FLAT = {"v5e", "v6e"}  # tori of two dims
MOST_CHIPS = {"v4": 4_096, "v5e": 256, "v5p": 8_960, "v6e": 256}  # of a pod: Google's page of each
EXPECTED = (
    "expected v5e:AxB or v6e:AxB, v4:AxBxC or v5p:AxBxC, gpu-a100:N, gpu-h100:N, gpu-h200:N (gpu:N) or cpu:N"
)


@dataclass(frozen=True)
class AbstractDevice:
    """A device that is not here, as the rules of mesh and kernel look at one."""

    id: int
    platform: str
    device_kind: str
    compute_capability: str = ""
    process_index: int = 0


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to plan for. `compiles` says whether their compiler is at hand; a CPU has no `chip`."""

    name: str
    devices: list[Any]
    memory_bytes: int
    chip: Chip | None
    compiles: bool


def topology_of(topology: str) -> Topology:
    """The devices called NAME:AxB, NAME:AxBxC or NAME:N; raises `ValueError` in one line."""
    name, _, shape = topology.partition(":")
    name = "gpu-h100" if name == "gpu" else name
    known = name == "cpu" or name in CHIPS
    dims = shape.split("x")
    require(known and all(dim.isdecimal() and int(dim) > 0 for dim in dims), f"--topology {topology}: {EXPECTED}")
    if name in TPUS:
        return _tpu(name, [int(dim) for dim in dims])
    require(len(dims) == 1, f"--topology {topology}: {EXPECTED}")
    return _gpu(name, int(shape)) if name in GPUS else _cpu(int(shape))


def _tpu(name: str, dims: list[int]) -> Topology:
    topology = f"{name}:{'x'.join(map(str, dims))}"
    needed = 2 if name in FLAT else 3
    require(len(dims) == needed, f"--topology {topology}: {name} has {needed} dims; {EXPECTED}")
    chips = math.prod(dims)
    require(chips <= MOST_CHIPS[name], f"--topology {topology}: a pod of {name} has {MOST_CHIPS[name]:,} chips")
    require(
        importlib.util.find_spec("libtpu") is not None,
        "a plan for a TPU needs its compiler, libtpu: pip install 'smollm-jax[plan]'",
    )
    _keep_libtpu_quiet()
    # of a v4's two cores, as of a v5p's, a program sees one device
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name == "v4" else {}
    if chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(f"--topology {topology}: libtpu knows no such slice: {error}") from None
    return Topology(
        name=topology,
        devices=list(devices),
        memory_bytes=CHIPS[name].memory_bytes,
        chip=CHIPS[name],
        compiles=True,
    )


def _gpu(name: str, count: int) -> Topology:
    chip = CHIPS[name]
    devices = [AbstractDevice(i, "gpu", chip.device_kind, GPUS[name], i // GPUS_A_MACHINE) for i in range(count)]
    return Topology(
        name=f"{name}:{count}", devices=devices, memory_bytes=chip.memory_bytes, chip=chip, compiles=False
    )


def _cpu(count: int) -> Topology:
    here = jax.devices("cpu")
    compiles = len(here) >= count
    devices = here[:count] if compiles else [AbstractDevice(i, "cpu", "cpu") for i in range(count)]
    memory = total_bytes(here[0], devices=count)
    return Topology(name=f"cpu:{count}", devices=devices, memory_bytes=memory, chip=None, compiles=compiles)


def _keep_libtpu_quiet() -> None:
    """Before it is loaded: not to ask the network which TPU this is, nor complain that it is none, nor claim a TPU
    for this process alone, which another plan or a run may have.
    """
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of device as a plan sees it."""

    device_kind: str
    """As JAX names it; the key to its peak."""
    memory_bytes: int
    """What a program can have: the vendor's figure less what the runtime keeps."""
    memory_bytes_per_second: float
    interconnect_bytes_per_second: float
    """One way, all links of a chip together."""


# Of Google's pages cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, read in November 2026: memory at 1,200, 819,
# 2,765 and 1,600 GB/s; interconnect of 2,400, 1,600, 4,800 and 3,200 Gbit/s one way. Memory of v5e, v5p and v6e:
# what libtpu 0.0.52 says is there when a program does not fit; of v4: 32 GiB less as much as of the others.
# Of NVIDIA's data sheets: 80 GB at 2,039 GB/s and NVLink of 600 GB/s both ways (A100 SXM); 80, 3,350 and 900
# (H100 SXM); 141, 4,800 and 900 (H200 SXM). JAX takes three quarters of a GPU (XLA_PYTHON_CLIENT_MEM_FRACTION).
CHIPS = {
    "v4": Chip(
        device_kind="TPU v4",
        memory_bytes=int(30.75 * 2**30),
        memory_bytes_per_second=1.2e12,
        interconnect_bytes_per_second=300e9,
    ),
    "v5e": Chip(
        device_kind="TPU v5 lite",
        memory_bytes=int(15.75 * 2**30),
        memory_bytes_per_second=819e9,
        interconnect_bytes_per_second=200e9,
    ),
    "v5p": Chip(
        device_kind="TPU v5",
        memory_bytes=int(95.74 * 2**30),
        memory_bytes_per_second=2.765e12,
        interconnect_bytes_per_second=600e9,
    ),
    "v6e": Chip(
        device_kind="TPU v6 lite",
        memory_bytes=int(31.25 * 2**30),
        memory_bytes_per_second=1.6e12,
        interconnect_bytes_per_second=400e9,
    ),
    "gpu-a100": Chip(
        device_kind="NVIDIA A100",
        memory_bytes=int(0.75 * 80e9),
        memory_bytes_per_second=2.039e12,
        interconnect_bytes_per_second=300e9,
    ),
    "gpu-h100": Chip(
        device_kind="NVIDIA H100",
        memory_bytes=int(0.75 * 80e9),
        memory_bytes_per_second=3.35e12,
        interconnect_bytes_per_second=450e9,
    ),
    "gpu-h200": Chip(
        device_kind="NVIDIA H200",
        memory_bytes=int(0.75 * 141e9),
        memory_bytes_per_second=4.8e12,
        interconnect_bytes_per_second=450e9,
    ),
}
