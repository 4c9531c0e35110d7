"""Orthogonalize the momentum of matrices: the optimizer Muon (Jordan 2024, kellerjordan.github.io/posts/muon).

The Nesterov form and the Newton-Schulz constants are the same as in `torch.optim.Muon`. `optax.contrib.muon`
corrects the biases of momentum and gradient by different counts. So its direction differs from the second update
on, and torch's form is taken. An update has the RMS of AdamW's (Liu et al. 2025, arXiv 2502.16982), so learning
rate and weight decay of AdamW carry over. Letters as in model/transformer.py, I inputs, O outputs of a matrix.
"""

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smollm_jax.config.architecture import ADAPTED
from smollm_jax.distributed.sharding import own_layout, whole_layers_layout

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
EPSILON = 1e-7  # below this norm a matrix counts as zero, and stays small
RMS = 0.2  # of an update by AdamW, as measured in arXiv 2502.16982


class MuonState(NamedTuple):
    """The momentum of each matrix, f32."""

    momentum: Any


def is_matrix(path: Any) -> bool:
    """Return whether Muon updates the parameter at a path of the tree: a matrix of the layers."""
    return jax.tree_util.keystr(path, simple=True, separator="/") in ADAPTED


def newton_schulz_dtype(mesh: Mesh | None, dtype: Any) -> Any:
    """Return the dtype of the iteration: bfloat16 on accelerators that compute in it, else float32."""
    on_cpu = mesh is None or mesh.devices.flat[0].platform == "cpu"
    return jnp.bfloat16 if not on_cpu and dtype == jnp.bfloat16 else jnp.float32


def scale_by_muon(
    momentum: float, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> optax.GradientTransformation:
    """Return Muon without learning rate and weight decay, for trees of stacked matrices.

    Newton-Schulz is computed in `newton_schulz_dtype(mesh, dtype)`.
    """
    in_dtype = newton_schulz_dtype(mesh, dtype)

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        kept = jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, state.momentum, grads)

        def direction(path: Any, kept: jax.Array, grad: jax.Array) -> jax.Array:
            ahead = momentum * kept + (1 - momentum) * grad  # Nesterov
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return _on_whole_layers(name, ahead.astype(in_dtype), mesh).astype(jnp.float32)

        return jax.tree_util.tree_map_with_path(direction, kept, grads), MuonState(kept)

    return optax.GradientTransformation(init, update)


def _on_whole_layers(path: str, stack: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Return the update of a stack of matrices, (L, ...) as the parameter's dims.

    On several devices, each gets some layers whole, by one all-to-all there and one back. Otherwise every product
    would sum over the devices.
    """
    layouts, parts = ([], 1) if mesh is None else whole_layers_layout(mesh, len(stack))
    if not layouts:
        return _update(path, stack)
    assert mesh is not None
    padded = jnp.pad(stack, [(0, -len(stack) % parts)] + [(0, 0)] * (stack.ndim - 1))
    own = own_layout(path.rsplit("/", maxsplit=1)[-1], padded.shape, mesh)
    # the first one keeps the partitioner from moving both terms of the sum instead of the sum
    there = [own, *layouts]
    whole = _update(path, reduce(jax.lax.with_sharding_constraint, there, padded))
    return reduce(jax.lax.with_sharding_constraint, there[::-1], whole)[: len(stack)]


def _update(path: str, stack: jax.Array) -> jax.Array:
    shape, inputs = stack.shape, ADAPTED[path]
    I = math.prod(shape[1 : 1 + inputs])  # noqa: E741 - the letter of a dim
    x_LIO = orthogonalized(stack.reshape(shape[0], I, -1))
    return (RMS * math.sqrt(max(x_LIO.shape[1:])) * x_LIO).reshape(shape)


def orthogonalized(x_LIO: jax.Array) -> jax.Array:
    """Return each matrix with its singular values moved to about 1 (0.7 to 1.2), by Newton-Schulz in its dtype.

    Sums are f32 and rounded once, as torch's `addmm` does. Rounded twice, the error is four times as large.
    """
    a, b, c = COEFFICIENTS
    dtype, product = x_LIO.dtype, partial(jnp.einsum, preferred_element_type=jnp.float32)
    is_tall = x_LIO.shape[1] > x_LIO.shape[2]  # the products of the short side are smaller
    x_LSO = (x_LIO.swapaxes(1, 2) if is_tall else x_LIO).astype(jnp.float32)
    norm_L11 = jnp.sqrt(jnp.sum(jnp.square(x_LSO), axis=(1, 2), keepdims=True))
    x_LSO = (x_LSO / jnp.maximum(norm_L11, EPSILON)).astype(dtype)
    for _ in range(ITERATIONS):
        gram_LSS = product("LSO,LZO->LSZ", x_LSO, x_LSO).astype(dtype)
        square_LSS = product("LSX,LXZ->LSZ", gram_LSS, gram_LSS)
        factor_LSS = (b * gram_LSS.astype(jnp.float32) + c * square_LSS).astype(dtype)
        moved_LSO = product("LSZ,LZO->LSO", factor_LSS, x_LSO)
        x_LSO = (a * x_LSO.astype(jnp.float32) + moved_LSO).astype(dtype)
    return x_LSO.swapaxes(1, 2) if is_tall else x_LSO
