"""Arithmetic of a train step: its FLOPs, memory and messages by formula, and from them an estimate of its time.

XLA's own counts take the body of a loop once however often it turns, so FLOPs and bytes are ours. A step is
held to take the longer of computing and reading memory, and then the time of its messages, none of which is
taken to hide behind the computing. It is an estimate: no device has been asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import Config
from smollm_jax.distributed.sharding import padded_rows, row_shards, with_layout
from smollm_jax.model.transformer import init_params
from smollm_jax.planning.hlo import Collective
from smollm_jax.planning.topology import Chip
from smollm_jax.runtime.devices import peak_flops

# assumptions! What large matrix products reach of a chip's peak, reads and writes in order of the memory's; small
# slices lack the links that would close a ring, so that half of the interconnect lies idle.
COMPUTE_SHARE, BANDWIDTH_SHARE, INTERCONNECT_SHARE = 0.5, 0.8, 0.5

STATE_BYTES = 12  # a parameter and its two moments, f32
# the gradient is written; the update reads it, parameter and moments, and writes the last three
UPDATE_BYTES = 4 + 4 * 4 + 3 * 4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of one step on one chip."""

    compute: float
    memory: float
    interconnect: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory) + self.interconnect


def rows_a_chip(config: Config, mesh: Mesh, batch_size: int) -> int:
    """Rows of a batch on one chip, padding included; those of an axis `tensor` have the same."""
    return padded_rows(batch_size, mesh, config.compute.grad_accum) // row_shards(mesh)


def executed_flops_per_token(config: Config, remat: str) -> float:
    """`flops_per_token` and, with remat full, the forward pass of the blocks again; attention is a fused kernel.

    dots computes attention's forward again, a third of its share; the head is never computed twice.
    """
    model, seq_len = config.model, config.data.seq_len
    whole = model.flops_per_token(seq_len)
    again = {
        "none": 0,
        "dots": 6 * model.num_layers * seq_len * model.num_heads * model.head_dim,
        "full": whole - 6 * model.vocab_size * model.hidden_size,
    }
    return whole + again[remat] / 3


def traffic_bytes(config: Config, mesh: Mesh, remat: str, batch_size: int) -> float:
    """Bytes that a step moves between one chip and its memory.

    Each matrix product reads its inputs and writes its outputs once, forward and twice backward, in the compute
    dtype's 2 bytes; what lies between is fused into them. Of a token's logits an f32 is written and read three
    times, of their gradient 2 bytes once and twice. AdamW goes once over the state.
    """
    model = config.model
    N_H, K_H = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    D, F = model.hidden_size, model.intermediate_size
    ends = 2 * (D + N_H) + 2 * (D + K_H) + 3 * (D + F)
    passes = 4 if remat == "full" else 3
    of_token = model.num_layers * ends * 2 * passes + model.vocab_size * (3 * 4 + 3 * 2)
    of_weights = model.num_parameters * 2 * passes * config.compute.grad_accum
    tokens = rows_a_chip(config, mesh, batch_size) * config.data.seq_len
    return (tokens * of_token + of_weights) / mesh.shape["tensor"] + parameters_a_chip(config, mesh) * UPDATE_BYTES


def estimate(
    config: Config, chip: Chip, mesh: Mesh, remat: str, *, batch_size: int, messages: list[Collective]
) -> Estimate:
    """The time of a step of `batch_size` rows that sends `messages`."""
    peak = peak_flops(chip)
    assert peak is not None, chip.device_kind
    tokens = rows_a_chip(config, mesh, batch_size) * config.data.seq_len / mesh.shape["tensor"]
    flops = executed_flops_per_token(config, remat) * tokens
    traffic = traffic_bytes(config, mesh, remat, batch_size)
    sent = sum(message.bytes_sent for message in messages)
    return Estimate(
        compute=flops / (peak * COMPUTE_SHARE),
        memory=traffic / (chip.memory_bytes_per_second * BANDWIDTH_SHARE),
        interconnect=sent / (chip.interconnect_bytes_per_second * INTERCONNECT_SHARE),
    )


def utilisation(config: Config, chip: Chip, mesh: Mesh, *, batch_size: int, seconds: float) -> float:
    """MFU of a step that takes so long: model FLOPs, remat not counted, of the chips' peak."""
    peak = peak_flops(chip)
    assert peak is not None, chip.device_kind
    return (
        config.model.flops_per_token(config.data.seq_len)
        * batch_size
        * config.data.seq_len
        / (peak * mesh.size * seconds)
    )


def parameters_a_chip(config: Config, mesh: Mesh) -> int:
    """Parameters of which one chip holds its own, or its part; by the same rule as a run's."""
    shapes = jax.eval_shape(lambda: init_params(config.model, config.run.seed))
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(with_layout(shapes, mesh))
    )


def memory_by_formula(config: Config, mesh: Mesh, remat: str, batch_size: int, *, dtype_bytes: int) -> int:
    """Bytes of one chip that a step needs at once, where no compiler can be asked.

    The state, f32 gradients, the weights in the compute dtype, what the backward pass needs of each layer (and
    of one layer whole, where remat computes it again; attention is a fused kernel), and the logits of a chunk with
    their gradient.
    """
    model = config.model
    parameters = parameters_a_chip(config, mesh)
    tokens = rows_a_chip(config, mesh, batch_size) // config.compute.grad_accum * config.data.seq_len
    one_layer = kept_bytes(model, "none") if remat != "none" else 0
    of_token = (kept_bytes(model, remat) * model.num_layers + one_layer) * dtype_bytes / 2
    kept = tokens * of_token / mesh.shape["tensor"]
    together = min(config.compute.loss_chunk_for(remat, on_gpu=mesh.devices.flat[0].platform == "gpu"), tokens)
    chunk = together * model.vocab_size * 10 + model.vocab_size * model.hidden_size * 4
    return int(parameters * (STATE_BYTES + 4 + dtype_bytes) + kept + chunk)


def kept_bytes(model: ModelConfig, remat: str) -> int:
    """Bytes a token and layer that the forward pass leaves for the backward one, bf16 where not said.

    full: the layer's input. dots: and each product's output that anything needs. none: and what the norms and
    the attention kernel give, with a number in f32 for each of its softmaxes.
    """
    N_H, K_H = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    D, F = model.hidden_size, model.intermediate_size
    return {
        "full": 2 * D,
        "dots": 2 * (2 * D + N_H + 2 * K_H + 2 * F),
        "none": 2 * (4 * D + 2 * N_H + 2 * K_H + 2 * F) + 4 * model.num_heads,
    }[remat]


def collectives_by_formula(config: Config, mesh: Mesh, remat: str, batch_size: int) -> list[Collective]:
    """What a step says to other chips, where no compiler can be asked.

    data adds up the gradients once a micro-batch (2 bytes; the embedding's, which comes from both its ends, 6);
    fsdp brings the weights together for each pass and adds up the gradients in parts (Rajbhandari et al. 2020);
    tensor adds up the outputs of attention and feed-forward, forward and backward (Shoeybi et al. 2019).
    """
    model, micros = config.model, config.compute.grad_accum
    whole = model.num_parameters // mesh.shape["tensor"]
    gradients = (2 * whole + 4 * model.vocab_size * model.hidden_size // mesh.shape["tensor"]) * micros
    passes = 3 if remat == "full" else 2
    found = []
    if (fsdp := mesh.shape["fsdp"]) > 1:
        brought = {"count": model.num_layers * passes * micros, "bytes": whole * 2 * passes * micros}
        found.append(Collective(kind="all-gather", group=fsdp, **brought))
        found.append(
            Collective(kind="reduce-scatter", group=fsdp, count=model.num_layers * micros, bytes=gradients)
        )
    if (data := mesh.shape["data"]) > 1:
        found.append(
            Collective(kind="all-reduce", group=data, count=model.num_layers * micros, bytes=gradients // fsdp)
        )
    if (tensor := mesh.shape["tensor"]) > 1:
        tokens = rows_a_chip(config, mesh, batch_size) * config.data.seq_len
        count = 2 * (passes + (remat != "full")) * model.num_layers
        found.append(
            Collective(kind="all-reduce", group=tensor, count=count, bytes=count * tokens * model.hidden_size * 2)
        )
    return found
