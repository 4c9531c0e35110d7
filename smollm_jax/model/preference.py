"""Compute the loss of pairs of answers: direct preference optimization and its relatives.

A row holds pairs of segments. Segment 1 is a chosen answer and 2 the rejected, then follow 3 and 4, and so on. A
row of T+1 tokens has room for P pairs. A dim of 2 stands for chosen and rejected. Sums are over the targets.
"""

import jax
import jax.numpy as jnp

from smollm_jax.config.preference import FIGURES, PreferenceConfig
from smollm_jax.model.loss import targets_of

SHORTEST_PAIR = 4  # tokens: in each answer one to read and one target


def pairs_per_row(seq_len: int) -> int:
    """Return the most pairs that a row of `seq_len` + 1 tokens may hold."""
    return max((seq_len + 1) // SHORTEST_PAIR, 1)


def sums_per_answer(value_BT: jax.Array, segment_ids_BT1: jax.Array) -> jax.Array:
    """Return the sums of a value per target over each answer, (B, P, 2) f32.

    The sum of an answer that is not there is 0.
    """
    B, T = value_BT.shape
    _, weights_BT = targets_of(segment_ids_BT1, segment_ids_BT1)
    of_BT = jnp.where(weights_BT > 0, segment_ids_BT1[:, 1:], 0)
    segment_S = jnp.arange(1, 2 * pairs_per_row(T) + 1)
    # a sum over a mask: a scatter-add has no fixed order on a GPU, so a sum would not come back the same
    sums_BS = jnp.sum(jnp.where(of_BT[:, None] == segment_S[None, :, None], value_BT[:, None], 0.0), axis=-1)
    return sums_BS.reshape(B, -1, 2)


def pair_losses(ratio_BP2: jax.Array, lengths_BP2: jax.Array, settings: PreferenceConfig) -> jax.Array:
    """Return the loss of each pair, (B, P) f32, from log-ratios of policy and reference.

    A log-ratio is the policy's sum of log-probs minus the reference's. Sources: sigmoid arXiv 2305.18290, and its
    authors' note on noisy labels. ipo 2310.12036, by the mean per token as in TRL. apo_zero 2408.06266.
    """
    beta, ratio_BP2 = settings.beta, _per_loss(ratio_BP2, lengths_BP2, settings)
    chosen_BP, rejected_BP = ratio_BP2[..., 0], ratio_BP2[..., 1]
    margin_BP = chosen_BP - rejected_BP
    if settings.pair_loss == "ipo":
        return (margin_BP - 1 / (2 * beta)) ** 2
    if settings.pair_loss == "apo_zero":
        return 1 - jax.nn.sigmoid(beta * chosen_BP) + jax.nn.sigmoid(beta * rejected_BP)
    smoothing, z_BP = settings.label_smoothing, beta * margin_BP
    return -(1 - smoothing) * jax.nn.log_sigmoid(z_BP) - smoothing * jax.nn.log_sigmoid(-z_BP)


def pair_step(
    logprobs_BP2: jax.Array, reference_BP2: jax.Array, segment_ids_BT1: jax.Array, settings: PreferenceConfig
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return sums over the pairs, and a weight per target, (B, T) f32.

    The sums are `loss`, `pairs` and the `FIGURES`. The weight of a target is minus the derivative of the loss by
    its log-prob, held constant. So the weighted negative log-likelihood has the gradient of the loss.
    """
    _, are_targets_BT = targets_of(segment_ids_BT1, segment_ids_BT1)
    lengths_BP2 = sums_per_answer(jnp.ones_like(are_targets_BT), segment_ids_BT1)
    is_pair_BP = (lengths_BP2 > 0).all(-1)
    ratio_BP2 = jnp.where(is_pair_BP[..., None], logprobs_BP2 - reference_BP2, 0.0)

    def total(ratio_BP2: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_pair_BP, pair_losses(ratio_BP2, lengths_BP2, settings), 0.0))

    loss, slope_BP2 = jax.value_and_grad(total)(ratio_BP2)
    slope_BS = slope_BP2.reshape(slope_BP2.shape[0], -1)
    at_BT = jnp.clip(segment_ids_BT1[:, 1:] - 1, 0, slope_BS.shape[1] - 1)
    weights_BT = -jnp.take_along_axis(slope_BS, at_BT, axis=1) * are_targets_BT
    reward_BP2 = settings.beta * ratio_BP2
    chosen_BP, rejected_BP = reward_BP2[..., 0], reward_BP2[..., 1]
    margin_BP = chosen_BP - rejected_BP
    each = (chosen_BP, rejected_BP, margin_BP, margin_BP > 0, logprobs_BP2[..., 0], logprobs_BP2[..., 1])
    sums = {name: jnp.sum(jnp.where(is_pair_BP, x, 0.0)) for name, x in zip(FIGURES, each, strict=True)}
    return {"loss": loss, "pairs": jnp.sum(is_pair_BP), **sums}, weights_BT


def _per_loss(ratio_BP2: jax.Array, lengths_BP2: jax.Array, settings: PreferenceConfig) -> jax.Array:
    """Return log-ratios as the loss takes them: means per token for ipo, else sums."""
    return ratio_BP2 / jnp.maximum(lengths_BP2, 1) if settings.pair_loss == "ipo" else ratio_BP2
