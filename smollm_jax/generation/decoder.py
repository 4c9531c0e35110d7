"""Lay out a model for decoding with a key/value cache. A token costs one read of the weights.

Layers are separate leaves, because XLA reads leaves faster than slices of a stack. Query, key and value are one
matrix, gate and up another. Only `Matrix` knows the layout in memory. The fastest layout for a single row differs
between bf16 on a CPU and all else. On a GPU, steps of a few rows with one token each run kernels/triton_decode.py.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.kernels import triton_decode
from smollm_jax.kernels.check import check_against_reference, tolerance_of
from smollm_jax.kernels.cpu import STREAM_OUTPUTS, stream
from smollm_jax.kernels.select import select_attention
from smollm_jax.kernels.triton_decode import LayerCache, LayerWeights
from smollm_jax.model.attention import MASKED
from smollm_jax.model.ops import rotate, swiglu
from smollm_jax.model.transformer import RMSNorm, SmolLM, params_of, rope_angles
from smollm_jax.runtime.errors import one_line, say

KEY_BLOCK = 512  # keys of a long cache that a part of a prompt attends to at once


class Matrix(nnx.Module):
    """A matrix (outputs, inputs) to multiply rows with. `streamed` stores it as `stream` reads it.

    As (outputs, inputs) XLA's own product with one vector runs along memory. But XLA reads 28 GB/s of f32 and 11
    of bf16. `stream` reads 21 of bf16. Both layouts serve several rows. XLA:CPU copies the second factor of a
    product into another order, so the first one is to be the weights: `comes_first`.
    """

    def __init__(self, weights_OI: jax.Array, *, streamed: bool, comes_first: bool = False):
        self.streamed, self.comes_first, parts = streamed, comes_first, [weights_OI]
        if streamed:
            starts = range(0, len(weights_OI), STREAM_OUTPUTS)
            parts = [weights_OI[start : start + STREAM_OUTPUTS].T for start in starts]
        self.parts = nnx.List(nnx.Param(part) for part in parts)

    def __call__(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """Multiply `x` (..., I) by the matrix, in the dtype of `x` unless given."""
        x_MI = x.reshape(-1, x.shape[-1])
        out_MO = jnp.concatenate([self._product(x_MI, part[...]) for part in self.parts], axis=1)
        return out_MO.astype(dtype or x.dtype).reshape(*x.shape[:-1], -1)

    def _product(self, x_MI: jax.Array, weights: jax.Array) -> jax.Array:
        if self.streamed and len(x_MI) == 1:
            return stream(x_MI[0], weights)[None]
        if self.comes_first and len(x_MI) > 1:
            # without the barrier XLA sees that x may come first as well, and turns the product round
            product_OM = jnp.einsum("OI,MI->OM", weights, x_MI, preferred_element_type=jnp.float32)
            return jax.lax.optimization_barrier(product_OM).T
        letters = "MI,IO->MO" if self.streamed else "MI,OI->MO"
        return jnp.einsum(letters, x_MI.astype(weights.dtype), weights, preferred_element_type=jnp.float32)


class DecoderLayer(nnx.Module):
    """A block's weights, transposed and fused. `weights` is the block's part of the model's state."""

    def __init__(self, config: ModelConfig, weights: Any, dtype: Any, **how: bool):
        D = config.hidden_size
        attention, mlp = weights["attention"], weights["mlp"]
        qkv_DO = jnp.concatenate([attention[name].reshape(D, -1) for name in "qkv"], axis=1)
        gate_up_DO = jnp.concatenate([mlp["gate"], mlp["up"]], axis=1)
        self.attention_norm = RMSNorm(config, weights["attention_norm"]["scale"])
        self.mlp_norm = RMSNorm(config, weights["mlp_norm"]["scale"])
        self.qkv, self.o, self.gate_up, self.down = (
            Matrix(weights_IO.T.astype(dtype), **how)
            for weights_IO in (qkv_DO, attention["o"].reshape(-1, D), gate_up_DO, mlp["down"])
        )

    def for_kernels(self) -> LayerWeights:
        """Return the arrays that `triton_decode.layer_step` reads."""
        qkv, o, gate_up, down = (m.parts[0][...] for m in (self.qkv, self.o, self.gate_up, self.down))
        norm, mlp_norm = self.attention_norm, self.mlp_norm
        return LayerWeights(norm.scale[...], qkv, o, mlp_norm.scale[...], gate_up, down, norm.epsilon)


class Decoder(nnx.Module):
    """The weights of a `SmolLM` for decoding in its compute dtype. Activations and cache have `dtype`.

    `kernels` decides whether steps of one token use the Triton kernels. With None, the steps use them if the
    kernels are for the device and agree with the reference on it.
    """

    def __init__(self, model: SmolLM, *, kernels: bool | None = None, interpret: bool = False):
        self.kernels = _wants_kernels(model) if kernels is None else kernels
        self.interpret = interpret
        # XLA:CPU has no fast product of bf16 weights with one vector, so there we write our own
        on_cpu = not self.kernels and jax.default_backend() == "cpu"
        streamed = on_cpu and model.dtype == jnp.bfloat16
        how = {"streamed": streamed, "comes_first": on_cpu and not streamed}
        # XLA:CPU also converts between f32 and bf16 one number at a time, so only the weights are stored as bf16
        self.config, self.dtype = model.config, jnp.dtype(jnp.float32) if streamed else model.dtype
        stacked = nnx.to_pure_dict(nnx.state(model.blocks, nnx.Param))
        self.layers = nnx.List(
            DecoderLayer(model.config, jax.tree.map(lambda leaf, i=i: leaf[i], stacked), model.dtype, **how)
            for i in range(model.config.num_layers)
        )
        self.embedding = nnx.Param(model.embedding[...].astype(self.dtype))
        self.final_norm = RMSNorm(model.config, model.final_norm.scale[...])
        head_VD = self.embedding[...] if model.config.tie_embeddings else model.head[...]
        self.head = Matrix(head_VD.astype(model.dtype), **how)

    def init_cache(self, batch_size: int, length: int) -> tuple[LayerCache, ...]:
        """Return an empty key/value cache of `length` positions: (B, K, S, H) twice per layer."""
        shape = (batch_size, self.config.num_kv_heads, length, self.config.head_dim)
        return tuple((jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in self.layers)

    def features(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: tuple[LayerCache, ...]
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """Return features (B, T, D) of tokens at `positions_BT`, and the cache with the tokens.

        Several tokens per row must be consecutive and start at the same position in each row. A row padded on its
        right writes nonsense past its end. The row's own next tokens overwrite this before anything reads it.
        """
        config, (B, T) = self.config, tokens_BT.shape
        rope = rope_angles(positions_BT, head_dim=config.head_dim, theta=config.rope_theta)
        x_BTD, grown = self.embedding[...][tokens_BT], []
        if self.kernels and T == 1 and B <= triton_decode.MOST_ROWS:
            angles, x_BD = (rope[0][:, 0, 0], rope[1][:, 0, 0]), x_BTD[:, 0]
            position_B = positions_BT[:, 0].astype(jnp.int32)
            for layer, layer_cache in zip(self.layers, cache, strict=True):
                x_BD, new = triton_decode.layer_step(
                    x_BD, angles, position_B, layer_cache, layer.for_kernels(), interpret=self.interpret
                )
                grown.append(new)
            return self.final_norm(x_BD[:, None]), tuple(grown)
        N, K = config.num_heads, config.num_kv_heads
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            heads = layer.qkv(layer.attention_norm(x_BTD)).reshape(B, T, N + 2 * K, config.head_dim)
            q_BTNH, k_BTKH, v_BTKH = heads[:, :, :N], heads[:, :, N : N + K], heads[:, :, N + K :]
            k_BKSH, v_BKSH = _write(layer_cache, rotate(k_BTKH, rope), v_BTKH, positions_BT)
            grown.append((k_BKSH, v_BKSH))
            seen_BTNH = _attend_cache(rotate(q_BTNH, rope), k_BKSH, v_BKSH, positions_BT)
            x_BTD += layer.o(seen_BTNH.reshape(B, T, -1))
            gate, up = jnp.split(layer.gate_up(layer.mlp_norm(x_BTD)), 2, axis=-1)
            x_BTD += layer.down(swiglu(gate, up))
        return self.final_norm(x_BTD), tuple(grown)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return f32 logits (..., V) of features (..., D)."""
        return self.head(x_BTD, jnp.float32)


def _wants_kernels(model: SmolLM) -> bool:
    embedding_VD = model.embedding[...]
    if isinstance(embedding_VD, jax.core.Tracer):  # no kernel can be tried while a program is traced
        return False
    # the device that holds the weights: on a machine with a GPU it may be the CPU
    places = embedding_VD.devices() if isinstance(embedding_VD, jax.Array) else jax.devices()[:1]
    device = min(places, key=lambda device: device.id)
    name, _ = select_attention("auto", device, model.dtype)
    return name == "pallas" and _kernels_agree(model.config, model.dtype, device)


@functools.cache
def _kernels_agree(config: ModelConfig, dtype: Any, device: Any) -> bool:
    try:
        with jax.default_device(device):
            wrong = check_decode(config, dtype)
    except Exception as error:  # such as a device without memory for the check: slow text is better than none
        wrong = one_line(error)
    if wrong:
        say(f"decoding    plain: the kernels failed their check, {wrong}")
    return not wrong


def _attend_cache(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Attend to the cache. A part of a prompt reads a long cache block by block, as far as it is filled.

    The blocks' softmax is the online softmax of Milakov and Gimelshein (2018).
    """
    (B, T, N, H), (K, S) = q_BTNH.shape, k_BKSH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)

    def scores(k_BKSH: jax.Array, keys_11S: jax.Array, first: Any) -> jax.Array:
        mask_BTS = (keys_11S >= first) & (keys_11S <= positions_BT[..., None])
        # scores and softmax in f32: differences of large scores decide
        k_BSKH = jnp.swapaxes(k_BKSH, 1, 2)
        scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
        return jnp.where(mask_BTS[:, None, None], scores_BKGTS * H**-0.5, MASKED)

    def values(weights_BKGTS: jax.Array, v_BKSH: jax.Array, dtype: Any) -> jax.Array:
        v_BSKH, weights_BKGTS = jnp.swapaxes(v_BKSH, 1, 2), weights_BKGTS.astype(v_BKSH.dtype)
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH, preferred_element_type=dtype)

    if T == 1 or S <= KEY_BLOCK:
        weights_BKGTS = jax.nn.softmax(scores(k_BKSH, jnp.arange(S)[None, None], 0), axis=-1)
        return values(weights_BKGTS, v_BKSH, v_BKSH.dtype).reshape(B, T, N, H)

    def block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out_BTKGH, total_BKGT, largest_BKGT = carry
        start = jnp.minimum(i * KEY_BLOCK, S - KEY_BLOCK)  # the last block may overlap the one before it
        k_block, v_block = (jax.lax.dynamic_slice_in_dim(x, start, KEY_BLOCK, 2) for x in (k_BKSH, v_BKSH))
        scores_BKGTS = scores(k_block, start + jnp.arange(KEY_BLOCK)[None, None], i * KEY_BLOCK)
        new_BKGT = jnp.maximum(largest_BKGT, scores_BKGTS.max(-1))
        weights_BKGTS, kept_BKGT = jnp.exp(scores_BKGTS - new_BKGT[..., None]), jnp.exp(largest_BKGT - new_BKGT)
        out_BTKGH *= jnp.transpose(kept_BKGT, (0, 3, 1, 2))[..., None]
        out_BTKGH += values(weights_BKGTS, v_block, jnp.float32)
        return out_BTKGH, total_BKGT * kept_BKGT + weights_BKGTS.sum(-1), new_BKGT

    nothing_BKGT = jnp.zeros((B, K, N // K, T), jnp.float32)
    carry = jnp.zeros(q_BTKGH.shape, jnp.float32), nothing_BKGT, nothing_BKGT + MASKED
    filled = jnp.max(positions_BT) // KEY_BLOCK + 1
    out_BTKGH, total_BKGT, _ = jax.lax.fori_loop(0, filled, block, carry)
    out_BTKGH /= jnp.transpose(total_BKGT, (0, 3, 1, 2))[..., None]
    return out_BTKGH.astype(v_BKSH.dtype).reshape(B, T, N, H)


def _write(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> LayerCache:
    """Return the cache with new keys and values. On a CPU a scatter loops over its rows, a slice is one copy."""
    B, T = positions_BT.shape

    def put(old_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        new_BKTH = jnp.swapaxes(new_BTKH, 1, 2)
        if B == 1 or T > 1:
            return jax.lax.dynamic_update_slice(old_BKSH, new_BKTH, (0, 0, positions_BT[0, 0], 0))
        return old_BKSH.at[jnp.arange(B), :, positions_BT[:, 0]].set(new_BKTH[:, :, 0], mode="drop")

    return put(cache[0], k_BTKH), put(cache[1], v_BTKH)


def check_decode(config: ModelConfig, dtype: Any, *, interpret: bool = False) -> str:
    """Describe how the kernels' layer differs from the reference or fails. "" if they agree.

    Random weights have the shapes of `config`. A token is at both ends of a cache full of random numbers, and of a
    block of keys.
    """
    rng, config = np.random.default_rng(0), replace(config, num_layers=1, vocab_size=8)

    def random(shape: tuple[int, ...], std: float, dtype: Any) -> jax.Array:
        return jnp.asarray(std * rng.standard_normal(shape, np.float32), dtype)

    # this std makes queries, keys and values of a normed row about one, as the cache's are
    shapes = params_of(nnx.eval_shape(lambda: SmolLM(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: random(leaf.shape, config.hidden_size**-0.5, jnp.float32), shapes)
    blocks = params["blocks"]
    for norm in (blocks["attention_norm"], blocks["mlp_norm"], params["final_norm"]):
        norm["scale"] += 1
    decoder = Decoder(SmolLM.from_params(config, params, dtype=dtype), kernels=True, interpret=interpret)
    length = 2 * triton_decode.KEYS
    cache_shape = 1, config.num_kv_heads, length, config.head_dim
    old = random(cache_shape, 1, dtype), random(cache_shape, 1, dtype)
    graphdef, state = nnx.split(decoder)

    def changes(kernels: bool, state: Any, old: LayerCache, positions: jax.Array) -> list[jax.Array]:
        decoder = nnx.merge(graphdef, state)
        decoder.kernels = kernels

        def at(position: jax.Array) -> list[jax.Array]:
            position_11 = position[None, None]
            x_BTD, (new,) = decoder.features(position_11 % 8, position_11, (old,))
            return [x_BTD, *(a.astype(jnp.float32) - b.astype(jnp.float32) for a, b in zip(new, old, strict=True))]

        return jax.lax.map(at, positions)

    return check_against_reference(
        "decoding", functools.partial(changes, True), functools.partial(changes, False),
        # weights and cache are inputs: a program that closes over them would hold them as constants
        (state, old, jnp.array([0, 1, triton_decode.KEYS - 1, triton_decode.KEYS, length - 1])),
        names=("the output", "the cache of keys", "the cache of values"), exact=False,
        tolerance=tolerance_of(dtype),
        # per position, and of vectors: the rounding of one entry in bf16 comes near the tolerance
        size=lambda x: np.linalg.norm(x.reshape(len(x), -1), axis=1),
    )  # fmt: skip
