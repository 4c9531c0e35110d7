"""Which attention over packed rows is for which device, and whether it agrees there with the plain one.

The plain form (plain_attention.py) is the reference, and what a CPU runs. The fused kernels (fused_attention.py)
give the same up to rounding, without the scores ever being in memory. The choice goes by the devices of the mesh,
not by what JAX finds on this machine, so that a program compiled ahead of time for another one gets its kernel.
The letters are those of model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from smollm_jax.config import AttentionName, ModelConfig, require
from smollm_jax.hardware import TRITON_CAPABILITY, said_by
from smollm_jax.plain_attention import packed_attention, starts_of

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""`kernel(q_BTNH, k_BTKH, v_BTKH, start_BT)` gives o_BTNH, causal inside each document; `start_BT` as `starts_of`
gives it."""

PLATFORM = {"splash": "tpu", "pallas": "gpu"}


def is_of_gpu(name: AttentionName) -> bool:
    """Whether the kernel is a GPU's, which brings those of the loss and the layers with it."""
    return PLATFORM.get(name) == "gpu"


# Of the largest entry. Rounding alone was seen to give 0.005 and 0.000001, a leak between documents 1
TOLERANCE = {"bfloat16": 0.02, "float32": 0.0001}


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
    from smollm_jax.fused_attention import over

    if name == "splash":
        from smollm_jax.fused_attention import splash as kernel
    else:
        from smollm_jax.fused_attention import pallas as kernel
    return over(mesh, kernel, rows=rows, heads=heads)


def disagreement(kernel: Kernel, config: ModelConfig, dtype: Any, *, seed: int = 0) -> str:
    """In words how `kernel` differs from the plain form on a small packed example, or fails; "" if it agrees.

    Values and gradients, four documents a row, at the model's own heads.
    """
    T, H = 256, config.head_dim
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    q, k, v, do = (jax.random.normal(key, (2, T, n, H)).astype(dtype) for key, n in zip(keys, heads, strict=True))
    ends_2E = jnp.array([[70, 71, 200], [128, 250, 256]])
    index_2T1 = jnp.broadcast_to(jnp.arange(T)[:, None], (2, T, 1))
    start_2T = starts_of(jnp.sum(index_2T1 >= ends_2E[:, None], axis=-1))

    def outcome(attention: Kernel, *qkv: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, start_2T), *qkv)
        return out, *pull(do.astype(out.dtype))

    try:
        ours = jax.jit(partial(outcome, kernel))(q, k, v)
    except Exception as error:  # whatever a compiler may raise: better a slow run than none
        return f"it does not run here: {said_by(error)}"
    with jax.default_matmul_precision("highest"):  # else a GPU or TPU rounds the operands of f32 products down
        exact = jax.jit(partial(outcome, packed_attention))(*(x.astype(jnp.float32) for x in (q, k, v)))
    for name, a, b in zip(("the output", "dq", "dk", "dv"), ours, exact, strict=True):
        gap = float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
        if not gap <= TOLERANCE[jnp.dtype(dtype).name]:
            return f"{name} differs from the plain form's by {gap:.2%} of its largest"
    return ""
