"""Convert Hugging Face's config.json to a `ModelConfig` and back. Checks every field that it reads."""

from collections.abc import Callable
from functools import partial
from typing import Any

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.presets import PRESETS, START
from smollm_jax.runtime.errors import UserError, require

# more than any Llama has: a damaged size must not request an exabyte, nor a list of a billion names
LARGEST_SIZE, MOST_LAYERS = 2**31, 10_000

# values of a config.json that our model cannot change, and their defaults in LlamaConfig
ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
# written beside the fields of `FIELDS`
CONSTANT = {
    **{name: ONLY[name] for name in ("attention_bias", "mlp_bias", "hidden_act", "rope_interleaved")},
    "architectures": ["LlamaForCausalLM"],
    "attention_dropout": 0.0,
    "is_llama_config": True,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rope_scaling": None,
    "use_cache": True,
}
# LlamaConfig's own
DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
            "max_position_embeddings": 2_048, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DEFAULT_THETA = 10_000.0


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the content of config.json. Theta stands twice: transformers 4 knows only `rope_theta`.

    Raises `UserError` for an architecture that transformers or our own import would refuse to load.
    """
    hidden, heads, std = config.hidden_size, config.num_heads, config.initializer_range
    only = "transformers loads no other Llama"
    require(hidden % heads == 0, f"hidden_size={hidden} must be a multiple of num_heads={heads}: {only}")
    require(std <= 1, f"initializer_range={std:g} must be at most 1: {only}")
    values = {theirs: getattr(config, ours) for ours, (theirs, _) in FIELDS.items()}
    if config.extra_eos_token_ids:
        values["eos_token_id"] = list(config.stop_ids)
    if config.pad_token_id is None:
        del values["pad_token_id"]
    rope = {"rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"}}
    content = CONSTANT | values | rope | {"torch_dtype": dtype}
    model_config(content)
    return dict(sorted(content.items()))


def generation_config(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the content of generation_config.json beside the config.json `hf`: token ids, and how to sample.

    Greedy text of a small model repeats itself. No penalty: it would change `generate(do_sample=False)` too. With
    `_from_model_config`, transformers would take the settings for its own defaults, and drop them.
    """
    temperature, top_p, *_ = PRESETS[START]
    ids = {name: hf[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in hf}
    return ids | {"do_sample": True, "temperature": temperature, "top_p": top_p}


def model_config(hf: Any) -> ModelConfig:
    """Return a config.json's architecture. Raises `UserError` naming a field that our model does not have."""
    require(isinstance(hf, dict), f"config.json must hold an object, {type(hf).__name__} came")
    require(hf.get("model_type") == "llama", f"model_type is {hf.get('model_type')!r}; only llama can be read")
    for name, value in ONLY.items():
        came = hf.get(name, value)
        require(came == value, f"config.json: {name} is {came!r}; only {value!r} can be read")
    hidden, heads = _size(hf, "hidden_size"), _size(hf, "num_attention_heads")
    derived = {"head_dim": hidden // heads, "num_key_value_heads": heads}
    hf = DEFAULTS | hf | {name: value for name, value in derived.items() if hf.get(name) is None}
    model = ModelConfig(**{ours: read(hf, theirs) for ours, (theirs, read) in FIELDS.items()})
    return model.ending_at(token_ids(hf, "eos_token_id", model.vocab_size))


def _rope_theta(hf: dict[str, Any], name: str) -> float:
    """Return theta: transformers 5 keeps it in rope_parameters, older releases at the top."""
    thetas = {name: _positive(hf, name)} if hf.get(name) is not None else {}
    for group in ("rope_scaling", "rope_parameters"):
        rope = hf.get(group)
        if rope is None:
            continue
        require(isinstance(rope, dict), f"config.json: {group} must be an object, {rope!r} came")
        for key, value in rope.items():
            is_plain = key == name or PLAIN_ROPE.get(key, ...) == value
            require(is_plain, f"config.json: {group} has {key}={value!r}; only plain RoPE can be read")
        if name in rope:
            thetas = {f"{group}.{name}": _positive(rope, name)} | thetas
    if not thetas:
        return DEFAULT_THETA
    found = ", ".join(f"{place}={theta:g}" for place, theta in thetas.items())
    require(len(set(thetas.values())) == 1, f"config.json contradicts itself: {found}")
    return next(iter(thetas.values()))


def _read(hf: dict[str, Any], name: str, kind: Any, fits: Callable[[Any], bool], expected: str) -> Any:
    value = hf.get(name)
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool) and fits(value):
        return value
    raise UserError(f"config.json: {name} must be {expected}, {value!r} came")


def _size(hf: dict[str, Any], name: str, most: int = LARGEST_SIZE) -> int:
    return int(_read(hf, name, int, lambda size: 0 < size <= most, f"a whole number from 1 to {most:,}"))


def _positive(hf: dict[str, Any], name: str) -> float:
    return float(_read(hf, name, int | float, lambda number: 0 < number < 1e30, "a number above 0"))


def _flag(hf: dict[str, Any], name: str) -> bool:
    return bool(_read(hf, name, bool, lambda _: True, "true or false"))


def token_ids(hf: dict[str, Any], name: str, vocab_size: int) -> list[int]:
    """Return the ids in a field that may hold one, a list or null."""
    value, expected = hf.get(name), f"an id below vocab_size={vocab_size}"
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [int(_read({name: one}, name, int, lambda i: 0 <= i < vocab_size, expected)) for one in values]


def _token_id(hf: dict[str, Any], name: str) -> int | None:
    """Return the id, the first of several, or None."""
    return next(iter(token_ids(hf, name, _size(hf, "vocab_size"))), None)


def _pad_id(hf: dict[str, Any], name: str) -> int | None:
    """Return the id, or None for the -1 of old folders, which means none."""
    return None if hf.get(name) == -1 else _token_id(hf, name)


# our name: Hugging Face's name, and how its value is read
FIELDS: dict[str, tuple[str, Callable[[dict[str, Any], str], Any]]] = {
    "vocab_size": ("vocab_size", _size),
    "hidden_size": ("hidden_size", _size),
    "num_layers": ("num_hidden_layers", partial(_size, most=MOST_LAYERS)),
    "num_heads": ("num_attention_heads", _size),
    "num_kv_heads": ("num_key_value_heads", _size),
    "head_dim": ("head_dim", _size),
    "intermediate_size": ("intermediate_size", _size),
    "rms_norm_eps": ("rms_norm_eps", _positive),
    "rope_theta": ("rope_theta", _rope_theta),
    "max_seq_len": ("max_position_embeddings", _size),
    "initializer_range": ("initializer_range", _positive),
    "tie_embeddings": ("tie_word_embeddings", _flag),
    "bos_token_id": ("bos_token_id", _token_id),
    "eos_token_id": ("eos_token_id", _token_id),
    "pad_token_id": ("pad_token_id", _pad_id),
}
