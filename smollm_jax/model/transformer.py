"""Build SmolLM2: a Llama-style decoder with grouped-query attention, in Flax NNX.

NNX declares and initialises the parameters. The layers are stacked on their first dim. `jax.lax.scan` runs them,
so that thirty layers compile like one, or they are unrolled (`unroll`). Everything below is pure: inside jit a
`SmolLM` is built from a plain dict of arrays (`SmolLM.from_params`, `params_of`). This file knows no mesh, no
loss, no tokenizer and no Hugging Face name. `Ops` holds the functions of the model.

Letters, at the end of each array's name: B batch · T tokens being computed · S key/cache positions ·
V vocab · D model width · F feed-forward width · L layers · N query heads · K key/value heads ·
G = N/K · H head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smollm_jax.config.adapters import apply_adapters
from smollm_jax.config.architecture import ModelConfig, parameter_shapes
from smollm_jax.model.attention import starts_of
from smollm_jax.model.ops import PRODUCT, REFERENCE, Ops, Rope, cheap
from smollm_jax.runtime.devices import precision_of
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.trees import flatten, unflatten

Params = dict[str, Any]
Policy = Literal["none", "dots", "full"]
POLICIES: tuple[Policy, ...] = ("none", "dots", "full")  # from the fastest to the one that needs least memory
_policies = jax.checkpoint_policies
# what the backward pass does not recompute
KEPT = {"dots": _policies.save_only_these_names(PRODUCT), "full": _policies.nothing_saveable}


class Adapters(NamedTuple):
    """Stacked adapter arrays by path (config/adapters.py), and their scale."""

    params: Params
    scale: float


def rope_angles(positions_BT: jax.Array, *, head_dim: int, theta: float) -> Rope:
    """Return cos and sin (B, T, 1, H/2) in f32: bf16 merges positions past 256.

    Su et al. 2021 (RoFormer). Dim i turns with dim i + H/2, as Llama's released weights expect.
    """
    # by the host in f64: a TPU's power is an exponential of a product, and at position 8,191 its error is 0.01 rad
    frequency_H = (theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    angle_BT1H = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_H[None, None, None]
    return jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)


class RMSNorm(nnx.Module):
    """A norm (Zhang & Sennrich 2019) computed in f32. In bf16 the mean of squares loses small addends."""

    def __init__(self, config: ModelConfig, scale_D: jax.Array | None = None):
        self.scale = nnx.Param(jnp.ones(config.hidden_size) if scale_D is None else scale_D)
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
        self.q, self.k, self.v, self.o = (_normal(config, rngs, f"blocks/attention/{name}") for name in "qkvo")

    @jax.named_scope("projections")
    def __call__(self, x_BTD: jax.Array, rope: Rope, start_BT: jax.Array, ops: Ops) -> jax.Array:
        weights = self.q[...], self.k[...], self.v[...]
        q_BTNH, k_BTKH, v_BTKH = ops.project_heads(x_BTD, *weights, rope, linear=ops.linear)
        with jax.named_scope("scores"):
            o_BTNH = ops.attention(q_BTNH, k_BTKH, v_BTKH, start_BT)
        return ops.linear("BTNH,NHD->BTD", o_BTNH, self.o[...])


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        names = "gate", "up", "down"
        self.gate, self.up, self.down = (_normal(config, rngs, f"blocks/mlp/{name}") for name in names)

    @jax.named_scope("feed_forward")
    def __call__(self, x_BTD: jax.Array, ops: Ops) -> jax.Array:
        return ops.feed_forward(x_BTD, self.gate[...], self.up[...], self.down[...], linear=ops.linear)


class Block(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BTD: jax.Array, rope: Rope, start_BT: jax.Array, ops: Ops) -> jax.Array:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, start_BT, ops)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD), ops)


class SmolLM(nnx.Module):
    """The language model. `dtype` is the compute dtype, and the parameters are f32.

    `remat` selects what the backward pass recomputes: "none" (cheap operations), "dots" (all but products with
    weights) or "full". `ops` are the functions the model computes with.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        remat: Policy = "none",
        unroll: int = 1,
        ops: Ops = REFERENCE,
    ):
        self.config, self.dtype, self.remat, self.unroll, self.ops = config, jnp.dtype(dtype), remat, unroll, ops
        self.embedding = _normal(config, rngs, "embedding")
        self.blocks = nnx.split_rngs(splits=config.num_layers)(nnx.vmap(partial(Block, config)))(rngs)
        self.final_norm = RMSNorm(config)
        if not config.tie_embeddings:
            self.head = _normal(config, rngs, "head")

    @classmethod
    def from_params(cls, config: ModelConfig, params: Params, **compute: Any) -> SmolLM:
        """Return a model with `params` (see `params_of`). Raises `UserError` naming a leaf that does not fit."""
        shapes, found = parameter_shapes(config), flatten(params, "/")
        for name in sorted(shapes.keys() | found.keys()):
            require(name in found, f"parameter {name} is missing; the config asks for it")
            require(name in shapes, f"parameter {name} is not part of this config's model")
            shape, got = shapes[name], found[name].shape
            require(shape == got, f"parameter {name}: expected shape {shape} from the config, got {got}")
        graphdef, state = nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **compute)))
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    @property
    def head_VD(self) -> jax.Array:
        """Return the weights (V, D) that turn features into logits. Tied weights are the embedding itself."""
        return self.embedding[...] if self.config.tie_embeddings else self.head[...]

    def features(
        self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None, adapters: Adapters | None = None
    ) -> jax.Array:
        """Return final normed hidden states (B, T, D). `segment_ids_BT` keeps the documents of a row apart.

        With `adapters`, each layer adds them to its weights.
        """
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        start_BT = starts_of(segment_ids_BT)
        positions_BT = jnp.arange(start_BT.shape[1])[None] - start_BT
        return self.features_at(tokens_BT, positions_BT, start_BT, adapters)

    def features_at(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        start_BT: jax.Array,
        adapters: Adapters | None = None,
    ) -> jax.Array:
        """Return what `features` does, of tokens at given positions. `ops.attention` takes `start_BT`."""
        with jax.named_scope("projections"):
            rope = rope_angles(positions_BT, head_dim=self.config.head_dim, theta=self.config.rope_theta)
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x_BTD: jax.Array, weights: Any) -> jax.Array:
            if adapters is not None:
                weights = _adapted(weights, adapters.scale)
            return nnx.merge(graphdef, weights)(x_BTD, rope, start_BT, self.ops)

        apply = layer
        if self.remat != "none":
            # XLA can merge a recomputation with the original only if all layers are in one program
            all_in_one = self.unroll >= self.config.num_layers
            apply = jax.checkpoint(layer, policy=KEPT[self.remat], prevent_cse=all_in_one)
        apply = self.ops.wrap_layer(apply)
        with jax.named_scope("embedding"):
            x_BTD = self.ops.embed(self.embedding[...], tokens_BT).astype(self.dtype)
        layers: Any = stacked
        if adapters is not None:
            layers = stacked, adapters.params["blocks"]
        with jax.named_scope("layers"):
            x_BTD, _ = jax.lax.scan(lambda x, each: (apply(x, each), None), x_BTD, layers, unroll=self.unroll)
        return self.final_norm(x_BTD)

    def __call__(self, tokens_BT: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Return f32 logits (B, T, V). `segment_ids` (B, T) keeps documents apart: positions restart in each."""
        with precision_of(self.dtype):
            x_BTD = self.features(tokens_BT, segment_ids)
            head_VD = self.head_VD.astype(x_BTD.dtype)
            return jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, preferred_element_type=jnp.float32)


def init_params(config: ModelConfig, seed: int, *, scale_residual: bool = False) -> Params:
    """Return fresh f32 parameters: matrices normal with `initializer_range`, norms one.

    `scale_residual` divides what each block adds to the residual stream by sqrt(2 L) (Radford et al. 2019). The
    StandardParametrizator of nanotron does so for o_proj and down_proj.
    """
    params = params_of(SmolLM(config, rngs=nnx.Rngs(seed)))
    for group, name in (("attention", "o"), ("mlp", "down")) if scale_residual else ():
        params["blocks"][group][name] /= (2 * config.num_layers) ** 0.5
    return params


def params_of(model: SmolLM) -> Params:
    """Return the parameters as nested dicts of arrays, layers stacked on their first dim."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _adapted(weights: tuple[nnx.State, Params], scale: float) -> nnx.State:
    """Return a layer's weights with its adapters in them, f32 as `Ops` expect.

    The kernels then need no form with adapters. A compute dtype rounds the sum, as it rounds weights in training.
    """
    state, trained = weights
    block, adapters = (flatten({"blocks": tree}, "/") for tree in (nnx.to_pure_dict(state), trained))
    with jax.named_scope("adapters"):
        block = {name: leaf.astype(jnp.float32) for name, leaf in block.items()}
        merged = apply_adapters(block, adapters, scale, jax.lax.stop_gradient)
    nnx.replace_by_pure_dict(state, unflatten(merged, "/")["blocks"])
    return state


def _normal(config: ModelConfig, rngs: nnx.Rngs, path: str) -> nnx.Param:
    """Return a normal parameter of the shape at `path`. `nnx.vmap` adds the layer dim."""
    shape = parameter_shapes(config, one_layer=True)[path]
    return nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32))
