"""Convert architecture and weights to a GGUF file of llama.cpp's architecture "llama", and back.

llama.cpp turns neighbouring dims of a head by RoPE, where Hugging Face turns dim i with i + H/2. So the rows of
query and key change places. The tensors are otherwise Hugging Face's under other names.
"""

from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.hf.config_json import FIELDS, model_config
from smollm_jax.hf.gguf_file import GGUFFile, library, read_file, write_file
from smollm_jax.hf.gguf_vocabulary import KEY, read_vocabulary
from smollm_jax.hf.mapping import Params, Tensor, from_hf, tensors, to_hf
from smollm_jax.runtime.errors import UserError, require, say
from smollm_jax.tokenizer.tokenizer import Tokenizer

DTYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
FINE = ("F32", "F16", "BF16", "Q8_0")  # good enough for the embedding, which is also the head
COARSE_HEAD = "Q8_0"
BLOCK = 32  # weights of a row that share a scale
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEAD = "output.weight"
# the key below "llama.": our name
KEYS = {
    "block_count": "num_layers",
    "context_length": "max_seq_len",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope.dimension_count": "head_dim",
}
HEAD_DIMS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
# values of keys that our model cannot change
ONLY = {
    "general.architecture": "llama",
    "llama.rope.scaling.type": "none",
    "llama.expert_count": 0,
    "llama.attention.causal": True,
    "split.count": 1,
}


def gguf_name(tensor: Tensor) -> str:
    """Return llama.cpp's name of a tensor."""
    name = tensor.name.removesuffix(".weight")
    if tensor.layer:
        return f"blk.{tensor.layer[0]}.{NAMES[name.split('.', 3)[3]]}.weight"
    return f"{NAMES[name]}.weight"


def write_gguf(
    params: Params, config: ModelConfig, vocabulary: dict[str, Any], path: Path, *, dtype: str,
    general: dict[str, Any],
) -> None:  # fmt: skip
    """Write f32 numpy parameters with matrices in `dtype`, one of `DTYPES`. Vectors stay f32.

    `vocabulary` has a tokenizer's fields, as of `vocabulary_fields`. `general` has fields of the file's head, such
    as general.name. Raises `UserError`.
    """
    word = dtype.upper()
    held = {gguf_name(tensor): tensor for tensor in tensors(config)}
    kinds = {name: _kind(tensor, word) for name, tensor in held.items()}
    fields = {"general.architecture": "llama"} | general | _config_fields(config)
    fields["general.file_type"] = int(library().LlamaFileType["ALL_F32" if word == "F32" else f"MOSTLY_{word}"])
    fields |= vocabulary | {"general.quantization_version": 2}
    if uneven := [name for name, kind in kinds.items() if kind == "F16" and word != "F16"]:
        rows = ", ".join(sorted({f"{held[name].shape[-1]}" for name in uneven}))
        say(f"{dtype} needs rows of a multiple of {BLOCK}: {len(uneven)} tensors with rows of {rows} are in f16")
    write_file(
        path, fields, [(name, tensor.shape, kinds[name]) for name, tensor in held.items()],
        lambda name: _turned(to_hf(params, held[name]).astype(np.float32), held[name], config, inwards=False),
    )  # fmt: skip


def _kind(tensor: Tensor, word: str) -> str:
    if len(tensor.shape) == 1:
        return "F32"
    if word not in FINE and not tensor.layer:
        word = COARSE_HEAD
    return "F16" if word.startswith("Q") and tensor.shape[-1] % BLOCK else word


def _turned(value_OI: np.ndarray, tensor: Tensor, config: ModelConfig, *, inwards: bool) -> np.ndarray:
    """Return query or key with the rows of each head in the other order, else the tensor itself."""
    if not tensor.name.endswith(("q_proj.weight", "k_proj.weight")):
        return value_OI
    pair = (config.head_dim // 2, 2) if inwards else (2, config.head_dim // 2)
    return value_OI.reshape(-1, *pair, value_OI.shape[1]).swapaxes(1, 2).reshape(value_OI.shape)


def _config_fields(config: ModelConfig) -> dict[str, Any]:
    fields = {f"llama.{key}": getattr(config, ours) for key, ours in KEYS.items()}
    if config.num_heads * config.head_dim != config.hidden_size:  # else llama.cpp derives it
        fields |= {f"llama.{key}": config.head_dim for key in HEAD_DIMS}
    return fields


def read_gguf(path: Path) -> tuple[ModelConfig, Params, Tokenizer]:
    """Return architecture, f32 numpy parameters and tokenizer of a GGUF file. Raises `UserError`."""
    held = read_file(path)
    config = read_gguf_config(held)
    tokenizer = read_vocabulary(held.fields, path)
    sizes = f"{tokenizer.vocab_size:,} entries, the model only {config.vocab_size:,}"
    require(tokenizer.vocab_size <= config.vocab_size, f"{path}: the tokenizer has {sizes}")
    expected = {tensor.name: tensor for tensor in tensors(config)}
    names = {gguf_name(tensor) for tensor in expected.values()}
    if missing := sorted(names - {*held.tensors}):
        raise UserError(f"{path} lacks tensor {missing[0]} ({len(missing)} missing)")
    if extra := sorted({*held.tensors} - names):
        lacks = f"which a Llama with plain RoPE does not have ({len(extra)} such)"
        raise UserError(f"{path} holds tensor {extra[0]}, {lacks}")
    for tensor in expected.values():
        came = held.tensors[gguf_name(tensor)].shape
        require(came == tensor.shape, f"{path}: tensor {gguf_name(tensor)} is {came}, expected {tensor.shape}")

    def read(name: str) -> np.ndarray:
        return _turned(held.read(gguf_name(expected[name])), expected[name], config, inwards=True)

    return config, from_hf(read, config), tokenizer


def read_gguf_config(held: GGUFFile) -> ModelConfig:
    """Return the architecture that the fields tell, checked as if they came from a config.json.

    Raises `UserError` naming a field that our model does not have.
    """
    fields, path = held.fields, held.path
    for key, value in ONLY.items():
        came = fields.get(key, ... if key == "general.architecture" else value)
        require(came == value, f"{path}: {key} is {came!r}; only {value!r} can be read")
    # not there: what llama.cpp takes
    rows = fields.get(f"{KEY}tokens")
    given = {
        "llama.attention.head_count_kv": fields.get("llama.attention.head_count"),
        "llama.rope.freq_base": 10_000.0,
        "llama.vocab_size": len(rows) if isinstance(rows, list) else None,
    } | fields
    hf = {FIELDS[ours][0]: given.get(f"llama.{key}") for key, ours in KEYS.items()}
    ids = {name: fields.get(f"{KEY}{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")}
    ends = dict.fromkeys(i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None)
    hf |= {"model_type": "llama", "tie_word_embeddings": HEAD not in held.tensors, "pad_token_id": ids["padding"],
           "bos_token_id": ids["bos"], "eos_token_id": list(ends)}  # fmt: skip
    try:
        config = model_config(hf)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('config.json: ')}") from None
    for key in HEAD_DIMS:
        came = fields.get(f"llama.{key}", config.head_dim)
        require(came == config.head_dim, f"{path}: llama.{key} is {came!r}, expected {config.head_dim}")
    return config
