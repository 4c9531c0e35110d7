"""Compute attention over packed rows in plain JAX: the kernels' reference, and a CPU's form.

Each block of queries sees the keys up to its end, which skips most scores above the diagonal. The gradient is
written by hand (FlashAttention, Dao 2023) and recomputes the scores. No product has the scores transposed, because
XLA:CPU transposes one number at a time. On a CPU the gradient is 1.5 to 2.6 times as fast as JAX's own. All is in
float32: differences of large scores decide. Rounding scores to bfloat16 costs a CPU more than the faster product
saves. (A GPU may use TF32. A TPU rounds operands.) Only reverse mode has a gradient. Letters as in transformer.py.
"""

import jax
import jax.numpy as jnp

# More blocks skip more scores but take XLA longer to compile. Larger blocks hold more scores at a time.
SMALLEST_BLOCK, LARGEST_BLOCK, BLOCKS = 128, 512, 8
MASKED = -1e30


def starts_of(segment_ids_BT: jax.Array) -> jax.Array:
    """Return where each token's document begins in its row: (B, T) int32. Padding counts as a document."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    begins_BT = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1] - 1) != 0
    return jax.lax.cummax(jnp.where(begins_BT, index_T[None], 0), axis=1)


@jax.custom_vjp
def packed_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, start_BT: jax.Array) -> jax.Array:
    """Compute causal attention in each document of packed rows: (B, T, N, H). `start_BT` as from `starts_of`."""
    return _forward(q_BTNH, k_BTKH, v_BTKH, start_BT)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, start_BT):
    K = k_BTKH.shape[2]
    q_BKGTH, k_BKSH, v_BKSH = _by_group(q_BTNH, K), _heads_first(k_BTKH), _heads_first(v_BTKH)
    outs, logs = [], []
    for rows in _blocks(q_BTNH.shape[1]):
        seen = slice(0, rows.stop)
        scores_BKGTS = _scores(q_BKGTH[:, :, :, rows], k_BKSH[:, :, seen], start_BT[:, rows])
        best_BKGT = jnp.max(scores_BKGTS, axis=-1)
        weights_BKGTS = jnp.exp(scores_BKGTS - best_BKGT[..., None])
        sum_BKGT = jnp.sum(weights_BKGTS, axis=-1)
        outs.append(_dot(weights_BKGTS, v_BKSH[:, :, seen], (4,), (2,)) / sum_BKGT[..., None])
        logs.append(best_BKGT + jnp.log(sum_BKGT))
    o_BTNH = _by_head(jnp.concatenate(outs, axis=3)).astype(q_BTNH.dtype)
    return o_BTNH, (q_BTNH, k_BTKH, v_BTKH, start_BT, o_BTNH, jnp.concatenate(logs, axis=3))


def _backward(kept, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, start_BT, o_BTNH, log_BKGT = kept
    # without the barrier XLA keeps the scores of the forward pass if both passes are in one program
    q_BTNH, k_BTKH, v_BTKH = jax.lax.optimization_barrier((q_BTNH, k_BTKH, v_BTKH))
    B, T, K, H = k_BTKH.shape
    q_BKGTH, do_BKGTH, o_BKGTH = (_by_group(x_BTNH, K) for x_BTNH in (q_BTNH, do_BTNH, o_BTNH))
    k_BKSH, v_BKSH = _heads_first(k_BTKH), _heads_first(v_BTKH)
    along_BKGT = jnp.sum(do_BKGTH * o_BKGTH, axis=-1)
    blocks_of_dq = []
    dk_BKHS = dv_BKHS = jnp.zeros((B, K, H, T))
    for rows in _blocks(T):
        seen = slice(0, rows.stop)
        own_q_BKGTH, own_do_BKGTH = q_BKGTH[:, :, :, rows], do_BKGTH[:, :, :, rows]
        scores_BKGTS = _scores(own_q_BKGTH, k_BKSH[:, :, seen], start_BT[:, rows])
        weights_BKGTS = jnp.exp(scores_BKGTS - log_BKGT[..., rows, None])
        dweights_BKGTS = _dot(own_do_BKGTH, v_BKSH[:, :, seen], (4,), (3,))
        dscores_BKGTS = weights_BKGTS * (dweights_BKGTS - along_BKGT[..., rows, None]) * H**-0.5
        blocks_of_dq.append(_dot(dscores_BKGTS, k_BKSH[:, :, seen], (4,), (2,)))
        after = ((0, 0), (0, 0), (0, 0), (0, T - rows.stop))
        dk_BKHS += jnp.pad(_dot(own_q_BKGTH, dscores_BKGTS, (2, 3), (2, 3)), after)
        dv_BKHS += jnp.pad(_dot(own_do_BKGTH, weights_BKGTS, (2, 3), (2, 3)), after)
    dq_BTNH = _by_head(jnp.concatenate(blocks_of_dq, axis=3)).astype(q_BTNH.dtype)
    dk_BTKH, dv_BTKH = dk_BKHS.transpose(0, 3, 1, 2), dv_BKHS.transpose(0, 3, 1, 2)
    return dq_BTNH, dk_BTKH.astype(k_BTKH.dtype), dv_BTKH.astype(v_BTKH.dtype), None


packed_attention.defvjp(_forward, _backward)


def tree_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, end_BT: jax.Array) -> jax.Array:
    """Compute attention in rows of trees in depth-first order: (B, T, N, H).

    A token sees itself and its ancestors. The subtree of token i goes up to `end_BT[:, i]`, which is not part of
    it. No gradient is meant to be taken.
    """
    K = k_BTKH.shape[2]
    q_BKGTH, k_BKSH, v_BKSH = _by_group(q_BTNH, K), _heads_first(k_BTKH), _heads_first(v_BTKH)
    outs, index_T = [], jnp.arange(q_BTNH.shape[1])
    for rows in _blocks(q_BTNH.shape[1]):
        seen = slice(0, rows.stop)
        own_BTS = index_T[rows][None, :, None] < end_BT[:, None, seen]
        scores_BKGTS = _masked_scores(q_BKGTH[:, :, :, rows], k_BKSH[:, :, seen], own_BTS)
        outs.append(_dot(jax.nn.softmax(scores_BKGTS, axis=-1), v_BKSH[:, :, seen], (4,), (2,)))
    return _by_head(jnp.concatenate(outs, axis=3)).astype(q_BTNH.dtype)


def _scores(q_BKGTH: jax.Array, k_BKSH: jax.Array, start_BT: jax.Array) -> jax.Array:
    """Return scores of the last T positions. `MASKED` outside a query's own document and after the query."""
    return _masked_scores(q_BKGTH, k_BKSH, jnp.arange(k_BKSH.shape[2])[None, None] >= start_BT[..., None])


def _masked_scores(q_BKGTH: jax.Array, k_BKSH: jax.Array, own_BTS: jax.Array) -> jax.Array:
    """Return scores of the last T positions, `MASKED` outside of `own_BTS` and after the query."""
    T, S = q_BKGTH.shape[3], k_BKSH.shape[2]
    index_S = jnp.arange(S)
    own_BTS &= (index_S[None] <= index_S[S - T :, None])[None]
    scores_BKGTS = _dot(q_BKGTH, k_BKSH, (4,), (3,)) * q_BKGTH.shape[-1] ** -0.5
    return jnp.where(own_BTS[:, None, None], scores_BKGTS, MASKED)


def _dot(a: jax.Array, b: jax.Array, of_a: tuple[int, ...], of_b: tuple[int, ...]) -> jax.Array:
    """Multiply over these dims per row and key/value head. An einsum may swap the sides and transpose."""
    return jax.lax.dot_general(a, b, ((of_a, of_b), ((0, 1), (0, 1))))


def _blocks(T: int) -> list[slice]:
    """Cut T into at most `BLOCKS` blocks, or more of the largest size. All but the last are multiples of 128."""
    size = min(-(-T // (BLOCKS * SMALLEST_BLOCK)) * SMALLEST_BLOCK, LARGEST_BLOCK)
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]


def _by_group(x_BTNH: jax.Array, K: int) -> jax.Array:
    B, T, N, H = x_BTNH.shape
    return _heads_first(x_BTNH).reshape(B, K, N // K, T, H)


def _by_head(x_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.reshape(B, K * G, T, H).swapaxes(1, 2)


def _heads_first(x_BTNH: jax.Array) -> jax.Array:
    return x_BTNH.swapaxes(1, 2).astype(jnp.float32)
