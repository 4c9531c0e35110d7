"""Define the functions a model computes with, in plain JAX: the reference for every kernel.

`Ops` holds all of them, so that modules take one argument. `kernels.select` returns the `Ops` of a device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from smollm_jax.model.attention import packed_attention
from smollm_jax.model.loss import reference_cross_entropy

PRODUCT = "product"  # the name by which remat's policies know the result of `linear`
Rope = tuple[jax.Array, jax.Array]  # cos and sin, f32 (B, T, 1, H/2)

# Recompute cheap operations in the backward pass, whatever `remat` is, because their results would be most of
# what a layer keeps. A scan over the layers keeps XLA from merging the two computations. If all layers are
# unrolled, XLA may merge them and keep what it likes.
cheap = partial(jax.checkpoint, prevent_cse=False)


def reference_embed(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Look up the embedding of each token: (B, T, D)."""
    return table_VD[tokens_BT]


def reference_linear(letters: str, x: jax.Array, weights: jax.Array) -> jax.Array:
    """Compute `einsum` of x and f32 weights, in the dtype of x."""
    return checkpoint_name(jnp.einsum(letters, x, weights.astype(x.dtype)), PRODUCT)


def rotate(x_BTNH: jax.Array, rope: Rope) -> jax.Array:
    """Turn the pairs (i, i + H/2) of each head by the angles in `rope`."""
    cos, sin = rope
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def swiglu(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """Compute `silu(gate) * up` (Shazeer 2020) in f32. Rounds once: on a CPU each rounding takes time."""
    gated_BTF = jax.nn.silu(gate_BTF.astype(jnp.float32)) * up_BTF.astype(jnp.float32)
    return gated_BTF.astype(gate_BTF.dtype)


def reference_project_heads(
    x_BTD: jax.Array, q_DNH: jax.Array, k_DKH: jax.Array, v_DKH: jax.Array, rope: Rope,
    *, linear: Callable[..., jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Return queries (B, T, N, H), keys and values (B, T, K, H). Queries and keys are rotated."""
    q_BTNH = rotate(linear("BTD,DNH->BTNH", x_BTD, q_DNH), rope)
    k_BTKH = rotate(linear("BTD,DKH->BTKH", x_BTD, k_DKH), rope)
    return q_BTNH, k_BTKH, linear("BTD,DKH->BTKH", x_BTD, v_DKH)


def reference_feed_forward(
    x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array, *, linear: Callable[..., jax.Array]
) -> jax.Array:
    """Return the output (B, T, D) of the SwiGLU feed-forward."""
    gate_BTF, up_BTF = (linear("BTD,DF->BTF", x_BTD, weights) for weights in (gate_DF, up_DF))
    gated = cheap(lambda gate_BTF, up_BTF, down_FD: linear("BTF,FD->BTD", swiglu(gate_BTF, up_BTF), down_FD))
    return gated(gate_BTF, up_BTF, down_FD)


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The functions a model computes with. The defaults are the reference."""

    attention: Callable[..., jax.Array] = packed_attention
    """`(q_BTNH, k_BTKH, v_BTKH, start_BT) -> o_BTNH`, causal inside each document; `start_BT` from `starts_of`."""
    embed: Callable[..., jax.Array] = reference_embed
    """`(table_VD, tokens_BT) -> x_BTD`."""
    linear: Callable[..., jax.Array] = reference_linear
    """`(einsum letters, x, f32 weights) -> y` in the dtype of x."""
    project_heads: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] = reference_project_heads
    """`(x_BTD, q_DNH, k_DKH, v_DKH, rope, linear=) -> q_BTNH, k_BTKH, v_BTKH`, queries and keys rotated."""
    feed_forward: Callable[..., jax.Array] = reference_feed_forward
    """`(x_BTD, gate_DF, up_DF, down_FD, linear=) -> (B, T, D)`."""
    cross_entropy: Callable[..., tuple[jax.Array, ...]] = reference_cross_entropy
    """`(logits_BCV, targets_BC, weights_BC, dtype, z_loss) -> nll, z, dlogits_BCV`: weighted loss, the z-loss
    beside it, and the gradient of both in `dtype`."""
    wrap_layer: Callable[..., Callable[..., jax.Array]] = lambda layer: layer
    """`layer(x_BTD, weights) -> x_BTD` to a layer that stores its residuals in another form."""
    kernels: str = "plain"
    """The kernels among them: "plain" (none), "splash" (TPU) or "pallas" (GPU)."""

    @property
    def on_gpu(self) -> bool:
        """Return whether any function is a GPU kernel, which decides `unroll` and `loss_chunk`."""
        return self.kernels == "pallas"


REFERENCE = Ops()
