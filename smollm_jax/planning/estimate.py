"""Estimate the FLOPs, memory, messages and time of a train step by formula.

No device and no compiler confirms these figures: XLA's own counts take the body of a loop once. A step lasts as
long as the slower of computing and memory traffic, plus its messages. Messages overlap with neither.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from smollm_jax.config.architecture import ADAPTED, ModelConfig, parameter_shapes
from smollm_jax.config.settings import Config
from smollm_jax.distributed.sharding import bytes_a_device, padded_rows, row_shards, whole_layers_layout
from smollm_jax.model.transformer import Policy
from smollm_jax.planning.topology import Chip
from smollm_jax.runtime.devices import peak_flops, training_dtype
from smollm_jax.training.muon import ITERATIONS, newton_schulz_dtype
from smollm_jax.training.step import abstract_state

# The share of its peak that a step of 135M reached on the one accelerator it ran on: an H200, remat none, in
# bfloat16, benchmarks/RESULTS.md. Other chips may reach more or less.
COMPUTE_SHARE = 0.42
# assumptions! Ordered reads and writes reach 80 % of the memory's rate. Small slices lack the links that would
# close a ring, so half of the interconnect is idle.
BANDWIDTH_SHARE, INTERCONNECT_SHARE = 0.8, 0.5

GRADIENT_BYTES, MASTER_BYTES = 4, 4  # per parameter, f32


@dataclass(frozen=True)
class Step:
    """A train step to estimate: `batch_size` rows of `config` on `mesh`, with `remat` decided."""

    config: Config
    mesh: Mesh
    remat: Policy
    batch_size: int

    @property
    def dtype(self) -> Any:
        return training_dtype(self.config.compute.dtype, self.mesh.devices.flat[0])

    @property
    def rows_per_chip(self) -> int:
        """Return the rows of the batch on one chip, padding included. Chips along axis `tensor` share rows."""
        return padded_rows(self.batch_size, self.mesh, self.config.compute.grad_accum) // row_shards(self.mesh)

    @property
    def tokens_per_chip(self) -> int:
        return self.rows_per_chip * self.config.data.seq_len

    @cached_property
    def state(self) -> dict[str, Any]:
        return abstract_state(self.config, self.mesh)

    @property
    def parameters_per_chip(self) -> int:
        """Return the trained parameters on one chip: of adapters, or all."""
        return bytes_a_device(self.state["params"]) // 4

    @property
    def frozen_bytes(self) -> int:
        """Return the bytes on one chip of a frozen base, and of its layers' weights with adapters in them."""
        base = self.state.get("base")
        if base is None:
            return 0
        merged = bytes_a_device(base["blocks"]) if self.remat == "none" else 0
        return bytes_a_device(base) + merged

    @property
    def optimizer_bytes(self) -> int:
        """Return the bytes of the moments on one chip: two per parameter, of a matrix of Muon one."""
        return bytes_a_device(self.state["opt_state"])

    @property
    def average_bytes(self) -> int:
        """Return the bytes of any moving average of the weights on one chip."""
        return bytes_a_device(self.state.get("ema"))

    @property
    def whole_layers(self) -> int:
        """Return the matrices of a kind that one chip orthogonalizes for Muon, 0 for AdamW."""
        if self.config.optimizer.optimizer != "muon":
            return 0
        layers = self.config.model.num_layers
        return -(-layers // whole_layers_layout(self.mesh, layers)[1])


def estimate(step: Step, chip: Chip) -> dict[str, float]:
    """Estimate seconds, tokens/s and MFU of `step` on chips of the kind `chip`, whose peak is known.

    The MFU counts the model's FLOPs, not the recomputed ones, against the peak of all chips.
    """
    peak = peak_flops(chip, step.dtype)
    assert peak is not None, chip.device_kind
    config, tokens = step.config, step.batch_size * step.config.data.seq_len
    flops = flops_per_token(config, step.remat) * step.tokens_per_chip / step.mesh.shape["tensor"]
    compute = flops / (peak * COMPUTE_SHARE)
    its_peak = peak_flops(chip, jnp.dtype(newton_schulz_dtype(step.mesh, step.dtype))) or peak
    compute += newton_schulz_flops(config.model) * step.whole_layers / (its_peak * COMPUTE_SHARE)
    memory = traffic_bytes(step) / (chip.memory_bytes_per_second * BANDWIDTH_SHARE)
    interconnect = sum(sent_bytes(step).values()) / (chip.interconnect_bytes_per_second * INTERCONNECT_SHARE)
    seconds = max(compute, memory) + interconnect
    return {
        "compute_seconds": compute,
        "memory_seconds": memory,
        "interconnect_seconds": interconnect,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": config.model.flops_per_token(config.data.seq_len) * tokens / (peak * step.mesh.size * seconds),
    }


def flops_per_token(config: Config, remat: Policy) -> float:
    """Return the FLOPs executed per token, recomputation included.

    `full` recomputes the forward pass of the blocks, a third of their FLOPs. `dots` recomputes attention alone,
    because attention is a fused kernel. The head is never recomputed.
    """
    model, seq_len = config.model, config.data.seq_len
    whole = model.flops_per_token(seq_len)
    attention = 6 * model.num_layers * seq_len * model.num_heads * model.head_dim
    blocks = whole - 6 * model.vocab_size * model.hidden_size
    return whole + {"none": 0, "dots": attention, "full": blocks}[remat] / 3


def newton_schulz_flops(model: ModelConfig) -> int:
    """Return the FLOPs of Muon per layer: in each iteration, three products of a matrix's short side."""
    total = 0
    for path, shape in parameter_shapes(model, one_layer=True).items():
        if path in ADAPTED:
            sides = math.prod(shape[: ADAPTED[path]]), math.prod(shape[ADAPTED[path] :])
            total += ITERATIONS * 2 * min(sides) ** 2 * (2 * max(sides) + min(sides))
    return total


def matrix_parameters(model: ModelConfig) -> int:
    """Return the parameters that Muon updates."""
    return sum(math.prod(shape) for path, shape in parameter_shapes(model).items() if path in ADAPTED)


def traffic_bytes(step: Step) -> float:
    """Return the bytes per step between one chip and its memory.

    Each matrix product reads its inputs and writes its output once, forward and twice backward, in the compute
    dtype. Everything between products is fused into them. Per token, f32 logits are written and read three times,
    and their gradient once and twice. The optimizer passes once over the state. Muon reads and writes its matrices
    in each of three products per iteration.
    """
    model, width = step.config.model, step.dtype.itemsize
    N_H, K_H = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    D, F = model.hidden_size, model.intermediate_size
    ends = 2 * (D + N_H) + 2 * (D + K_H) + 3 * (D + F)
    passes = 4 if step.remat == "full" else 3
    per_token = model.num_layers * ends * width * passes + model.vocab_size * (3 * 4 + 3 * width)
    weights = model.num_parameters * width * passes * step.config.compute.grad_accum
    divided = (step.tokens_per_chip * per_token + weights) / step.mesh.shape["tensor"]
    update = step.parameters_per_chip * (2 * GRADIENT_BYTES + 2 * MASTER_BYTES) + 2 * step.optimizer_bytes
    update += 2 * step.average_bytes
    layer = matrix_parameters(model) // model.num_layers
    return divided + update + ITERATIONS * 3 * 2 * layer * step.whole_layers * width


def memory_bytes(step: Step) -> int:
    """Return the bytes per chip that the step needs at once. Used if the devices have no compiler here.

    The sum counts the state, f32 gradients, the weights in the compute dtype, and the residuals of each layer. A
    frozen base counts in the compute dtype. With remat, all residuals of one layer count too. One chunk of logits
    and its gradient count as well. Muon needs no more: residuals and logits are gone by then.
    """
    model, compute, dtype_bytes = step.config.model, step.config.compute, step.dtype.itemsize
    tokens = step.tokens_per_chip // compute.grad_accum
    one_layer = residual_bytes(model, "none") if step.remat != "none" else 0
    per_token = (residual_bytes(model, step.remat) * model.num_layers + one_layer) * dtype_bytes / 2
    on_gpu = step.mesh.devices.flat[0].platform == "gpu"
    chunk_tokens = min(compute.loss_chunk_for(step.remat, on_gpu=on_gpu), tokens)
    chunk = model.vocab_size * (chunk_tokens * 10 + model.hidden_size * 4)
    state = step.parameters_per_chip * (MASTER_BYTES + GRADIENT_BYTES + dtype_bytes) + step.optimizer_bytes
    return int(
        state + step.average_bytes + step.frozen_bytes + tokens * per_token / step.mesh.shape["tensor"] + chunk
    )


def residual_bytes(model: ModelConfig, remat: Policy) -> int:
    """Return the bf16 bytes per token and layer that forward keeps for backward.

    `full` keeps the layer's input. `dots` also keeps the output of each product. `none` also keeps the outputs of
    the norms and the attention kernel, and one f32 per softmax of that kernel.
    """
    N_H, K_H = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    D, F = model.hidden_size, model.intermediate_size
    return {
        "full": 2 * D,
        "dots": 2 * (2 * D + N_H + 2 * K_H + 2 * F),
        "none": 2 * (4 * D + 2 * N_H + 2 * K_H + 2 * F) + 4 * model.num_heads,
    }[remat]


def sent_bytes(step: Step) -> dict[str, float]:
    """Return the bytes per step that each chip sends along each mesh axis, in rings.

    The rings are as in Patarasuk & Yuan 2009. `data` sums the gradients once per microbatch (2 bytes each, 6 for
    the embedding, used at both ends). `fsdp` gathers weights per pass and reduce-scatters gradients (Rajbhandari
    et al. 2020). `tensor` sums activations six times per layer, forward and backward (Shoeybi et al. 2019). Muon
    moves the momentum of its matrices to whole layers and back, 2 bytes each.
    """
    model, micros, sizes = step.config.model, step.config.compute.grad_accum, step.mesh.shape
    weights = model.num_parameters // sizes["tensor"]
    gradients = (2 * weights + 4 * model.vocab_size * model.hidden_size // sizes["tensor"]) * micros
    passes = 3 if step.remat == "full" else 2
    arrays = {  # a gather or scatter sends an array once around the ring, a sum twice
        "data": 2 * gradients // sizes["fsdp"],
        "fsdp": weights * 2 * passes * micros + gradients,
        "tensor": 2 * 6 * model.num_layers * step.tokens_per_chip * model.hidden_size * 2,
    }
    if step.whole_layers:
        moved = 2 * matrix_parameters(model) // (sizes["fsdp"] * sizes["tensor"])
        ways = {"data": int(step.whole_layers < model.num_layers), "fsdp": 2, "tensor": 2}  # data has it already
        arrays = {axis: size + ways[axis] * moved for axis, size in arrays.items()}
    return {axis: size * (sizes[axis] - 1) / sizes[axis] for axis, size in arrays.items()}
