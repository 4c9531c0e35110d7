"""The train step: optimizer and schedule, train state, and the pure function that updates them.

The state is a plain dict of arrays (`params`, `opt_state`, `step`), the step a pure function of state and
batch, compiled once for each batch size before the first update, with the state donated and its layout
pinned. Steps without finite gradients leave parameters and moments as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from smollm_jax.config.settings import MESH_AXES, AttentionName, Config, OptimizerConfig
from smollm_jax.data.batch_hash import batch_hash
from smollm_jax.distributed.sharding import BATCH_AXES, layout_of, with_layout
from smollm_jax.kernels.select import (
    choose,
    is_of_gpu,
    joined_of,
    keep_of,
    kernel_of,
    lookup_of,
    product_of,
    score_of,
)
from smollm_jax.model.loss import Score, reference_cross_entropy, summed_nll, targets_of
from smollm_jax.model.transformer import Policy, SmolLM, init_params

State = dict[str, Any]
Step = Callable[..., tuple[State, dict[str, jax.Array]]]

# what each of several processes says with its part of a batch: go on; stop after it; my data has ended, these
# rows are padding; I have no part, the step is void
GO, STOP, ENDED, VOID = range(4)


def learning_rate_schedule(config: Config) -> optax.Schedule:
    """Learning rate of the update after `count` updates.

    Update n of W warm-up updates has n/W of the peak; from W on the decay falls from the peak and would
    reach its end at update N+1, so that no update of the N is wasted at zero.
    """
    peak, end = config.optimizer.learning_rate, config.optimizer.final_learning_rate
    warmup, decay = config.warmup_steps, config.decay_steps
    if config.optimizer.schedule == "cosine":
        after = optax.schedules.cosine_decay_schedule(peak, max(decay, 1), alpha=end / peak)
    else:
        stable = config.total_steps - warmup - decay
        after = optax.schedules.linear_schedule(peak, end if decay else peak, max(decay, 1), stable)
    if warmup == 0:
        return after
    rise = optax.schedules.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.schedules.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW but for the learning rate (Loshchilov & Hutter 2019), after a clip by global norm.

    Its `update` takes gradients summed over the targets, and by name the `scale` that makes them a mean and the
    `norm` of that mean.
    """

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)

    return optax.chain(
        _scale_and_clip(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def _scale_and_clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Make sums a mean and clip it by global norm (Pascanu et al. 2012), in the pass that uses them: optax's clip
    goes over all gradients once more for a norm that is known here. It has the state of optax's: none.
    """

    def update(
        grads: Any, state: Any, params: Any = None, *, scale: jax.Array, norm: jax.Array, **_: Any
    ) -> tuple[Any, Any]:
        del params
        factor = scale * jnp.minimum(1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def init_state(config: Config, mesh: Mesh, params: Any | None = None) -> State:
    """A state before the first update, with fresh parameters unless `params` are given."""

    def create(params: Any) -> State:
        return _state_of(config, init_params(config.model, config.run.seed) if params is None else params)

    return jax.jit(create, out_shardings=layout_of(abstract_state(config, mesh)))(params)


def abstract_state(config: Config, mesh: Mesh) -> State:
    """Shapes, dtypes and layout of the state, without its arrays."""
    shapes = jax.eval_shape(lambda: _state_of(config, init_params(config.model, config.run.seed)))
    return with_layout(shapes, mesh)


def _state_of(config: Config, params: Any) -> State:
    opt_state = make_optimizer(config.optimizer).init(params)
    return {"params": params, "opt_state": opt_state, "step": jnp.int32(0)}


def make_nll(config: Config, mesh: Mesh | None = None, *, dtype: Any, remat: Policy, unroll: int = 1) -> Callable:
    """`nll(params, tokens_BT1, segment_ids_BT1)`: nats summed over the targets of the rows, f32."""
    name = attention_of(config, mesh, dtype)
    chunk_tokens = config.compute.loss_chunk_for(remat, on_gpu=is_of_gpu(name))
    by_device = {
        "unroll": unroll,
        "dtype": dtype,
        "attention": kernel_of(name, mesh, rows=BATCH_AXES, heads="tensor"),
        "lookup": lookup_of(mesh, rows=BATCH_AXES),
        "product": product_of(mesh),
        "joined": joined_of(name, mesh),
        "keep": keep_of(mesh, dtype),
    }

    def nll(params: Any, tokens_BT1: jax.Array, segment_ids_BT1: jax.Array) -> jax.Array:
        model = SmolLM.from_params(config.model, params, remat=remat, **by_device)
        x_BTD = model.features(tokens_BT1[:, :-1], segment_ids_BT1[:, :-1])
        with jax.named_scope("head"):
            targets_BT, valid_BT = targets_of(tokens_BT1, segment_ids_BT1)
            return summed_over(mesh, score_of(name))(x_BTD, model.head_VD, targets_BT, valid_BT, chunk_tokens)

    return nll


def attention_of(config: Config, mesh: Mesh | None, dtype: Any) -> AttentionName:
    return "plain" if mesh is None else choose(config.compute.attention, mesh.devices.flat[0], dtype)[0]


def summed_over(mesh: Mesh | None, score: Score = reference_cross_entropy) -> Callable[..., jax.Array]:
    """`summed_nll` over the tokens of all devices: each goes through its own with the whole head, and the sums
    are added up once, at the end, where the partitioner would add up the head's gradient after every chunk.
    The devices of `tensor`, which have the same rows, take a part of each.
    """

    def summed(*arguments: Any) -> jax.Array:
        return summed_nll(*arguments, score)

    if mesh is None or mesh.size == 1:
        return summed

    def everywhere(x_BTD, head_VD, targets_BT, valid_BT, chunk_tokens: int) -> jax.Array:
        def here(x_BTD, head_VD, targets_BT, valid_BT) -> jax.Array:
            # and with it, going back, the head's gradient, in f32
            return jax.lax.psum(summed(x_BTD, head_VD, targets_BT, valid_BT, chunk_tokens), MESH_AXES)

        pad = [(0, 0), (0, -x_BTD.shape[1] % mesh.shape["tensor"])]
        arrays = jnp.pad(x_BTD, [*pad, (0, 0)]), head_VD, jnp.pad(targets_BT, pad), jnp.pad(valid_BT, pad)
        tokens = PartitionSpec(BATCH_AXES, "tensor")
        return jax.shard_map(
            here,
            mesh=mesh,
            in_specs=(tokens, PartitionSpec(), tokens, tokens),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(*arrays)

    return everywhere


def make_step(
    config: Config, mesh: Mesh | None = None, *, dtype: Any, remat: Policy, batch_size: int | None = None
) -> Step:
    """The pure train step: (state, tokens (B, T+1), segment_ids (B, T+1)) to (state, metrics). What follows the
    first `batch_size` rows is padding.

    With several processes a fourth argument holds a vote of each device, and `metrics["votes"]` how many there
    were of each kind. Where one is `VOID`, or none is `GO` and no row has a target, the data having ended, the
    step counts for nothing.
    """
    on_gpu = is_of_gpu(attention_of(config, mesh, dtype))
    unroll = config.compute.unroll_for(remat, config.model.num_layers, on_gpu=on_gpu)
    value_and_grad = jax.value_and_grad(make_nll(config, mesh, dtype=dtype, remat=remat, unroll=unroll))
    optimizer, schedule = make_optimizer(config.optimizer), learning_rate_schedule(config)
    accumulate = config.compute.grad_accum

    def gradients(params: Any, tokens: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, Any]:
        if accumulate == 1:
            return value_and_grad(params, tokens, segment_ids)

        def add(total, micro):
            found = value_and_grad(params, *micro)
            with jax.named_scope("optimizer"):
                return jax.tree.map(jnp.add, total, found), None

        # every A-th row goes together, so that each device keeps its own rows
        micros = tuple(x.reshape(-1, accumulate, x.shape[1]).swapaxes(0, 1) for x in (tokens, segment_ids))
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, zero, micros)[0]

    def step(
        state: State, tokens: jax.Array, segment_ids: jax.Array, votes: jax.Array | None = None
    ) -> tuple[State, dict[str, jax.Array]]:
        params = state["params"]
        nll, grads = gradients(params, tokens, segment_ids)
        targets = jnp.sum(targets_of(tokens, segment_ids)[1])
        scale = 1.0 / jnp.maximum(targets, 1)
        with jax.named_scope("optimizer"):
            norm, learning_rate = scale * optax.tree.norm(grads), schedule(state["step"])
        finite = jnp.isfinite(norm) & jnp.isfinite(nll)
        cast, counts = None, jnp.bool(True)
        if votes is not None:
            cast = jnp.stack([jnp.sum(votes == kind) for kind in (GO, STOP, ENDED, VOID)])
            counts = (cast[VOID] == 0) & ((cast[GO] > 0) | (targets > 0))

        @jax.named_scope("optimizer")
        def update(params: Any, opt_state: Any) -> tuple[Any, Any]:
            updates, opt_state = optimizer.update(grads, opt_state, params, scale=scale, norm=norm)
            return jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), opt_state

        params, opt_state = jax.lax.cond(finite & counts, update, lambda *same: same, params, state["opt_state"])
        metrics = {
            "loss": nll * scale,
            "grad_norm": norm,
            "learning_rate": jnp.float32(learning_rate),
            "targets": targets,
            "finite": finite,
            "batch_hash": batch_hash(tokens, segment_ids, jnp, rows=batch_size),
        }
        if cast is not None:
            metrics |= {"votes": cast, "counts": counts}
        return {"params": params, "opt_state": opt_state, "step": state["step"] + counts}, metrics

    return step
