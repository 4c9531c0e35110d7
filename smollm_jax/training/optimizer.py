"""Define the optimizer, its update of a train state, and the learning rate schedule.

Add others here, and their names to `OptimizerConfig`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smollm_jax.config.settings import Config, OptimizerConfig
from smollm_jax.training.muon import is_matrix, scale_by_muon

# what is left of a decay of wsd after a share of its updates; linear is optax's own
SHAPES = {"cosine": lambda share: (1 + jnp.cos(jnp.pi * share)) / 2, "1-sqrt": lambda share: 1 - jnp.sqrt(share)}


def learning_rate_schedule(config: Config) -> optax.Schedule:
    """Return the learning rate of the update after `count` updates.

    Update n of W warm-up updates has n/W of the peak. From W on the rate decays, with wsd (Hu et al. 2024,
    MiniCPM) in the last D updates. The rate would reach its end at update N+1, so that none of the N updates is
    wasted at zero. It is end + (peak - end) * f(t), where t is the share of the decay that has passed, and f is
    1 - t (SmolLM2: Ben Allal et al. 2025), (1 + cos(pi t)) / 2 (Loshchilov & Hutter 2017), or 1 - sqrt(t)
    (SmolLM; Hägele et al. 2024, arXiv 2405.18392).
    """
    peak, end = config.learning_rate, config.optimizer.final_learning_rate
    warmup, decay = config.warmup_steps, config.decay_steps
    if config.optimizer.schedule == "cosine":
        after = optax.schedules.cosine_decay_schedule(peak, max(decay, 1), alpha=end / peak)
    else:
        stable, end = config.total_steps - warmup - decay, end if decay else peak
        if (shape := SHAPES.get(config.optimizer.decay_shape)) is None:
            after = optax.schedules.linear_schedule(peak, end, max(decay, 1), stable)
        else:

            def after(count: Any) -> Any:
                share = jnp.clip((count - stable) / max(decay, 1), 0, 1)
                return end + (peak - end) * shape(share)

    if warmup == 0:
        return after
    rise = optax.schedules.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.schedules.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer without the learning rate, after a global-norm clip.

    AdamW is by Loshchilov & Hutter 2019. Muon, see training/muon.py, takes the matrices of the layers from it.
    `mesh` and the compute dtype decide how Muon computes, not what its state is. `update` takes gradients summed
    over the targets, and two named arguments. `scale` makes the sum a mean. `norm` is the norm of the mean.
    """

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("scale", "_m")), params)

    def kinds(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if is_matrix(path) else "adamw", params)

    clip = _scale_and_clip(config.clip_norm)
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decays)
    given = config.muon_weight_decay
    of_matrices = decay if given is None else optax.add_decayed_weights(given)
    if config.optimizer == "adamw":
        return optax.chain(clip, adam, decay)
    muon = optax.chain(scale_by_muon(config.muon_momentum, mesh, dtype), of_matrices)
    others = optax.chain(adam, decay, optax.scale(config.adamw_share))
    return optax.chain(clip, optax.partition({"muon": muon, "adamw": others}, kinds))


def make_update(config: OptimizerConfig, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> Callable[..., Any]:
    """Return `update(state, grads, counts=, learning_rate=, scale=, norm=)` to the parts of the state that change.

    They are `params`, `opt_state` and any `ema`, as they were unless the step `counts`. The rest is as for
    `make_optimizer`.
    """
    optimizer = make_optimizer(config, mesh, dtype)

    @jax.named_scope("optimizer")
    def update(state: dict[str, Any], grads: Any, *, counts: Any, learning_rate: Any, **scaled: Any) -> Any:
        def apply(parts: dict[str, Any]) -> dict[str, Any]:
            updates, opt_state = optimizer.update(grads, parts["opt_state"], parts["params"], **scaled)
            params = jax.tree.map(lambda p, u: p - learning_rate * u, parts["params"], updates)
            after = {"params": params, "opt_state": opt_state}
            if "ema" in parts:
                # a short memory at first, so that the initial weights are forgotten, as in TensorFlow's average
                keep = jnp.minimum(config.ema, (1 + state["step"]) / (10 + state["step"]))
                after["ema"] = jax.tree.map(lambda e, p: e + (1 - keep) * (p - e), parts["ema"], params)
            return after

        parts = {name: state[name] for name in ("params", "opt_state", "ema") if name in state}
        return jax.lax.cond(counts, apply, lambda same: same, parts)

    return update


def _scale_and_clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Average sums and clip by global norm (Pascanu et al. 2012), in one pass.

    A clip by optax would read all gradients again for a known norm. The state is empty, as in optax.
    """

    def update(grads: Any, state: Any, params: Any = None, *, scale: Any, norm: Any, **_: Any) -> tuple[Any, Any]:
        del params
        factor = scale * jnp.minimum(1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
