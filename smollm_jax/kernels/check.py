"""Check a kernel against its reference on the device at hand: values and gradients."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.model.attention import starts_of
from smollm_jax.model.ops import REFERENCE, Ops
from smollm_jax.model.transformer import rope_angles
from smollm_jax.runtime.errors import one_line

Z_LOSS = 0.01  # large enough for its share of the gradient to be seen


def check_against_reference(
    what: str, fn: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Any],
    *, names: Sequence[str], tolerance: float | Sequence[float], cotangent: Any = None, exact: bool = True,
    size: Callable[[np.ndarray], Any] = lambda x: np.max(np.abs(x)),
) -> str:  # fmt: skip
    """Describe how `fn` differs from `reference` or fails. "" if they agree.

    The description begins with `what`. Compares outputs and, with a `cotangent`, the gradients of all inputs in
    the order of `names`. `tolerance` is for all or for each. If `exact`, the inputs are arrays, and the
    `reference` gets them in float32. `size` measures a gap, relative to the reference.
    """

    def outcome(fn: Callable[..., Any], *inputs: Any) -> list[jax.Array]:
        if cotangent is None:
            return jax.tree.leaves(fn(*inputs))
        out, pull = jax.vjp(fn, *inputs)
        return jax.tree.leaves((out, pull(jax.tree.map(lambda d, o: d.astype(o.dtype), cotangent, out))))

    try:
        ours = jax.block_until_ready(jax.jit(outcome, static_argnums=0)(fn, *inputs))
    except Exception as error:  # whatever a compiler may raise: a slow run is better than none
        return f"{what}: does not run here: {one_line(error)}"
    if exact:
        inputs = [x.astype(jnp.float32) for x in inputs]
    with jax.default_matmul_precision("highest"):  # else a GPU or TPU rounds the operands of f32 products down
        theirs = jax.jit(outcome, static_argnums=0)(reference, *inputs)
    for name, most, *pair in zip(names, np.broadcast_to(tolerance, len(names)), ours, theirs, strict=True):
        a, b = (np.asarray(x, np.float32) for x in pair)
        gap = np.max(size(a - b) / np.maximum(size(b), 1e-6))
        if not gap <= most:
            return f"{what}: {name} differs from the reference by {gap:.2%}"
    return ""


def check_ops(ops: Ops, config: ModelConfig, dtype: Any) -> str:
    """Check every kernel among `ops` at the shapes of `config`. "" means all agree."""
    wrong = check_attention(ops.attention, config, dtype)
    if wrong or not ops.on_gpu:  # only a GPU has other kernels
        return wrong
    wrong = check_cross_entropy(ops.cross_entropy, config.vocab_size, dtype)
    return wrong or check_layer(ops.project_heads, ops.feed_forward, config, dtype)


def check_attention(attention: Callable[..., jax.Array], config: ModelConfig, dtype: Any) -> str:
    """Check on two packed rows of four documents each, at the heads of `config`."""
    T, N, K, H = 256, config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v, do = _random(0, dtype, *((2, T, n, H) for n in (N, K, K, N)))
    ends_2E = jnp.array([[70, 71, 200], [128, 250, 256]])
    start_2T = starts_of(jnp.sum(jnp.arange(T)[None, :, None] >= ends_2E[:, None], axis=-1))
    return check_against_reference(
        "attention", lambda *qkv: attention(*qkv, start_2T), lambda *qkv: REFERENCE.attention(*qkv, start_2T),
        (q, k, v), names=("the output", "dq", "dk", "dv"), tolerance=tolerance_of(dtype), cotangent=do,
    )  # fmt: skip


def check_cross_entropy(cross_entropy: Callable[..., Any], words: int, dtype: Any) -> str:
    """Check loss and gradient on a few tokens, more strictly than other kernels."""
    logits_BCV = 4 * jax.random.normal(jax.random.key(0), (2, 16, words))
    # the last word too: it may be in a block of words that is not full
    targets_BC = jax.random.randint(jax.random.key(1), (2, 16), 0, words).at[0, 0].set(words - 1)
    # 0 and 1, as in training on text, and other weights of both signs
    weights_BC = jnp.stack([(jnp.arange(16) % 3 > 0).astype(jnp.float32), jnp.linspace(-0.5, 2, 16)])
    exact, rounded = tolerance_of("float32") / 10, tolerance_of(dtype) / (4 if dtype == jnp.bfloat16 else 10)
    return check_against_reference(
        "cross entropy", lambda logits: cross_entropy(logits, targets_BC, weights_BC, dtype, Z_LOSS),
        lambda logits: REFERENCE.cross_entropy(logits, targets_BC, weights_BC, jnp.float32, Z_LOSS),
        (logits_BCV,), names=("the loss", "the z-loss", "its gradient"), tolerance=(exact, exact, rounded),
    )  # fmt: skip


def check_layer(
    project_heads: Callable[..., Any], feed_forward: Callable[..., Any], config: ModelConfig, dtype: Any
) -> str:
    """Check both functions at the shapes of `config`, with tokens that fill no whole blocks."""
    T, D, F = 67, config.hidden_size, config.intermediate_size
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    rope = rope_angles(jnp.arange(2 * T).reshape(2, T) % T, head_dim=H, theta=config.rope_theta)
    x_BTD, dx_BTD = _random(0, dtype, (2, T, D), (2, T, D))
    shapes = (D, N, H), (D, K, H), (D, K, H), (D, F), (D, F), (F, D)
    q, k, v, gate, up, down = (0.1 * weights for weights in _random(1, "float32", *shapes))
    cotangent = tuple(_random(2, dtype, *((2, T, n, H) for n in (N, K, K))))
    check = partial(check_against_reference, "a layer", tolerance=tolerance_of(dtype))
    linear = REFERENCE.linear
    return check(
        partial(project_heads, rope=rope, linear=linear),
        partial(REFERENCE.project_heads, rope=rope, linear=linear),
        (x_BTD, q, k, v), names=("queries", "keys", "values", "dx", "dq", "dk", "dv"), cotangent=cotangent,
    ) or check(
        partial(feed_forward, linear=linear), partial(REFERENCE.feed_forward, linear=linear),
        (x_BTD, gate, up, down), names=("the feed-forward", "dx", "dgate", "dup", "ddown"), cotangent=dx_BTD,
    )  # fmt: skip


def _random(seed: int, dtype: Any, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def tolerance_of(dtype: Any) -> float:
    """Return the tolerance for outputs in `dtype`, of the largest entry of the reference."""
    # rounding alone gave 0.005 in bfloat16 and 0.000001 in float32, a leak between documents 1
    return {"bfloat16": 0.02, "float32": 0.0001}[jnp.dtype(dtype).name]
