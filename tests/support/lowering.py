"""Programs lowered for a GPU on a machine that has none."""

from contextlib import nullcontext
from types import SimpleNamespace

import jax

KERNEL = "@__gpu$xla.gpu.triton"
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")


def lowered_for_cuda(jitted, *given):
    """The program's text; from jax 0.11 on the lowering asks what GPU it is for."""
    describe = getattr(jax.sharding, "AbstractDevice", None)
    where = nullcontext()
    if describe is not None:
        gpu = describe(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
        where = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=gpu))
    with where:
        return jitted.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
