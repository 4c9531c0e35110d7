"""Make the train step: a pure function of the train state and a batch's rows.

The state is a plain dict of arrays (`params`, `opt_state`, `step`). With adapters, `params` are the adapters, and
`base` holds the frozen weights, which no checkpoint holds. For each batch size, training/compile.py
compiles the step once, with the state donated and its layout pinned.
"""

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from smollm_jax.config.settings import MESH_AXES, Config
from smollm_jax.data.batch_hash import batch_hash
from smollm_jax.distributed.sharding import BATCH_AXES, layout_of, with_layout
from smollm_jax.kernels.select import select_ops
from smollm_jax.kernels.shard import per_device
from smollm_jax.model.loss import summed_loss, targets_of, token_logprobs
from smollm_jax.model.ops import Ops
from smollm_jax.model.preference import pair_step, sums_per_answer
from smollm_jax.model.transformer import Adapters, Policy, SmolLM, init_params
from smollm_jax.runtime.devices import training_dtype
from smollm_jax.training.adapters import frozen_base, init_adapters
from smollm_jax.training.loss_scale import factor_of, first_scale, next_scale, overflowed
from smollm_jax.training.optimizer import learning_rate_schedule, make_optimizer, make_update

State = dict[str, Any]
HEAD_AXIS = "tensor"  # the mesh axis that divides heads


class Vote(IntEnum):
    """A process's declaration about its part of a batch. Also the verdict of all on a step or run."""

    GO = 0
    STOP = 1  # stop after this step
    ENDED = 2  # the data has ended, and these rows are padding
    VOID = 3  # the process has no part, so the step is void


def init_state(config: Config, mesh: Mesh, params: Any | None = None) -> State:
    """Return the state before the first update, with fresh parameters unless `params` are given.

    With adapters `params` are the base.
    """
    dtype = training_dtype(config.compute.dtype, mesh.devices.flat[0])
    if config.adapter.is_on and params is not None:  # on the host: the device need not hold the base in f32
        params = frozen_base(params, dtype)
    make = partial(create, config, dtype=dtype)
    return jax.jit(make, out_shardings=layout_of(abstract_state(config, mesh)))(params)


def abstract_state(config: Config, mesh: Mesh) -> State:
    """Return shapes, dtypes and layout of the state, without its arrays."""
    make = partial(create, config, dtype=training_dtype(config.compute.dtype, mesh.devices.flat[0]))
    return with_layout(jax.eval_shape(make, None), mesh)


def trained_part(state: State) -> State:
    """Return what a checkpoint holds of a train state, or of its shapes: all but a frozen base."""
    return {name: part for name, part in state.items() if name != "base"}


def weights_of(state: State, part: str = "params") -> State:
    """Return what a forward pass needs of a train state, or of its shapes: parameters and any frozen base.

    The parameters are the state's `part`, "params" or "ema".
    """
    return {"params": state[part]} | ({"base": state["base"]} if "base" in state else {})


def create(config: Config, params: Any | None, *, dtype: Any = jnp.float32) -> State:
    """Return the state as `init_state` does, in the layout that the caller's jit gives it.

    `dtype` is the compute dtype. A frozen base is held in it. With float16 the state has `loss_scale` too, and
    with --ema `ema`, like `params`.
    """
    if params is None:
        params = init_params(config.model, config.run.seed, scale_residual=config.run.scale_residual_init)
    frozen = {}
    if config.adapter.is_on:
        frozen = {"base": frozen_base(params, dtype)}
        params = init_adapters(config.adapter, config.model, frozen["base"], config.run.seed)
    opt_state = make_optimizer(config.optimizer).init(params)
    made = {"params": params, "opt_state": opt_state, "step": jnp.int32(0), **frozen}
    if config.optimizer.ema:
        made["ema"] = jax.tree.map(jnp.copy, params)
    return made | ({"loss_scale": first_scale()} if dtype == jnp.float16 else {})


def select_step_ops(config: Config, mesh: Mesh | None, dtype: Any) -> Ops:
    """Select the functions of a step on `mesh`. Raises `UserError` for kernels that cannot run there."""
    return select_ops(config.compute.attention, mesh, dtype, rows=BATCH_AXES, heads=HEAD_AXIS)


def make_nll(config: Config, mesh: Mesh | None = None, **how: Any) -> Callable[..., jax.Array]:
    """Return `nll(params, tokens_BT1, segment_ids_BT1)`: f32 nats, as `make_loss` without a z-loss."""
    loss = make_loss(config, mesh, z_loss=0.0, **how)

    def nll(*arrays: jax.Array, base: Any = None) -> jax.Array:
        return loss(*arrays, base=base)[0]

    return nll


def make_loss(
    config: Config, mesh: Mesh | None = None,
    *, dtype: Any, remat: Policy, unroll: int = 1, ops: Ops | None = None, z_loss: float,
) -> Callable[..., tuple[jax.Array, jax.Array]]:  # fmt: skip
    """Return `loss(params, tokens_BT1, segment_ids_BT1)`: f32 nats and z-loss, and the z-loss among them.

    Both are weighted sums over the rows' targets. A fourth argument, (B, T) f32, takes the place of the weights of
    `targets_of`. They multiply the gradients of the logits before these are rounded. With `base`, the frozen
    weights, `params` are adapters. `ops` are the functions for the devices, by default `select_step_ops`.
    """
    ops = ops or select_step_ops(config, mesh, dtype)
    head_loss = _summed_over(mesh, config.compute.loss_chunk_for(remat, on_gpu=ops.on_gpu), ops, z_loss)
    features = partial(_features, config, dtype=dtype, remat=remat, unroll=unroll, ops=ops)

    def loss(
        params: Any, tokens_BT1: jax.Array, segment_ids_BT1: jax.Array, given_BT: jax.Array | None = None,
        *, base: Any = None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        x_BTD, head_VD = features(params, base, tokens_BT1, segment_ids_BT1)
        with jax.named_scope("head"):
            targets_BT, weights_BT = targets_of(tokens_BT1, segment_ids_BT1)
            return head_loss(x_BTD, head_VD, targets_BT, weights_BT if given_BT is None else given_BT)

    return loss


def _features(
    config: Config, params: Any, base: Any, tokens_BT1: jax.Array, segment_ids_BT1: jax.Array, **how: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the features of all tokens but the last, (B, T, D), and the head, of the model that is trained."""
    weights, adapters = (params, None) if base is None else (base, Adapters(params, config.adapter.scale))
    model = SmolLM.from_params(config.model, weights, **how)
    return model.features(tokens_BT1[:, :-1], jnp.abs(segment_ids_BT1[:, :-1]), adapters), model.head_VD


def make_logprobs(
    config: Config, mesh: Mesh | None = None, *, dtype: Any, ops: Ops | None = None
) -> Callable[..., jax.Array]:
    """Return `logprobs(params, tokens_BT1, segment_ids_BT1)`: sums per answer of pairs, (B, P, 2) f32.

    One micro-batch of the step is computed at a time. `ops` and `base` as in `make_nll`.
    """
    ops = ops or select_step_ops(config, mesh, dtype)
    chunked = partial(token_logprobs, chunk_tokens=config.compute.loss_chunk_for("none", on_gpu=ops.on_gpu))
    rows = PartitionSpec(BATCH_AXES)
    each = per_device(mesh, chunked, in_specs=(rows, PartitionSpec(), rows), out_specs=(rows, rows))

    def of_rows(params: Any, base: Any, tokens_BT1: jax.Array, segment_ids_BT1: jax.Array) -> jax.Array:
        x_BTD, head_VD = _features(config, params, base, tokens_BT1, segment_ids_BT1, dtype=dtype, ops=ops)
        with jax.named_scope("head"):
            logprobs_BT, _ = each(x_BTD, head_VD, tokens_BT1[:, 1:])
            return sums_per_answer(logprobs_BT, segment_ids_BT1)

    def logprobs(params: Any, tokens: jax.Array, segment_ids: jax.Array, *, base: Any = None) -> jax.Array:
        parts = config.compute.grad_accum
        if parts == 1 or len(tokens) % parts:
            return of_rows(params, base, tokens, segment_ids)
        micros = _micro_batches(parts, tokens, segment_ids)
        found = jax.lax.map(lambda micro: of_rows(params, base, *micro), micros)
        return found.swapaxes(0, 1).reshape(len(tokens), *found.shape[2:])

    return logprobs


def _summed_over(mesh: Mesh | None, chunk_tokens: int, ops: Ops, z_loss: float) -> Callable[..., Any]:
    """Return `summed_loss`, a function of (x, head, targets, weights), over all devices' tokens.

    Each device goes through its own tokens with the whole head. One sum at the end adds the losses and, in the
    backward pass, the f32 gradients of the head. The partitioner would add up the gradients after every chunk.
    Devices along `tensor` hold the same rows, so each takes a part of every row.
    """

    def summed(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        return summed_loss(*arrays, chunk_tokens, ops.cross_entropy, z_loss)

    if mesh is None or mesh.size == 1:
        return summed
    tokens, whole = PartitionSpec(BATCH_AXES, HEAD_AXIS), PartitionSpec()
    each = per_device(mesh, summed, in_specs=(tokens, whole, tokens, tokens), out_specs=whole, add_over=MESH_AXES)

    def everywhere(
        x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        pad = [(0, 0), (0, -x_BTD.shape[1] % mesh.shape[HEAD_AXIS])]
        return each(jnp.pad(x_BTD, [*pad, (0, 0)]), head_VD, jnp.pad(targets_BT, pad), jnp.pad(weights_BT, pad))

    return everywhere


def make_step(
    config: Config, mesh: Mesh | None = None,
    *, dtype: Any, remat: Policy, batch_size: int | None = None, ops: Ops | None = None,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:  # fmt: skip
    """Return the pure train step: (state, tokens (B, T+1), segment_ids (B, T+1)) to (state, metrics).

    For pairs, two arguments follow: the sums of log-probs of `make_logprobs` and the reference's. With several
    processes a last argument holds the vote of each device, and `metrics["votes"]` the number of each kind. The
    rows after the first `batch_size` are padding. `ops` as in `make_nll`. The step counts for nothing if a vote is
    `VOID`. A step after the end of the data counts for nothing: no vote is `GO`, no row has a target. A step
    without finite gradients leaves parameters and moments as they were.
    """
    ops = ops or select_step_ops(config, mesh, dtype)
    unroll = config.compute.unroll_for(remat, config.model.num_layers, on_gpu=ops.on_gpu)
    z_loss = config.optimizer.z_loss
    loss_of = make_loss(config, mesh, dtype=dtype, remat=remat, unroll=unroll, ops=ops, z_loss=z_loss)
    update, schedule = make_update(config.optimizer, mesh, dtype), learning_rate_schedule(config)

    def step(
        state: State, tokens: jax.Array, segment_ids: jax.Array, *others: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        pairs, weights, votes = _inputs(config, segment_ids, others)
        loss_scale = state.get("loss_scale")  # of float16 alone
        are_targets = targets_of(tokens, segment_ids)[1]
        factor = None if loss_scale is None else factor_of(loss_scale, tokens.size)
        if factor is not None:
            weights = [weight * factor for weight in weights or [are_targets]]
        value_and_grad = jax.value_and_grad(partial(loss_of, base=state.get("base")), has_aux=True)
        accumulated = _accumulated(value_and_grad, config.compute.grad_accum)
        (loss, z), grads = accumulated(state["params"], tokens, segment_ids, *weights)
        targets = jnp.sum(are_targets)  # exact below 2**24
        mean = 1.0 / jnp.maximum(pairs.get("pairs", targets), 1)
        scale = mean if factor is None else mean / factor
        nll = loss - z if factor is None else (loss - z) / factor
        with jax.named_scope("optimizer"):
            norm, learning_rate = scale * optax.tree.norm(grads), schedule(state["step"])
        finite = jnp.isfinite(norm) & jnp.isfinite(nll)
        cast, counts = _counted(votes, targets)
        updated = update(state, grads, counts=finite & counts, learning_rate=learning_rate, scale=scale, norm=norm)
        metrics = {
            "loss": nll * mean, "grad_norm": norm, "learning_rate": jnp.float32(learning_rate), "targets": targets,
            "finite": finite, "batch_hash": batch_hash(tokens, segment_ids, jnp, rows=batch_size),
        }  # fmt: skip
        if z_loss:
            metrics["z_loss"] = z * scale
        if config.data.is_chat:
            metrics["filled"] = jnp.sum(segment_ids != 0)
        metrics |= {name: x if name == "pairs" else x * mean for name, x in pairs.items()}  # a loss of their own
        if cast is not None:
            metrics |= {"votes": cast, "counts": counts}
        after = state | updated | {"step": state["step"] + counts}
        if loss_scale is not None:
            overflow = overflowed(loss_scale, nll, norm)
            after["loss_scale"] = next_scale(loss_scale, overflow=overflow, finite=finite, counts=counts)
            metrics |= {"overflow": overflow, "loss_scale": after["loss_scale"]["scale"]}
        return after, metrics

    return step


def _inputs(
    config: Config, segment_ids: jax.Array, others: tuple[jax.Array, ...]
) -> tuple[dict[str, jax.Array], list[jax.Array], jax.Array | None]:
    """Return sums over pairs and the weights of targets, as `pair_step` does, and any votes."""
    if not config.data.is_pairs:
        return {}, [], others[0] if others else None
    logprobs_BP2, reference_BP2, *votes = others
    pairs, weights_BT = pair_step(logprobs_BP2, reference_BP2, segment_ids, config.preference)
    return pairs, [weights_BT], votes[0] if votes else None


def _counted(votes: jax.Array | None, targets: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """Return the number of votes of each kind, None without votes, and whether the step counts."""
    if votes is None:
        return None, jnp.bool(True)
    cast = jnp.stack([jnp.sum(votes == int(kind)) for kind in Vote])
    return cast, (cast[Vote.VOID] == 0) & ((cast[Vote.GO] > 0) | (targets > 0))


def _accumulated(value_and_grad: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """Return `value_and_grad(params, *arrays of rows)` summed over `parts` micro-batches, one at a time."""
    if parts == 1:
        return value_and_grad

    def gradients(params: Any, *rows: jax.Array) -> Any:
        def add(total: Any, micro: Any) -> tuple[Any, None]:
            found = value_and_grad(params, *micro)
            with jax.named_scope("optimizer"):
                return jax.tree.map(jnp.add, total, found), None

        zero = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, zero, _micro_batches(parts, *rows))[0]

    return gradients


def _micro_batches(parts: int, *rows: jax.Array) -> tuple[jax.Array, ...]:
    # every A-th row goes together, so that each device keeps its own rows
    return tuple(x.reshape(-1, parts, x.shape[1]).swapaxes(0, 1) for x in rows)
