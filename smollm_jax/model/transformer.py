"""SmolLM2: a Llama-style decoder with grouped-query attention, in Flax NNX.

NNX declares and initialises the parameters; the layers are stacked on their first dim and run by
`jax.lax.scan`, so that thirty of them compile like one, or written out one after the other (`unroll`). Everything
below is pure: a `SmolLM` is built, split into a plain dict of arrays (`params_of`) and put together again
(`SmolLM.from_params`) inside jit.
This file knows no mesh, no loss, no tokenizer and no Hugging Face name; attention over packed rows, the lookup of
tokens, the products with weights and the keeping of residuals are functions it is given, the plain ones if none.

Letters, at the end of each array's name: B batch · T tokens being computed · S key/cache positions ·
V vocab · D model width · F feed-forward width · L layers · N query heads · K key/value heads ·
G = N/K · H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.model.attention import packed_attention, starts_of
from smollm_jax.model.ops import (
    PRODUCT,
    Keep,
    Kernel,
    Layer,
    Lookup,
    Product,
    as_they_are,
    cheap,
    reference_embed,
    reference_linear,
    rotate,
    swiglu,
)
from smollm_jax.runtime.errors import require

if TYPE_CHECKING:
    from smollm_jax.model.ops import Joined


Params = dict[str, Any]
Policy = Literal["none", "dots", "full"]


def rope_angles(positions_BT: jax.Array, *, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin (B, T, 1, H/2) of the rotary embedding, in f32: bf16 cannot tell positions past 256 apart.

    Su et al. 2021 (RoFormer); dim i turns with dim i + H/2, as Llama's released weights expect.
    """
    frequency_H = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle_BT1H = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_H[None, None, None]
    return jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)


class RMSNorm(nnx.Module):
    """Zhang & Sennrich 2019, computed in f32: the mean of squares loses small addends in bf16."""

    def __init__(self, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones(config.hidden_size))
        self.epsilon = config.rms_norm_eps

    @jax.named_scope("norm")
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        @cheap
        def norm(x_BTD: jax.Array, scale_D: jax.Array) -> jax.Array:
            x = x_BTD.astype(jnp.float32)
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
            return (x * scale_D[None, None]).astype(x_BTD.dtype)

        return norm(x_BTD, self.scale[...])


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        init = partial(_normal, rngs, config.initializer_range)
        self.q, self.k, self.v = init(D, N, H), init(D, K, H), init(D, K, H)
        self.o = init(N, H, D)

    @jax.named_scope("projections")
    def __call__(self, x_BTD, rope, core: Callable, product: Product, joined: Joined | None) -> jax.Array:
        """`core(q, k, v)` is the attention proper: over the row in training, over a cache in decoding."""
        if joined:
            q_BTNH, k_BTKH, v_BTKH = joined.heads(x_BTD, self.q[...], self.k[...], self.v[...], rope)
        else:
            q_BTNH = rotate(product("BTD,DNH->BTNH", x_BTD, self.q[...]), rope)
            k_BTKH = rotate(product("BTD,DKH->BTKH", x_BTD, self.k[...]), rope)
            v_BTKH = product("BTD,DKH->BTKH", x_BTD, self.v[...])
        return product("BTNH,NHD->BTD", core(q_BTNH, k_BTKH, v_BTKH), self.o[...])


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        init = partial(_normal, rngs, config.initializer_range)
        self.gate, self.up, self.down = init(D, F), init(D, F), init(F, D)

    @jax.named_scope("feed_forward")
    def __call__(self, x_BTD: jax.Array, product: Product, joined: Joined | None) -> jax.Array:
        if joined:
            return joined.feed_forward(x_BTD, self.gate[...], self.up[...], self.down[...])
        gate_BTF, up_BTF = (product("BTD,DF->BTF", x_BTD, weights[...]) for weights in (self.gate, self.up))

        @cheap
        def gated(gate_BTF: jax.Array, up_BTF: jax.Array, down: jax.Array) -> jax.Array:
            return product("BTF,FD->BTD", swiglu(gate_BTF, up_BTF), down)

        return gated(gate_BTF, up_BTF, self.down[...])


class Block(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BTD, rope, core: Callable, product: Product, joined: Joined | None) -> jax.Array:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, core, product, joined)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD), product, joined)


class SmolLM(nnx.Module):
    """The language model; `dtype` is that of the computation, the parameters are f32.

    `remat` says what the backward pass computes again: "none" (what is cheap), "dots" (all but the products with
    weights), "full".
    `attention(q, k, v, start)` is that over packed rows, `lookup(embedding, tokens)` that of tokens,
    `product(letters, x, weights)` that with weights, `keep(layer)` a layer that keeps residuals in another form,
    `joined` what a layer does with matrices side by side, None: with each alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        remat: Policy = "none",
        unroll: int = 1,
        attention: Kernel = packed_attention,
        lookup: Lookup = reference_embed,
        keep: Keep = as_they_are,
        product: Product = reference_linear,
        joined: Joined | None = None,
    ):
        self.config, self.dtype, self.remat, self.unroll = config, jnp.dtype(dtype), remat, unroll
        self.attention, self.lookup, self.keep, self.product = attention, lookup, keep, product
        self.joined = joined
        self.embedding = _normal(rngs, config.initializer_range, config.vocab_size, config.hidden_size)
        self.blocks = _stacked_blocks(config, rngs)
        self.final_norm = RMSNorm(config)
        if not config.tie_embeddings:
            self.head = _normal(rngs, config.initializer_range, config.vocab_size, config.hidden_size)

    @classmethod
    def from_params(cls, config: ModelConfig, params: Params, **compute: Any) -> SmolLM:
        """The model around `params` (see `params_of`); raises `ValueError` naming a leaf that does not fit."""
        abstract = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **compute))
        graphdef, state = nnx.split(abstract)
        _check_same_leaves(nnx.to_pure_dict(state), params)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    @property
    def head_VD(self) -> jax.Array:
        """Weights that turn features into logits; the embedding itself where they are tied."""
        return self.embedding[...] if self.config.tie_embeddings else self.head[...]

    def features(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """Final normed hidden states (B, T, D) of rows whose documents `segment_ids_BT` keeps apart."""
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        start_BT = starts_of(segment_ids_BT)
        rope = self._rope(jnp.arange(start_BT.shape[1])[None] - start_BT)
        graphdef, stacked = nnx.split(self.blocks)

        @jax.named_scope("scores")
        def core(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
            return self.attention(q_BTNH, k_BTKH, v_BTKH, start_BT)

        def layer(x_BTD: jax.Array, weights: Any) -> jax.Array:
            return nnx.merge(graphdef, weights)(x_BTD, rope, core, self.product, self.joined)

        in_a_loop = self.unroll < self.config.num_layers
        apply = self.keep(_rematerialise(layer, self.remat, in_a_loop=in_a_loop))
        x_BTD = self._embed(tokens_BT)
        with jax.named_scope("layers"):
            x_BTD, _ = jax.lax.scan(
                lambda x, weights: (apply(x, weights), None), x_BTD, stacked, unroll=self.unroll
            )
        return self.final_norm(x_BTD)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """f32 logits (..., V) of features (..., D)."""
        head_VD = self.head_VD.astype(x_BTD.dtype)
        return jnp.einsum("...D,VD->...V", x_BTD, head_VD, preferred_element_type=jnp.float32)

    def __call__(self, tokens_BT: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """f32 logits (B, T, V); `segment_ids` (B, T) keeps packed documents apart, positions restart in each."""
        return self.logits(self.features(tokens_BT, segment_ids))

    @jax.named_scope("embedding")
    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        return self.lookup(self.embedding[...], tokens_BT).astype(self.dtype)

    @jax.named_scope("projections")
    def _rope(self, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rope_angles(positions_BT, head_dim=self.config.head_dim, theta=self.config.rope_theta)


def init_params(config: ModelConfig, seed: int) -> Params:
    """Fresh f32 parameters, every matrix normal with `initializer_range`, every norm one."""
    return params_of(SmolLM(config, rngs=nnx.Rngs(seed)))


def params_of(model: SmolLM) -> Params:
    """The model's parameters as a plain nested dict of arrays, layers stacked on their first dim."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _normal(rngs: nnx.Rngs, std: float, *shape: int) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def _stacked_blocks(config: ModelConfig, rngs: nnx.Rngs) -> Block:
    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def create(rngs: nnx.Rngs) -> Block:
        return Block(config, rngs)

    return create(rngs)


def _rematerialise(layer: Layer, remat: Policy, *, in_a_loop: bool) -> Layer:
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = {"dots": policies.save_only_these_names(PRODUCT), "full": policies.nothing_saveable}[remat]
    # only where all layers stand in one program can XLA see that what is computed again was there before
    return jax.checkpoint(layer, policy=policy, prevent_cse=not in_a_loop)


def _check_same_leaves(expected: Params, params: Params) -> None:
    want = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(expected)
    }
    have = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for name in sorted(want.keys() | have.keys()):
        require(name in have, f"parameter {name} is missing; the config asks for it")
        require(name in want, f"parameter {name} is not part of this config's model")
        require(
            want[name].shape == have[name].shape,
            f"parameter {name}: expected shape {want[name].shape} from the config, got {have[name].shape}",
        )
