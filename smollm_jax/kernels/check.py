"""Check a kernel against its reference on the device at hand: values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.kernels.triton_layer import TOKENS
from smollm_jax.model.attention import packed_attention, starts_of
from smollm_jax.model.loss import reference_cross_entropy
from smollm_jax.model.ops import REFERENCE, Ops, reference_feed_forward, reference_project_heads
from smollm_jax.model.transformer import rope_angles
from smollm_jax.runtime.errors import one_line

# Of the largest entry. Rounding alone gave 0.005 and 0.000001, a leak between documents 1
TOLERANCE = {"bfloat16": 0.02, "float32": 0.0001}


def check_against_reference(
    fn: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Any],
    *, names: Sequence[str], tolerance: float, cotangent: Any = None, exact: bool = True,
    size: Callable[[np.ndarray], Any] = lambda x: np.max(np.abs(x)),
) -> str:  # fmt: skip
    """Describe how `fn` differs from `reference` or fails; "" if they agree.

    Compares the outputs and, with a `cotangent`, the gradients of all inputs, in the order of `names`. The
    `reference` gets float32 copies of the inputs if `exact`. `size` measures a gap, relative to the reference.
    """

    def outcome(fn: Callable[..., Any], *inputs: Any) -> list[jax.Array]:
        if cotangent is None:
            return jax.tree.leaves(fn(*inputs))
        out, pull = jax.vjp(fn, *inputs)
        return jax.tree.leaves((out, pull(jax.tree.map(lambda d, o: d.astype(o.dtype), cotangent, out))))

    try:
        ours = jax.jit(outcome, static_argnums=0)(fn, *inputs)
    except Exception as error:  # whatever a compiler may raise: a slow run is better than none
        return f"does not run here: {one_line(error)}"
    with jax.default_matmul_precision("highest"):  # else a GPU or TPU rounds the operands of f32 products down
        theirs = jax.jit(outcome, static_argnums=0)(reference, *(_in_f32(inputs) if exact else inputs))
    for name, *pair in zip(names, ours, theirs, strict=True):
        a, b = (np.asarray(x, np.float32) for x in pair)
        gap = np.max(size(a - b) / np.maximum(size(b), 1e-6))
        if not gap <= tolerance:
            return f"{name} differs from the reference by {gap:.2%}"
    return ""


def check_ops(ops: Ops, config: ModelConfig, dtype: Any) -> str:
    """Check every kernel among `ops` at the shapes of `config`; "" if all agree with the reference."""
    wrong = check_attention(ops.attention, config, dtype)
    if not wrong and ops.cross_entropy is not REFERENCE.cross_entropy:
        wrong = check_cross_entropy(ops.cross_entropy, config.vocab_size, dtype)
    if not wrong and ops.feed_forward is not REFERENCE.feed_forward:
        wrong = check_layer(ops.project_heads, ops.feed_forward, config, dtype)
    return wrong


def check_attention(attention: Callable[..., jax.Array], config: ModelConfig, dtype: Any) -> str:
    """Check on two packed rows of four documents each, at the heads of `config`."""
    T, N, K, H = 256, config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v, do = _random(0, dtype, *((2, T, n, H) for n in (N, K, K, N)))
    ends_2E = jnp.array([[70, 71, 200], [128, 250, 256]])
    start_2T = starts_of(jnp.sum(jnp.arange(T)[None, :, None] >= ends_2E[:, None], axis=-1))
    wrong = check_against_reference(
        lambda *qkv: attention(*qkv, start_2T), lambda *qkv: packed_attention(*qkv, start_2T), (q, k, v),
        names=("the output", "dq", "dk", "dv"), tolerance=_tolerance(dtype), cotangent=do,
    )  # fmt: skip
    return wrong and f"attention: {wrong}"


def check_cross_entropy(cross_entropy: Callable[..., Any], words: int, dtype: Any) -> str:
    """Check loss and gradient on a few tokens, more strictly than other kernels."""
    logits_BCV = 4 * jax.random.normal(jax.random.key(0), (2, 16, words))
    # the last word too: it may be in a block of words that is not full
    targets_BC = jax.random.randint(jax.random.key(1), (2, 16), 0, words).at[0, 0].set(words - 1)
    valid_BC = jnp.arange(16)[None] % 3 > jnp.arange(2)[:, None] - 1
    for index, name, within in ((0, "the loss", jnp.float32), (1, "its gradient", dtype)):
        wrong = check_against_reference(
            lambda logits, index=index: cross_entropy(logits, targets_BC, valid_BC, dtype)[index],
            lambda logits, index=index: reference_cross_entropy(logits, targets_BC, valid_BC, jnp.float32)[index],
            (logits_BCV,), names=(name,), tolerance=_tolerance(within) / (4 if within == jnp.bfloat16 else 10),
        )  # fmt: skip
        if wrong:
            return f"cross entropy: {wrong}"
    return ""


def check_layer(
    project_heads: Callable[..., Any], feed_forward: Callable[..., Any], config: ModelConfig, dtype: Any
) -> str:
    """Check both functions at the shapes of `config`, on tokens that fill no whole number of blocks."""
    T, D, F = TOKENS + 3, config.hidden_size, config.intermediate_size
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    rope = rope_angles(jnp.arange(2 * T).reshape(2, T) % T, head_dim=H, theta=config.rope_theta)
    x_BTD, dx_BTD = _random(0, dtype, (2, T, D), (2, T, D))
    shapes = (D, N, H), (D, K, H), (D, K, H), (D, F), (D, F), (F, D)
    q, k, v, gate, up, down = (0.1 * weights for weights in _random(1, "float32", *shapes))
    cotangent = tuple(_random(2, dtype, *((2, T, n, H) for n in (N, K, K))))
    wrong = check_against_reference(
        lambda x, q, k, v: project_heads(x, q, k, v, rope),
        lambda x, q, k, v: reference_project_heads(x, q, k, v, rope),
        (x_BTD, q, k, v), names=("queries", "keys", "values", "dx", "dq", "dk", "dv"),
        tolerance=_tolerance(dtype), cotangent=cotangent,
    )  # fmt: skip
    wrong = wrong or check_against_reference(
        feed_forward, reference_feed_forward, (x_BTD, gate, up, down),
        names=("the feed-forward", "dx", "dgate", "dup", "ddown"), tolerance=_tolerance(dtype), cotangent=dx_BTD,
    )  # fmt: skip
    return wrong and f"a layer: {wrong}"


def _random(seed: int, dtype: Any, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def _in_f32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _tolerance(dtype: Any) -> float:
    return TOLERANCE[jnp.dtype(dtype).name]
