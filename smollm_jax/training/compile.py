"""Compile the train step for every batch size of a run, within device memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from smollm_jax.checkpoint.listing import VerifiedCheckpoint
from smollm_jax.checkpoint.manager import CheckpointManager
from smollm_jax.config.settings import MESH_AXES, Config
from smollm_jax.distributed.processes import Processes
from smollm_jax.distributed.sharding import (
    are_shared,
    bytes_a_device,
    bytes_of,
    layout_of,
    on_devices,
    padded_rows,
    sharded,
)
from smollm_jax.kernels.select import select_checked_ops, select_ops
from smollm_jax.model.ops import Ops
from smollm_jax.model.preference import pairs_per_row
from smollm_jax.model.transformer import POLICIES, Policy
from smollm_jax.runtime.devices import memory_bytes
from smollm_jax.runtime.errors import require, say
from smollm_jax.training.step import (
    BATCH_AXES,
    HEAD_AXIS,
    State,
    abstract_state,
    make_logprobs,
    make_nll,
    make_step,
    trained_part,
    weights_of,
)


@dataclass(frozen=True)
class PairStep:
    """A compiled step of pairs, after a forward pass of its own for the log-probs.

    The reference model's come from the same program, so that its rounding drops out of the first loss.
    """

    logprobs: jax.stages.Compiled
    step: jax.stages.Compiled

    def __call__(self, state: State, tokens: jax.Array, segment_ids: jax.Array, *others: jax.Array) -> Any:
        """Return (state, metrics). The `others` are the reference's sums of log-probs, and any votes."""
        logprobs = self.logprobs(weights_of(state), tokens, segment_ids)
        return self.step(state, tokens, segment_ids, logprobs, *others)

    def memory_analysis(self) -> Any:
        return self.step.memory_analysis()


Step = jax.stages.Compiled | PairStep


def compile_step(
    config: Config, mesh: Mesh, batch_size: int, *, dtype: Any, remat: Policy, ops: Ops | None = None
) -> Step:
    """Compile the step for batches of `batch_size` rows, padded for the mesh.

    The state is donated and keeps its layout. `ops` as in `make_step`.
    """
    shape = (padded_rows(batch_size, mesh, config.compute.grad_accum), config.data.seq_len + 1)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharded(mesh, BATCH_AXES))
    votes = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=sharded(mesh, MESH_AXES))
    state = abstract_state(config, mesh)
    step = jax.jit(
        make_step(config, mesh, dtype=dtype, remat=remat, batch_size=batch_size, ops=ops),
        donate_argnums=0,
        out_shardings=(layout_of(state), sharded(mesh)),
    )
    last = [votes] if are_shared(mesh.devices.flat) else []
    if not config.data.is_pairs:
        return step.lower(state, rows, rows, *last).compile()
    sums = jax.ShapeDtypeStruct((shape[0], pairs_per_row(shape[1] - 1), 2), jnp.float32, sharding=rows.sharding)
    pair_sums = _of_weights(make_logprobs(config, mesh, dtype=dtype, ops=ops))
    logprobs = jax.jit(pair_sums, out_shardings=rows.sharding)
    forward = logprobs.lower(weights_of(state), rows, rows).compile()
    return PairStep(forward, step.lower(state, rows, rows, sums, sums, *last).compile())


def compiled_bytes(compiled: Step) -> int:
    """Return the bytes of device memory that a program needs, arguments included. 0 if unknown."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = held + memory.temp_size_in_bytes
    if isinstance(compiled, PairStep):  # its forward pass runs beside the optimizer's state
        forward: Any = compiled.logprobs.memory_analysis()
        beside = memory.argument_size_in_bytes - forward.argument_size_in_bytes
        needed = max(needed, beside + compiled_bytes(compiled.logprobs))
    return needed


def compile_steps(
    config: Config, mesh: Mesh,
    *, dtype: Any, memory_bytes: int, agree: Callable[[bool], bool] = bool, ops: Ops | None = None,
    before: Policy = "none", tell: Callable[[str], None] = lambda _: None,
) -> tuple[dict[int, Step], Policy]:  # fmt: skip
    """Return a compiled step for each batch size, and the remat policy of all.

    `remat="auto"` takes the first of none, dots and full with which the largest batch fits `memory_bytes`. Raises
    `UserError` if the compiler finds that nothing fits. `agree` decides for several processes whether a step fits:
    their programs have to be the same. `ops` as in `make_step`. A run that resumes begins with its policy
    `before`: another policy may change the last bits.
    """
    sizes, asked = sorted({phase.batch_size for phase in config.phases}, reverse=True), config.compute.remat
    policies: tuple[Policy, ...] = POLICIES[POLICIES.index(before) :] if asked == "auto" else (asked,)
    for remat in policies:
        tell(f"compiling   the step of {sizes[0]} x {config.data.seq_len}, remat {remat}, 1 of {len(sizes)}")
        compile_for = partial(compile_step, config, mesh, dtype=dtype, remat=remat, ops=ops)
        try:
            largest = compile_for(sizes[0])
        except jax.errors.JaxRuntimeError as error:  # the TPU compiler refuses a step that does not fit
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            largest = None
        if agree(largest is not None and compiled_bytes(largest) < memory_bytes):
            break
    require(
        agree(largest is not None),
        f"batch size {sizes[0]} with remat {remat} does not fit the device's memory; "
        "give a smaller --batch-size, or --grad-accum 2 or more",
    )
    assert largest is not None
    steps = {sizes[0]: largest}
    for number, size in enumerate(sizes[1:], start=2):
        tell(f"compiling   the step of {size} x {config.data.seq_len}, remat {remat}, {number} of {len(sizes)}")
        steps[size] = compile_for(size)
    return steps, remat


def select_agreed_ops(config: Config, mesh: Mesh, dtype: Any, processes: Processes) -> tuple[Ops, list[str]]:
    """Return functions whose kernels passed their check in all processes, and notes for the user."""
    axes: dict[str, Any] = {"rows": BATCH_AXES, "heads": HEAD_AXIS}
    with processes.all_or_none():
        ops, notes = select_checked_ops(config.compute.attention, mesh, dtype, config.model, **axes)
    if len(set(processes.gather(ops.kernels))) > 1:
        ops = select_ops("plain", mesh, dtype, **axes)
        notes = ["attention   plain: the kernel's check did not end alike in all processes"]
    return ops, notes


def compile_within(
    config: Config, mesh: Mesh, dtype: Any, checkpoints: CheckpointManager, ops: Ops, *, before: Policy
) -> tuple[dict[int, Step], Policy, list[str]]:
    """Return the steps, the remat policy that fits, and a note if memory is scarce.

    Raises `UserError` if the free memory does not hold the step: the system would kill the run without a message.
    """
    gather, here = checkpoints.processes.gather, mesh.local_mesh.devices
    saved = trained_part(abstract_state(config, mesh))
    free = partial(memory_bytes, here.flat[0], bytes_of(saved, saved["opt_state"]), devices=here.size)
    memory = min(gather(free()))
    steps, remat = compile_steps(
        config, mesh, dtype=dtype, memory_bytes=memory, agree=lambda fits: all(gather(fits)), ops=ops,
        before=before, tell=say if checkpoints.processes.first else lambda _: None,
    )  # fmt: skip
    needed = max(gather(compiled_bytes(steps[max(steps)])))
    # on a CPU, the memory of a step leaves out the memory of a save
    copied = 0 if here.flat[0].platform == "cpu" else bytes_a_device(saved)
    checkpoints.beside_the_step = needed + copied <= memory
    less = "--grad-accum 2 or more, or a smaller --batch-size, needs less"
    needs = f"the step needs {needed / 2**30:.1f} GiB a device"
    all_of_it = min(gather(free(share=1.0)))
    fits = here.flat[0].platform != "cpu" or needed <= all_of_it
    require(fits, f"{needs} beside the run's own copies, {all_of_it / 2**30:.1f} are free; {less}")
    known = f"{memory / 2**30:.1f} can be counted on: the system may end the run for it"
    note = f"MEMORY      {needs}, {known}; {less}"
    return steps, remat, [note] if needed > memory else []


def remat_before(found: VerifiedCheckpoint | None) -> Policy:
    """Return the remat policy of a checkpoint's steps, "none" if it names none."""
    told = found.meta.get("computed", {}).get("remat") if found else None
    return told if told in POLICIES else "none"


def make_scorer(config: Config, mesh: Mesh, dtype: Any, ops: Ops | None = None) -> Callable[..., Any]:
    """Return `nll(weights, tokens, segment_ids)` of rows that all processes have, with `weights_of` the state.

    Of pairs, return the sums of `make_logprobs` in its place, as a NumPy array.
    """
    rows, layout = sharded(mesh, BATCH_AXES), layout_of(weights_of(abstract_state(config, mesh)))
    if config.data.is_pairs:
        whole_batch = replace(config, compute=replace(config.compute, grad_accum=1))  # it is a micro-batch already
        pair_sums = _of_weights(make_logprobs(whole_batch, mesh, dtype=dtype, ops=ops))
        pairs_of = jax.jit(pair_sums, in_shardings=(layout, rows, rows), out_shardings=sharded(mesh))

        def logprobs(weights: State, *arrays: np.ndarray) -> np.ndarray:
            whole = pairs_of(weights, *(on_devices(x, padded_rows(len(x), mesh), 0, mesh) for x in arrays))
            return np.asarray(whole.addressable_data(0))[: len(arrays[0])]

        return logprobs
    nll_of = make_nll(config, mesh, dtype=dtype, remat="none", ops=ops)
    compiled = jax.jit(_of_weights(nll_of), in_shardings=(layout, rows, rows))

    def nll(weights: State, *arrays: np.ndarray) -> jax.Array:
        return compiled(weights, *(on_devices(x, padded_rows(len(x), mesh), 0, mesh) for x in arrays))

    return nll


def _of_weights(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Let `function` take `weights_of` a state, under its own name: logs of compilation and profiles show it."""

    @wraps(function)
    def of_weights(weights: State, *arrays: jax.Array) -> jax.Array:
        return function(weights["params"], *arrays, base=weights.get("base"))

    return of_weights
