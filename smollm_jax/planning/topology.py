"""Describe devices to plan for that are not here: TPU slice, GPUs or CPU devices.

The library libtpu describes a TPU slice and has its compiler. CPU devices of this process have their own compiler.
GPUs are known by their data sheets only. Nothing here uses the network or claims a TPU.
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from smollm_jax.runtime.devices import quiet_libtpu, total_bytes
from smollm_jax.runtime.errors import UserError, install, require


class Chip(NamedTuple):
    """A kind of device: JAX's name, the memory left to a program, and its rates.

    The interconnect's rate is one way, all links of a chip together. Only TPUs have a torus and a pod.
    """

    device_kind: str
    memory_bytes: int
    memory_bytes_per_second: float
    interconnect_bytes_per_second: float
    torus_dims: int = 0
    pod_chips: int = 0
    compute_capability: str = ""


# TPUs: Google's pages cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, read in November 2026: memory at 1,200, 819,
# 2,765 and 1,600 GB/s; interconnect of 2,400, 1,600, 4,800 and 3,200 Gbit/s one way. Memory of v5e, v5p and v6e:
# the size libtpu 0.0.52 names when a program does not fit; of v4: 32 GiB less the same share as the others.
# GPUs: NVIDIA's data sheets: 80 GB at 2,039 GB/s and NVLink of 600 GB/s both ways (A100 SXM); 40 and 1,555 (A100
# 40 GB); 80, 3,350 and 900 (H100 SXM); 141, 4,800 and 900 (H200 SXM); 180, 8,000 and 1,800 (B200 of an HGX).
# 16 GB at 320 GB/s (T4), 24 at 300 (L4), 600 (A10) and 1,008 (RTX 4090), with PCIe of 32 (T4) or 64 both ways.
# JAX takes three quarters of a GPU (XLA_PYTHON_CLIENT_MEM_FRACTION).
CHIPS = {
    "v4": Chip("TPU v4", int(30.75 * 2**30), 1.2e12, 300e9, torus_dims=3, pod_chips=4_096),
    "v5e": Chip("TPU v5 lite", int(15.75 * 2**30), 819e9, 200e9, torus_dims=2, pod_chips=256),
    "v5p": Chip("TPU v5", int(95.74 * 2**30), 2.765e12, 600e9, torus_dims=3, pod_chips=8_960),
    "v6e": Chip("TPU v6 lite", int(31.25 * 2**30), 1.6e12, 400e9, torus_dims=2, pod_chips=256),
    "gpu-a100": Chip("NVIDIA A100", int(0.75 * 80e9), 2.039e12, 300e9, compute_capability="8.0"),
    "gpu-a100-40": Chip("NVIDIA A100", int(0.75 * 40e9), 1.555e12, 300e9, compute_capability="8.0"),
    "gpu-h100": Chip("NVIDIA H100", int(0.75 * 80e9), 3.35e12, 450e9, compute_capability="9.0"),
    "gpu-h200": Chip("NVIDIA H200", int(0.75 * 141e9), 4.8e12, 450e9, compute_capability="9.0"),
    "gpu-b200": Chip("NVIDIA B200", int(0.75 * 180e9), 8e12, 900e9, compute_capability="10.0"),
    "gpu-t4": Chip("Tesla T4", int(0.75 * 16e9), 320e9, 16e9, compute_capability="7.5"),
    "gpu-l4": Chip("NVIDIA L4", int(0.75 * 24e9), 300e9, 32e9, compute_capability="8.9"),
    "gpu-a10": Chip("NVIDIA A10", int(0.75 * 24e9), 600e9, 32e9, compute_capability="8.6"),
    "gpu-4090": Chip("NVIDIA GeForce RTX 4090", int(0.75 * 24e9), 1.008e12, 32e9, compute_capability="8.9"),
}
GPUS_PER_MACHINE = 8
EXPECTED = (
    f"expected v5e:AxB, v6e:AxB, v4:AxBxC, v5p:AxBxC, {', '.join(f'{name}:N' for name in CHIPS if 'gpu' in name)} "
    "(gpu:N is gpu-h100:N) or cpu:N"
)


@dataclass(frozen=True)
class AbstractDevice:
    """A device that is not here, with the attributes that mesh and kernel selection read."""

    id: int
    platform: str
    device_kind: str
    compute_capability: str = ""
    process_index: int = 0


@dataclass(frozen=True)
class Topology:
    """Devices to plan for. `compiles`: their compiler is available here. A CPU has no `chip`."""

    name: str
    devices: list[Any]
    memory_bytes: int
    chip: Chip | None
    compiles: bool


def topology_of(topology: str) -> Topology:
    """Return the devices of NAME:AxB, NAME:AxBxC or NAME:N. Raises `UserError` for any other name."""
    name, _, shape = topology.partition(":")
    name = "gpu-h100" if name == "gpu" else name
    chip, dims = CHIPS.get(name), [int(dim) if dim.isdecimal() else 0 for dim in shape.split("x")]
    is_torus = chip is not None and chip.torus_dims > 0
    known = (chip is not None or name == "cpu") and all(dims) and (is_torus or len(dims) == 1)
    require(known, f"--topology {topology}: {EXPECTED}")
    topology, count = f"{name}:{'x'.join(map(str, dims))}", math.prod(dims)
    if chip is None:
        here = jax.devices("cpu")
        devices = here[:count] if count <= len(here) else [AbstractDevice(i, "cpu", "cpu") for i in range(count)]
        return Topology(topology, devices, total_bytes(here[0], devices=count), chip, compiles=count <= len(here))
    if is_torus:
        require(
            len(dims) == chip.torus_dims, f"--topology {topology}: {name} has {chip.torus_dims} dims; {EXPECTED}"
        )
        require(count <= chip.pod_chips, f"--topology {topology}: a pod of {name} has {chip.pod_chips:,} chips")
        return Topology(topology, _tpu_slice(topology, count), chip.memory_bytes, chip, compiles=True)
    kind, capability = chip.device_kind, chip.compute_capability
    gpus = [AbstractDevice(i, "gpu", kind, capability, process_index=i // GPUS_PER_MACHINE) for i in range(count)]
    return Topology(topology, gpus, chip.memory_bytes, chip, compiles=False)


def _tpu_slice(topology: str, chips: int) -> list[Any]:
    has_libtpu = importlib.util.find_spec("libtpu") is not None
    require(has_libtpu, f"a plan for a TPU needs its compiler, libtpu: {install('plan')}")
    quiet_libtpu()
    # a program sees the two cores of a v4, as of a v5p, as one device
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(f"--topology {topology}: libtpu knows no such slice: {error}") from None
