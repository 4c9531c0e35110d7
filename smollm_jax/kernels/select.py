"""Select a model's functions for a device, and check the kernels against the reference.

Kernels are used all together or not at all. If attention falls back to the reference, so do the loss and the
layers. The choice depends on the devices of the mesh, not of this machine. So a program compiled ahead of time for
another machine gets its kernels. The caller passes the mesh axes: no rule of the mesh is known here.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import AttentionName
from smollm_jax.kernels.check import check_ops
from smollm_jax.kernels.cpu import residuals_as_bits, wide_linear
from smollm_jax.kernels.embedding import reproducible_embed
from smollm_jax.kernels.shard import attention_per_device
from smollm_jax.model.ops import REFERENCE, Ops
from smollm_jax.runtime.devices import TRITON_CAPABILITY
from smollm_jax.runtime.errors import require

PLATFORM = {"splash": "tpu", "pallas": "gpu"}


def select_ops(asked: AttentionName, mesh: Mesh | None, dtype: Any, *, rows: Any = None, heads: Any = None) -> Ops:
    """Return the functions for the devices of `mesh`. Without a mesh, they are the reference.

    `asked` is "auto" or the name of kernels, `dtype` the compute dtype. The mesh axes `rows` divide the batch. The
    axis `heads` divides heads and matrices. Raises `UserError` for kernels that cannot run there.
    """
    if mesh is None:
        return REFERENCE
    device = mesh.devices.flat[0]
    name, _ = select_attention(asked, device, dtype)
    if device.platform == "cpu":
        ops = replace(REFERENCE, linear=wide_linear)
        return replace(ops, wrap_layer=residuals_as_bits) if jnp.dtype(dtype) == jnp.bfloat16 else ops
    ops = replace(REFERENCE, embed=reproducible_embed(mesh, rows=rows)) if device.platform == "gpu" else REFERENCE
    return with_kernels(ops, name, mesh, rows=rows, heads=heads)


def select_checked_ops(
    asked: AttentionName, mesh: Mesh, dtype: Any, model: ModelConfig, *, rows: Any = None, heads: Any = None
) -> tuple[Ops, list[str]]:
    """Select as `select_ops`, then check every kernel at the shapes of `model`. Also returns notes for the user.

    If a kernel disagrees with its reference, "auto" falls back to "plain". A given name raises `UserError`.
    """
    name, note = select_attention(asked, mesh.devices.flat[0], dtype)
    notes = [note] if note else []
    if name != "plain":
        wrong = check_ops(with_kernels(REFERENCE, name), model, dtype)
        require(not wrong or asked == "auto", f"attention={name} failed its check: {wrong}; give plain or auto")
        notes = [f"attention   {name}, checked against the reference"]
        if wrong:
            name, notes = "plain", [f"attention   plain: {name} failed its check, {wrong}"]
    return select_ops(name, mesh, dtype, rows=rows, heads=heads), notes


def select_attention(asked: AttentionName, device: Any, dtype: Any) -> tuple[AttentionName, str]:
    """Return the kernels for `device`, and a note if "auto" falls back on an accelerator.

    `asked` is "auto" or a name. "auto" falls back to "plain". Raises `UserError` for a name that cannot run there.
    """
    if asked == "plain" or (asked == "auto" and device.platform == "cpu"):
        return "plain", ""
    name: AttentionName = asked
    if asked == "auto":
        name = "splash" if device.platform == "tpu" else "pallas"
    obstacle = _obstacle(name, device, dtype)
    require(not obstacle or asked == "auto", f"attention={asked} cannot run here: {obstacle}; give plain or auto")
    return ("plain", f"attention   plain: {obstacle}") if obstacle else (name, "")


def _obstacle(name: str, device: Any, dtype: Any) -> str:
    if device.platform != PLATFORM[name]:
        return f"{name} is for a {PLATFORM[name].upper()}, and the device is {device.device_kind}"
    if name == "splash":
        return ""
    try:
        capability = float(device.compute_capability)
    except (AttributeError, ValueError):  # AMD has names such as gfx942
        return f"{name} has not been tried on {device.device_kind}"
    if capability < TRITON_CAPABILITY:
        return f"{name} needs compute capability {TRITON_CAPABILITY}, and {device.device_kind} has {capability}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        rounds = "; tensor cores would round float32 down" if jnp.dtype(dtype) == jnp.float32 else ""
        return f"{name} is for bfloat16{rounds}"
    return ""


def with_kernels(
    ops: Ops, name: AttentionName, mesh: Mesh | None = None, *, rows: Any = None, heads: Any = None
) -> Ops:
    """Return `ops` with the kernels called `name`, run per device on its `rows` and `heads`."""
    if name == "plain":
        return ops  # XLA divides the reference by itself
    if name == "splash":
        from smollm_jax.kernels.splash import splash_attention

        attention = attention_per_device(mesh, splash_attention, rows=rows, heads=heads)
        return replace(ops, kernels=name, attention=attention)
    from smollm_jax.kernels.triton_attention import triton_attention
    from smollm_jax.kernels.triton_cross_entropy import fused_cross_entropy
    from smollm_jax.kernels.triton_layer import fused_layer

    attention = attention_per_device(mesh, triton_attention, rows=rows, heads=heads)
    ops = replace(ops, kernels=name, attention=attention, cross_entropy=fused_cross_entropy)
    if mesh is not None and mesh.size > 1 and heads is not None and mesh.shape[heads] > 1:
        return ops  # devices that divide a matrix cannot fuse it with others
    project_heads, feed_forward = fused_layer(mesh, rows=rows)
    return replace(ops, project_heads=project_heads, feed_forward=feed_forward)
