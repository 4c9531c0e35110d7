"""The model laid out for decoding with a key/value cache: a token costs one read of the weights.

Layers are apart, since XLA reads leaves of their own faster than slices of a stack. Each matrix is kept as
(outputs, inputs), with query, key and value in one and gate and up in one: so XLA's product with a single
vector runs along memory, a fifth faster on a CPU than the layout of training, in half as many operations.
Tests hold it to the logits of `SmolLM`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from smollm_jax.config import ModelConfig
from smollm_jax.model import QUERY_BLOCK, RMSNorm, SmolLM, attend, rope_angles, rotate

LayerCache = tuple[jax.Array, jax.Array]  # k_BKSH, v_BKSH: heads first, as the products with them read it


class DecoderLayer(nnx.Module):
    """Weights of one block, turned and joined; `weights` is that block's part of the model's state."""

    def __init__(self, config: ModelConfig, weights: Any, dtype: Any):
        D = config.hidden_size
        attention, mlp = weights["attention"], weights["mlp"]
        qkv = [attention[name].reshape(D, -1) for name in ("q", "k", "v")]
        self.attention_norm, self.mlp_norm = RMSNorm(config), RMSNorm(config)
        self.attention_norm.scale = nnx.Param(weights["attention_norm"]["scale"])
        self.mlp_norm.scale = nnx.Param(weights["mlp_norm"]["scale"])
        self.qkv = nnx.Param(jnp.concatenate(qkv, axis=1).T.astype(dtype))
        self.o = nnx.Param(attention["o"].reshape(-1, D).T.astype(dtype))
        self.gate_up = nnx.Param(jnp.concatenate([mlp["gate"], mlp["up"]], axis=1).T.astype(dtype))
        self.down = nnx.Param(mlp["down"].T.astype(dtype))


class Decoder(nnx.Module):
    """The weights of a `SmolLM` for decoding, in its compute dtype."""

    def __init__(self, model: SmolLM):
        self.config, self.dtype = model.config, model.dtype
        stacked = nnx.to_pure_dict(nnx.state(model.blocks, nnx.Param))
        self.layers = nnx.List(
            DecoderLayer(model.config, jax.tree.map(lambda leaf, i=i: leaf[i], stacked), model.dtype)
            for i in range(model.config.num_layers)
        )
        self.embedding = nnx.Param(model.embedding[...].astype(model.dtype))
        self.final_norm = RMSNorm(model.config)
        self.final_norm.scale = nnx.Param(model.final_norm.scale[...])
        if not model.config.tie_embeddings:
            self.head = nnx.Param(model.head[...].astype(model.dtype))

    def init_cache(self, batch_size: int, length: int) -> tuple[LayerCache, ...]:
        """An empty key/value cache of `length` positions: a pair of (B, K, S, H) a layer."""
        shape = (batch_size, self.config.num_kv_heads, length, self.config.head_dim)
        return tuple(
            (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(self.config.num_layers)
        )

    def features(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: tuple[LayerCache, ...]
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """Features (B, T, D) of tokens at `positions_BT`, which join the cache and see all before them.

        Several tokens at a time lie one after the other, from the same position in each row. A row padded on
        its right writes nonsense past its end; nothing reads that before the row's own next tokens overwrite it.
        """
        config = self.config
        rope = rope_angles(positions_BT, head_dim=config.head_dim, theta=config.rope_theta)
        x_BTD, grown = self.embedding[...][tokens_BT], []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            q_BTNH, k_BTKH, v_BTKH = self._heads(layer, layer.attention_norm(x_BTD))
            k_BKSH, v_BKSH = _write(layer_cache, rotate(k_BTKH, rope), v_BTKH, positions_BT)
            grown.append((k_BKSH, v_BKSH))
            seen_BTNH = _attend_cache(rotate(q_BTNH, rope), k_BKSH, v_BKSH, positions_BT)
            x_BTD += _project(seen_BTNH.reshape(*x_BTD.shape[:2], -1), layer.o[...])
            gate, up = jnp.split(_project(layer.mlp_norm(x_BTD), layer.gate_up[...]), 2, axis=-1)
            x_BTD += _project(jax.nn.silu(gate) * up, layer.down[...])
        return self.final_norm(x_BTD), tuple(grown)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """f32 logits (..., V) of features (..., D)."""
        head_VD = self.embedding[...] if self.config.tie_embeddings else self.head[...]
        return _project(x_BTD, head_VD, jnp.float32)

    def _heads(self, layer: DecoderLayer, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        B, T, _ = x_BTD.shape
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = _project(x_BTD, layer.qkv[...]).reshape(B, T, N + 2 * K, H)
        return heads[:, :, :N], heads[:, :, N : N + K], heads[:, :, N + K :]


def _project(x: jax.Array, weights_OI: jax.Array, dtype: Any = None) -> jax.Array:
    """`x` (..., I) times the matrix, in the dtype of `x` unless another is asked for."""
    dtype, shape = dtype or x.dtype, (*x.shape[:-1], weights_OI.shape[0])
    x_MI = x.reshape(-1, x.shape[-1])
    rows = len(x_MI)
    if rows == 1 and x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        # XLA:CPU multiplies a single bf16 vector element by element, twenty times slower than two
        x_MI = jnp.broadcast_to(x_MI, (2, x_MI.shape[1]))
    out_MO = jnp.einsum("MI,OI->MO", x_MI, weights_OI, preferred_element_type=jnp.float32)
    return out_MO[:rows].astype(dtype).reshape(shape)


def _attend_cache(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Attention of queries at `positions_BT` over the cache, in blocks: the scores of a long prompt never
    exist whole."""
    k_BSKH, v_BSKH = jnp.swapaxes(k_BKSH, 1, 2), jnp.swapaxes(v_BKSH, 1, 2)
    blocks = []
    for start in range(0, q_BTNH.shape[1], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        mask_BTS = jnp.arange(k_BSKH.shape[1]) <= positions_BT[:, block, None]
        blocks.append(attend(q_BTNH[:, block], k_BSKH, v_BSKH, mask_BTS))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _write(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> LayerCache:
    """The cache with new keys and values; on a CPU a scatter is a loop over its rows, a slice one copy."""
    B, T = positions_BT.shape

    def put(old_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        new_BKTH = jnp.swapaxes(new_BTKH, 1, 2)
        if B == 1 or T > 1:
            return jax.lax.dynamic_update_slice(old_BKSH, new_BKTH, (0, 0, positions_BT[0, 0], 0))
        return old_BKSH.at[jnp.arange(B), :, positions_BT[:, 0]].set(new_BKTH[:, :, 0], mode="drop")

    return put(cache[0], k_BTKH), put(cache[1], v_BTKH)
