"""Which attention over packed rows is for which device, and whether it agrees there with the plain one.

The plain form (plain_attention.py) is the reference, and what a CPU runs. The fused kernels (fused_attention.py)
give the same up to rounding, without the scores ever being in memory. The choice goes by the devices of the mesh,
not by what JAX finds on this machine, so that a program compiled ahead of time for another one gets its kernel.
The letters are those of model.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import AttentionName
from smollm_jax.distributed.sharding import BATCH_AXES
from smollm_jax.kernels.check import disagreement, loss_disagreement
from smollm_jax.kernels.cpu import as_bits, wide_product
from smollm_jax.kernels.embedding import repeatable_lookup
from smollm_jax.model.attention import packed_attention
from smollm_jax.model.loss import Score, reference_cross_entropy
from smollm_jax.model.ops import Keep, Kernel, Lookup, Product, as_they_are, reference_embed, reference_linear
from smollm_jax.runtime.devices import TRITON_CAPABILITY
from smollm_jax.runtime.errors import require

if TYPE_CHECKING:
    from smollm_jax.model.ops import Joined


PLATFORM = {"splash": "tpu", "pallas": "gpu"}


def is_of_gpu(name: AttentionName) -> bool:
    """Whether the kernel is a GPU's, which brings those of the loss and the layers with it."""
    return PLATFORM.get(name) == "gpu"


def choose(asked: AttentionName, device: Any, dtype: Any) -> tuple[AttentionName, str]:
    """The kernel for `device`, and in words why "auto" came to the plain one where a GPU could have better.

    `asked` is "auto" or a name. Raises `ValueError` for a name that cannot run there.
    """
    if asked == "plain" or (asked == "auto" and device.platform == "cpu"):
        return "plain", ""
    if asked == "auto":
        name: AttentionName = "splash" if device.platform == "tpu" else "pallas"
        obstacle = _obstacle(name, device, dtype)
        return ("plain", f"attention   plain: {obstacle}") if obstacle else (name, "")
    obstacle = _obstacle(asked, device, dtype)
    require(not obstacle, f"attention={asked} cannot run here: {obstacle}; give plain or auto")
    return asked, ""


def _obstacle(name: str, device: Any, dtype: Any) -> str:
    if device.platform != PLATFORM[name]:
        return f"{name} is for a {PLATFORM[name].upper()}, and the device is {device.device_kind}"
    if name == "splash":
        return ""
    try:
        capability = float(device.compute_capability)
    except (AttributeError, ValueError):  # AMD's are names such as gfx942
        return f"{name} has not been tried on {device.device_kind}"
    if capability < TRITON_CAPABILITY:
        return f"{name} needs compute capability {TRITON_CAPABILITY}, and {device.device_kind} has {capability}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"{name} is for bfloat16; tensor cores would round {jnp.dtype(dtype).name} down"
    return ""


def kernel_of(name: str, mesh: Mesh | None = None, *, rows: Any = None, heads: Any = None) -> Kernel:
    """The kernel called `name`; on several devices each has its part of the `rows` and `heads` axes of `mesh`."""
    if name == "plain":
        return packed_attention  # XLA divides it by itself
    from smollm_jax.kernels.shard import over

    if name == "splash":
        from smollm_jax.kernels.splash import splash as kernel
    else:
        from smollm_jax.kernels.triton_attention import pallas as kernel
    return over(mesh, kernel, rows=rows, heads=heads)


def joined_of(name: AttentionName, mesh: Mesh | None) -> Joined | None:
    """What goes with the attention called `name`: on GPUs matrices side by side, unless devices divide them."""
    if not is_of_gpu(name) or (mesh is not None and mesh.size > 1 and mesh.shape["tensor"] > 1):
        return None
    from smollm_jax.kernels.triton_layer import joined

    return joined(mesh, rows=BATCH_AXES)


def choose_checked(
    asked: AttentionName, mesh: Mesh, config: ModelConfig, dtype: Any
) -> tuple[AttentionName, list[str]]:
    """`choose`, then every kernel that comes with the choice tried; with notes for the user.

    Where one disagrees with its plain form, "auto" comes to "plain"; a name asked for raises `ValueError`.
    """
    name, note = choose(asked, mesh.devices.flat[0], dtype)
    if name == "plain":
        return name, [note] if note else []
    wrong = disagreement(kernel_of(name), config, dtype)
    if not wrong and is_of_gpu(name):
        from smollm_jax.kernels.check import layer_disagreement
        from smollm_jax.kernels.triton_layer import joined

        wrong = loss_disagreement(score_of(name), config.vocab_size, dtype)
        wrong = wrong or layer_disagreement(joined(), config, dtype)
    require(not wrong or asked == "auto", f"attention={name} failed its check: {wrong}; give plain or auto")
    if wrong:
        return "plain", [f"attention   plain: {name} failed its check, {wrong}"]
    return name, [f"attention   {name}, checked against the plain form"]


def lookup_of(mesh: Mesh | None, *, rows: Any = None) -> Lookup:
    """The lookup for the devices of `mesh`, which have a batch divided over its axes `rows`."""
    if mesh is None or mesh.devices.flat[0].platform != "gpu":
        return reference_embed
    return repeatable_lookup(mesh, rows=rows)


def product_of(mesh: Mesh | None) -> Product:
    """The product for the devices of `mesh`; the plain one for none."""
    return wide_product if mesh is not None and mesh.devices.flat[0].platform == "cpu" else reference_linear


def keep_of(mesh: Mesh | None, dtype: Any) -> Keep:
    """How the devices of `mesh` keep residuals when they compute in `dtype`."""
    on_cpu = mesh is not None and mesh.devices.flat[0].platform == "cpu"
    return as_bits if on_cpu and jnp.dtype(dtype) == jnp.bfloat16 else as_they_are


def gpu_score(
    logits_BCV: jax.Array, targets_BC: jax.Array, valid_BC: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    from smollm_jax.kernels.triton_cross_entropy import score

    logits_MV = logits_BCV.reshape(-1, logits_BCV.shape[-1])
    nll_M, dlogits_MV = score(logits_MV, targets_BC.reshape(-1), valid_BC.reshape(-1), dtype)
    return jnp.sum(nll_M), dlogits_MV.reshape(logits_BCV.shape)


def score_of(attention: AttentionName) -> Score:
    """The score that goes with a kernel of attention: a GPU's own with a GPU's own."""
    return gpu_score if is_of_gpu(attention) else reference_cross_entropy
