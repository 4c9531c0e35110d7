"""config.json of Hugging Face, both ways: read field by field, nothing of it on trust."""

from __future__ import annotations

from typing import Any

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.runtime.errors import require

# past any Llama: a damaged size shall not ask for an exabyte, nor for a list of a billion names
LARGEST_SIZE, MOST_LAYERS = 2**31, 10_000


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json; both spellings of theta, since readers before transformers 5 know only one."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "is_llama_config": True,
        "max_position_embeddings": config.max_seq_len,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_interleaved": False,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


# what our model does, and the value a config.json without the field stands for
FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def model_config(hf: Any) -> ModelConfig:
    """The architecture that a config.json describes; raises `ValueError` naming a field that we do not do."""
    require(isinstance(hf, dict), f"config.json must hold an object, {type(hf).__name__} came")
    require(hf.get("model_type") == "llama", f"model_type is {hf.get('model_type')!r}; only llama can be read")
    for name, value in FIXED.items():
        came = hf.get(name, value)
        require(came == value, f"config.json: {name} is {came!r}; only {value!r} can be read")
    heads = _size(hf, "num_attention_heads")
    hidden = _size(hf, "hidden_size")
    head_dim = hidden // heads if hf.get("head_dim") is None else _size(hf, "head_dim")
    tied = hf.get("tie_word_embeddings", False)  # LlamaConfig's own default
    require(isinstance(tied, bool), f"config.json: tie_word_embeddings must be true or false, {tied!r} came")
    vocab_size = _size(hf, "vocab_size")
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=_size(hf, "num_hidden_layers", MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=heads if hf.get("num_key_value_heads") is None else _size(hf, "num_key_value_heads"),
        head_dim=head_dim,
        intermediate_size=_size(hf, "intermediate_size"),
        rms_norm_eps=_positive(hf, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(hf),
        max_seq_len=_size(hf, "max_position_embeddings"),
        initializer_range=_positive(hf, "initializer_range", 0.02),
        tie_embeddings=tied,
        bos_token_id=_token_id(hf, "bos_token_id", vocab_size),
        eos_token_id=_token_id(hf, "eos_token_id", vocab_size),
    )


def _rope_theta(hf: dict[str, Any]) -> float:
    """Theta, wherever it stands: transformers 5 keeps it in rope_parameters, older ones at the top."""
    thetas = {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = hf.get(name)
        if rope is None:
            continue
        require(isinstance(rope, dict), f"config.json: {name} must be an object, {rope!r} came")
        kind = rope.get("rope_type", rope.get("type", "default"))
        require(kind == "default", f"config.json: {name} asks for {kind!r}; only plain RoPE can be read")
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        unknown = sorted(map(str, set(rope) - known))
        require(not unknown, f"config.json: {name} has {', '.join(unknown)}; only plain RoPE can be read")
        part = rope.get("partial_rotary_factor", 1.0)
        require(part == 1.0, f"config.json: {name}.partial_rotary_factor is {part!r}; only 1.0 can be read")
        if "rope_theta" in rope:
            thetas[f"{name}.rope_theta"] = _positive(rope, "rope_theta")
    if hf.get("rope_theta") is not None:
        thetas["rope_theta"] = _positive(hf, "rope_theta")
    require(bool(thetas), "config.json has neither rope_theta nor rope_parameters.rope_theta")
    said = ", ".join(f"{name}={theta:g}" for name, theta in thetas.items())
    require(len(set(thetas.values())) == 1, f"config.json contradicts itself: {said}")
    return next(iter(thetas.values()))


def _size(hf: dict[str, Any], name: str, most: int = LARGEST_SIZE) -> int:
    value = hf.get(name)
    require(
        isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most,
        f"config.json: {name} must be a whole number from 1 to {most:,}, {value!r} came",
    )
    return int(value)  # type: ignore[arg-type]


def _positive(hf: dict[str, Any], name: str, default: float | None = None) -> float:
    value = hf.get(name, default)
    require(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30,
        f"config.json: {name} must be a number above 0, {value!r} came",
    )
    return float(value)  # type: ignore[arg-type]


def _token_id(hf: dict[str, Any], name: str, vocab_size: int) -> int:
    """The id, or the first of several; 0 where there is none."""
    value = hf.get(name)
    if isinstance(value, list) and value:
        value = value[0]
    if value is None:
        return 0
    require(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size,
        f"config.json: {name} must be an id below vocab_size={vocab_size}, {value!r} came",
    )
    return int(value)  # type: ignore[arg-type]
