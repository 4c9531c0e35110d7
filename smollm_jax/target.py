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

from smollm_jax.config import UserError, require
from smollm_jax.hardware import CHIPS, Chip, total_bytes

TPUS = ("v4", "v5e", "v5p", "v6e")
GPUS_A_MACHINE = 8
GPUS = {"gpu-a100": "8.0", "gpu-h100": "9.0", "gpu-h200": "9.0"}  # compute capability
FLAT = {"v5e", "v6e"}  # tori of two dims
MOST_CHIPS = {"v4": 4_096, "v5e": 256, "v5p": 8_960, "v6e": 256}  # of a pod: Google's page of each
EXPECTED = (
    "expected v5e:AxB or v6e:AxB, v4:AxBxC or v5p:AxBxC, gpu-a100:N, gpu-h100:N, gpu-h200:N (gpu:N) or cpu:N"
)


@dataclass(frozen=True)
class Absent:
    """A device that is not here, as the rules of mesh and kernel look at one."""

    id: int
    platform: str
    device_kind: str
    compute_capability: str = ""
    process_index: int = 0


@dataclass(frozen=True, kw_only=True)
class Target:
    """Devices to plan for. `compiles` says whether their compiler is at hand; a CPU has no `chip`."""

    name: str
    devices: list[Any]
    memory_bytes: int
    chip: Chip | None
    compiles: bool


def target_of(topology: str) -> Target:
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


def _tpu(name: str, dims: list[int]) -> Target:
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
    return Target(
        name=topology,
        devices=list(devices),
        memory_bytes=CHIPS[name].memory_bytes,
        chip=CHIPS[name],
        compiles=True,
    )


def _gpu(name: str, count: int) -> Target:
    chip = CHIPS[name]
    devices = [Absent(i, "gpu", chip.device_kind, GPUS[name], i // GPUS_A_MACHINE) for i in range(count)]
    return Target(
        name=f"{name}:{count}", devices=devices, memory_bytes=chip.memory_bytes, chip=chip, compiles=False
    )


def _cpu(count: int) -> Target:
    here = jax.devices("cpu")
    compiles = len(here) >= count
    devices = here[:count] if compiles else [Absent(i, "cpu", "cpu") for i in range(count)]
    memory = total_bytes(here[0], devices=count)
    return Target(name=f"cpu:{count}", devices=devices, memory_bytes=memory, chip=None, compiles=compiles)


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
