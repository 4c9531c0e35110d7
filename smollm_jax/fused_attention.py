"""The doors to the fused attention kernels: all three take what `packed_attention` takes.

splash, for TPU, comes with JAX; pallas, for GPUs from Ampere on, is ours (gpu_attention.py); cudnn, for Hopper and
later, is NVIDIA's own. The first two get rows padded to whole blocks, the padding a document of its own that lies
behind every token. Held to the plain form by tests that interpret them on a CPU and compile them for TPU, and on
the device at the start of a run. Attention.py chooses among them. The letters are those of model.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh, PartitionSpec

from smollm_jax.attention import Kernel

LANES = 128  # of a TPU's vector registers: the kernel's blocks are multiples of it
LARGEST_SPLASH_BLOCK = 512  # 512 x 512 scores in f32 are 1 MiB of the 16 MiB a v5e core has for a kernel


def splash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start_BT: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """JAX's flash attention for TPU, which leaves out the blocks above the diagonal (Dao 2023)."""
    T, N, H = q_BTNH.shape[1:]
    q, k, v, start_BT = _padded(LANES, q_BTNH * H**-0.5, k_BTKH, v_BTKH, start_BT)
    length = q.shape[1]
    block = max(size for size in range(LANES, LARGEST_SPLASH_BLOCK + 1, LANES) if length % size == 0)
    kernel = splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * N),
        block_sizes=splash_kernel.BlockSizes(
            block_q=block, block_kv=block,
            block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip

    def of_row(q_NTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array, start_T: jax.Array) -> jax.Array:
        return kernel(q_NTH, k_KTH, v_KTH, splash_kernel.SegmentIds(start_T, start_T))

    q_BNTH, k_BKTH, v_BKTH = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    o_BNTH = jax.vmap(of_row)(q_BNTH, k_BKTH, v_BKTH, start_BT)
    return jnp.swapaxes(o_BNTH, 1, 2)[:, :T]


def pallas(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start_BT: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Ours, which goes no further than the documents do."""
    from smollm_jax.gpu_attention import BLOCK, attention

    T = q_BTNH.shape[1]
    return attention(*_padded(BLOCK, q_BTNH, k_BTKH, v_BTKH, start_BT), interpret)[:, :T]


def over(mesh: Mesh | None, kernel: Kernel, *, rows: Any = None, heads: Any = None) -> Kernel:
    """`kernel` on the devices of `mesh`, each with its rows, and its heads where the axis divides them.

    A kernel is one program to XLA's partitioner, which would have every device compute everything.
    """
    if mesh is None or mesh.size == 1:
        return kernel

    def divided(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start_BT: jax.Array) -> jax.Array:
        divides = heads is not None and k_BTKH.shape[2] % mesh.shape[heads] == 0
        of_heads, of_rows = PartitionSpec(rows, None, heads if divides else None), PartitionSpec(rows)
        return jax.shard_map(
            kernel,
            mesh=mesh,
            in_specs=(of_heads, of_heads, of_heads, of_rows),
            out_specs=of_heads,
            check_vma=False,  # the kernels do not say over which axes their results vary
        )(q_BTNH, k_BTKH, v_BTKH, start_BT)

    return divided


def _padded(multiple: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, `start_BT` last, with T made a multiple of `multiple` by a document of its own."""
    T = arrays[0].shape[1]
    missing = -T % multiple
    *qkv, start_BT = arrays
    padded = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in qkv)
    return *padded, jnp.pad(start_BT, ((0, 0), (0, missing)), constant_values=T)
