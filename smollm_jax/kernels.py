"""The kernels of a run, held against the plain forms on the device at hand before its first step.

Those of a device stand and fall together: where attention is the plain one, so is the loss.
"""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from smollm_jax import attention, loss
from smollm_jax.config import AttentionName, ModelConfig, require


def choose_checked(
    asked: AttentionName, mesh: Mesh, config: ModelConfig, dtype: Any
) -> tuple[AttentionName, list[str]]:
    """`attention.choose`, then every kernel that comes with the choice tried; with notes for the user.

    Where one disagrees with its plain form, "auto" comes to "plain"; a name asked for raises `ValueError`.
    """
    name, note = attention.choose(asked, mesh.devices.flat[0], dtype)
    if name == "plain":
        return name, [note] if note else []
    wrong = attention.disagreement(attention.kernel_of(name), config, dtype)
    score = loss.score_of(name)
    if not wrong and score is not loss.plain_score:
        wrong = loss.disagreement(score, config.vocab_size, dtype)
    require(not wrong or asked == "auto", f"attention={name} failed its check: {wrong}; give plain or auto")
    if wrong:
        return "plain", [f"attention   plain: {name} failed its check, {wrong}"]
    return name, [f"attention   {name}, checked against the plain form"]
