"""The model laid out for decoding with a key/value cache: a token costs one read of the weights.

Layers are apart, since XLA reads leaves of their own faster than slices of a stack, with query, key and value
in one matrix and gate and up in one. How a matrix lies in memory is `Matrix`'s alone to know: the layout that
is fastest for a single row differs between bf16 on a CPU and all else. Tests hold it to the logits of `SmolLM`.
On a GPU a few rows of one token each go through kernels of our own (gpu_decode.py).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.kernels.check import TOLERANCE
from smollm_jax.kernels.cpu import STREAM_OUTPUTS, _stream
from smollm_jax.kernels.select import choose
from smollm_jax.kernels.triton_decode import KEYS
from smollm_jax.model.attention import MASKED
from smollm_jax.model.ops import rotate, swiglu
from smollm_jax.model.transformer import RMSNorm, SmolLM, params_of, rope_angles
from smollm_jax.runtime.errors import one_line

QUERY_BLOCK = 512  # of a long prompt

LayerCache = tuple[jax.Array, jax.Array]  # k_BKSH, v_BKSH: heads first, as the products with them read it


class Matrix(nnx.Module):
    """Weights (outputs, inputs) to multiply rows with; `streamed` keeps them as `_stream` reads them.

    As (outputs, inputs) XLA's own product with one vector runs along memory; but where it reads 28 GB/s of f32
    it reads 11 of bf16, and `_stream` 21. Both layouts serve several rows.
    """

    def __init__(self, weights_OI: jax.Array, *, streamed: bool):
        self.streamed = streamed
        parts = [weights_OI]
        if streamed:
            starts = range(0, len(weights_OI), STREAM_OUTPUTS)
            parts = [weights_OI[start : start + STREAM_OUTPUTS].T for start in starts]
        self.parts = nnx.List(nnx.Param(part) for part in parts)

    def __call__(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """`x` (..., I) times the matrix, in the dtype of `x` unless another is asked for."""
        x_MI = x.reshape(-1, x.shape[-1])
        outs = [self._product(x_MI, part[...]) for part in self.parts]
        out_MO = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)
        return out_MO.astype(dtype or x.dtype).reshape(*x.shape[:-1], -1)

    def _product(self, x_MI: jax.Array, weights: jax.Array) -> jax.Array:
        if self.streamed and len(x_MI) == 1:
            return _stream(x_MI[0], weights)[None]
        letters = "MI,IO->MO" if self.streamed else "MI,OI->MO"
        return jnp.einsum(letters, x_MI.astype(weights.dtype), weights, preferred_element_type=jnp.float32)


class DecoderLayer(nnx.Module):
    """Weights of one block, turned and joined; `weights` is that block's part of the model's state."""

    def __init__(self, config: ModelConfig, weights: Any, dtype: Any, streamed: bool):
        D = config.hidden_size
        attention, mlp = weights["attention"], weights["mlp"]
        qkv = [attention[name].reshape(D, -1) for name in ("q", "k", "v")]
        self.attention_norm, self.mlp_norm = RMSNorm(config), RMSNorm(config)
        self.attention_norm.scale = nnx.Param(weights["attention_norm"]["scale"])
        self.mlp_norm.scale = nnx.Param(weights["mlp_norm"]["scale"])
        self.qkv, self.o, self.gate_up, self.down = (
            Matrix(weights_IO.T.astype(dtype), streamed=streamed)
            for weights_IO in (
                jnp.concatenate(qkv, axis=1),
                attention["o"].reshape(-1, D),
                jnp.concatenate([mlp["gate"], mlp["up"]], axis=1),
                mlp["down"],
            )
        )


class Decoder(nnx.Module):
    """The weights of a `SmolLM` for decoding in its compute dtype; `dtype` is that of activations and cache.

    `kernels` says whether steps of one token use those of gpu_decode.py; if None, where they are for the device
    and agree with the plain form on it.
    """

    def __init__(self, model: SmolLM, *, kernels: bool | None = None, interpret: bool = False):
        self.kernels = _wants_kernels(model) if kernels is None else kernels
        self.interpret = interpret
        # XLA:CPU has no fast product of bf16 weights with one vector, so there we write our own
        streamed = not self.kernels and model.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
        # and it turns f32 to bf16 and back one number at a time: only the weights gain by being short
        self.config, self.dtype = model.config, jnp.dtype(jnp.float32) if streamed else model.dtype
        stacked = nnx.to_pure_dict(nnx.state(model.blocks, nnx.Param))
        self.layers = nnx.List(
            DecoderLayer(model.config, jax.tree.map(lambda leaf, i=i: leaf[i], stacked), model.dtype, streamed)
            for i in range(model.config.num_layers)
        )
        self.embedding = nnx.Param(model.embedding[...].astype(self.dtype))
        self.final_norm = RMSNorm(model.config)
        self.final_norm.scale = nnx.Param(model.final_norm.scale[...])
        head_VD = self.embedding[...] if model.config.tie_embeddings else model.head[...]
        self.head = Matrix(head_VD.astype(model.dtype), streamed=streamed)

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
        if self._uses_kernels(*tokens_BT.shape):
            return self._step(x_BTD, rope, positions_BT, cache)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            q_BTNH, k_BTKH, v_BTKH = self._heads(layer, layer.attention_norm(x_BTD))
            k_BKSH, v_BKSH = _write(layer_cache, rotate(k_BTKH, rope), v_BTKH, positions_BT)
            grown.append((k_BKSH, v_BKSH))
            seen_BTNH = _attend_cache(rotate(q_BTNH, rope), k_BKSH, v_BKSH, positions_BT)
            x_BTD += layer.o(seen_BTNH.reshape(*x_BTD.shape[:2], -1))
            gate, up = jnp.split(layer.gate_up(layer.mlp_norm(x_BTD)), 2, axis=-1)
            x_BTD += layer.down(swiglu(gate, up))
        return self.final_norm(x_BTD), tuple(grown)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """f32 logits (..., V) of features (..., D)."""
        return self.head(x_BTD, jnp.float32)

    def _uses_kernels(self, B: int, T: int) -> bool:
        if not self.kernels or T > 1:
            return False
        from smollm_jax.kernels.triton_decode import MOST_ROWS

        return B <= MOST_ROWS

    def _step(
        self,
        x_BTD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        positions_BT: jax.Array,
        cache: tuple[LayerCache, ...],
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """`features` of one token a row, by the kernels."""
        from smollm_jax.kernels.triton_decode import layer_step

        cos_BH, sin_BH = (part_BT1H[:, 0, 0] for part_BT1H in rope)
        x_BD, position_B, grown = x_BTD[:, 0], positions_BT[:, 0].astype(jnp.int32), []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x_BD, new = layer_step(
                x_BD, (cos_BH, sin_BH), position_B, layer_cache, layer, interpret=self.interpret
            )
            grown.append(new)
        return self.final_norm(x_BD[:, None]), tuple(grown)

    def _heads(self, layer: DecoderLayer, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        B, T, _ = x_BTD.shape
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = layer.qkv(x_BTD).reshape(B, T, N + 2 * K, H)
        return heads[:, :, :N], heads[:, :, N : N + K], heads[:, :, N + K :]


def _wants_kernels(model: SmolLM) -> bool:
    embedding_VD = model.embedding[...]
    if isinstance(embedding_VD, jax.core.Tracer):  # nothing can be tried while a program is being traced
        return False
    # the device that has the weights: on a machine with a GPU it may be the CPU
    places = embedding_VD.devices() if isinstance(embedding_VD, jax.Array) else jax.devices()[:1]
    device = min(places, key=lambda device: device.id)
    return choose("auto", device, model.dtype)[0] == "pallas" and _kernels_agree(model.config, model.dtype, device)


@functools.cache
def _kernels_agree(config: ModelConfig, dtype: Any, device: Any) -> bool:
    from smollm_jax.generation.decoder import decode_disagreement as disagreement

    with jax.default_device(device):
        wrong = disagreement(config, dtype)
    if wrong:
        print(f"decoding    plain: the kernels failed their check, {wrong}", file=sys.stderr)
    return not wrong


def _attend_cache(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Attention of queries at `positions_BT` over the cache, in blocks: the scores of a long prompt never
    exist whole."""
    k_BSKH, v_BSKH = jnp.swapaxes(k_BKSH, 1, 2), jnp.swapaxes(v_BKSH, 1, 2)
    blocks = []
    for start in range(0, q_BTNH.shape[1], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        mask_BTS = jnp.arange(k_BSKH.shape[1])[None, None] <= positions_BT[:, block, None]
        blocks.append(_attend(q_BTNH[:, block], k_BSKH, v_BSKH, mask_BTS))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Softmax attention of N query heads over K key/value heads where `mask_BTS` is true: (B, T, N, H)."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    # scores and softmax in f32: differences of large scores decide
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS * H**-0.5, MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(B, T, N, H)


def _write(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> LayerCache:
    """The cache with new keys and values; on a CPU a scatter is a loop over its rows, a slice one copy."""
    B, T = positions_BT.shape

    def put(old_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        new_BKTH = jnp.swapaxes(new_BTKH, 1, 2)
        if B == 1 or T > 1:
            return jax.lax.dynamic_update_slice(old_BKSH, new_BKTH, (0, 0, positions_BT[0, 0], 0))
        return old_BKSH.at[jnp.arange(B), :, positions_BT[:, 0]].set(new_BKTH[:, :, 0], mode="drop")

    return put(cache[0], k_BTKH), put(cache[1], v_BTKH)


def decode_disagreement(config: ModelConfig, dtype: Any, *, interpret: bool = False, seed: int = 0) -> str:
    """In words how a layer by these kernels differs from one by the plain form, or fails; "" if it agrees.

    Random weights of the model's shapes, and a token at both ends of a cache full of random numbers, and at those
    of a block of keys.
    """
    try:
        return _decode_disagreement(replace(config, num_layers=1, vocab_size=8), dtype, interpret, seed)
    except Exception as error:  # whatever a compiler may raise: better slow text than none
        return f"they do not run here: {one_line(error)}"


def _decode_disagreement(config: ModelConfig, dtype: Any, interpret: bool, seed: int) -> str:
    from smollm_jax.generation.decoder import Decoder

    rng = np.random.default_rng(seed)
    shapes = params_of(nnx.eval_shape(lambda: SmolLM(config, rngs=nnx.Rngs(0))))
    # so that a normed row's queries, keys and values come to about one, as the cache's are
    params = jax.tree.map(lambda leaf: _random(rng, leaf.shape, config.hidden_size**-0.5, jnp.float32), shapes)
    blocks = params["blocks"]
    for norm in (blocks["attention_norm"], blocks["mlp_norm"], params["final_norm"]):
        norm["scale"] += 1
    decoder = Decoder(SmolLM.from_params(config, params, dtype=dtype), kernels=True, interpret=interpret)
    length = 2 * KEYS
    cache_shape = (1, config.num_kv_heads, length, config.head_dim)
    old = ((_random(rng, cache_shape, 1, dtype), _random(rng, cache_shape, 1, dtype)),)

    def step(kernels: bool) -> Callable:
        decoder.kernels = kernels
        graphdef, state = nnx.split(decoder)
        return partial(jax.jit(lambda state, *given: nnx.merge(graphdef, state).features(*given)), state)

    ours, plain = step(True), step(False)
    for position in (0, 1, KEYS - 1, KEYS, length - 1):
        given = jnp.array([[position % 8]]), jnp.array([[position]]), old
        pairs = zip(jax.tree.leaves(ours(*given)), jax.tree.leaves(plain(*given)), strict=True)
        for name, pair in zip(("the output", "the cache of keys", "the cache of values"), pairs, strict=True):
            a, b = (np.asarray(x, np.float32) for x in pair)
            of_token = b if name == "the output" else b[:, :, position]
            # sizes as of vectors: that of one entry's rounding in bf16 comes near the tolerance
            gap = float(np.linalg.norm((a - b).ravel()) / np.linalg.norm(of_token.ravel()))
            if not gap <= TOLERANCE[jnp.dtype(dtype).name]:
                return f"{name} differs from the plain form's by {gap:.2%}, with a token at {position}"
    return ""


def _random(rng: np.random.Generator, shape: tuple[int, ...], std: float, dtype: Any) -> jax.Array:
    return jnp.asarray(std * rng.standard_normal(shape, np.float32), dtype)
