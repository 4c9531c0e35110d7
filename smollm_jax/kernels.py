"""The kernels of a run, held against the plain forms on the device at hand before its first step.

Those of a device stand and fall together: where attention is the plain one, so are the loss and the layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from smollm_jax.attention import choose, disagreement, is_of_gpu, kernel_of
from smollm_jax.loss import disagreement as loss_disagreement
from smollm_jax.loss import score_of
from smollm_jax.config import AttentionName, ModelConfig, require
from smollm_jax.sharding import BATCH_AXES

if TYPE_CHECKING:
    from smollm_jax.gpu_layer import Joined


def joined_of(name: AttentionName, mesh: Mesh | None) -> Joined | None:
    """What goes with the attention called `name`: on GPUs matrices side by side, unless devices divide them."""
    if not is_of_gpu(name) or (mesh is not None and mesh.size > 1 and mesh.shape["tensor"] > 1):
        return None
    from smollm_jax.gpu_layer import joined

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
        from smollm_jax.gpu_layer import disagreement as layer_disagreement
        from smollm_jax.gpu_layer import joined

        wrong = loss_disagreement(score_of(name), config.vocab_size, dtype)
        wrong = wrong or layer_disagreement(joined(), config, dtype)
    require(not wrong or asked == "auto", f"attention={name} failed its check: {wrong}; give plain or auto")
    if wrong:
        return "plain", [f"attention   plain: {name} failed its check, {wrong}"]
    return name, [f"attention   {name}, checked against the plain form"]
