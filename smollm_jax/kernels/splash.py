"""Call JAX's splash attention for TPU, with the signature of `packed_attention`.

Rows are padded to whole blocks. The padding is a document of its own after every token. Letters as in
model/transformer.py.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from smollm_jax.kernels.shard import padded

LANES = 128  # of a TPU's vector registers; the kernel's blocks are multiples of 128
LARGEST_SPLASH_BLOCK = 512  # 512 x 512 scores in f32 are 1 MiB of the 16 MiB a v5e core has for a kernel


def splash_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start_BT: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Compute flash attention (Dao 2023) for TPU. Skips the blocks above the diagonal."""
    T, N, H = q_BTNH.shape[1:]
    q, k, v, start_BT = padded(LANES, q_BTNH * H**-0.5, k_BTKH, v_BTKH, start_BT)
    length = q.shape[1]
    block = max(size for size in range(LANES, LARGEST_SPLASH_BLOCK + 1, LANES) if length % size == 0)
    kernel = splash_kernel.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * N),
        block_sizes=splash_kernel.BlockSizes(
            block_q=block, block_kv=block,
            block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block,
        ),
        interpret=interpret,
    )  # fmt: skip

    qkv = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    o_BNTH = jax.vmap(kernel)(*qkv, splash_kernel.SegmentIds(start_BT, start_BT))
    return jnp.swapaxes(o_BNTH, 1, 2)[:, :T]
