"""Write our parameters as a GGUF file for llama.cpp; needs the `gguf` package.

The vocabulary is numbers, because the benchmark exchanges token ids with llama.cpp. llama.cpp rotates neighbouring
dims of a head, Hugging Face rotates dim i with i + H/2, so query and key rows are permuted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.hf.mapping import Params, tensors, to_hf

Kind = Literal["f32", "f16", "q8_0"]
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


def write_gguf(params: Params, config: ModelConfig, path: Path, kind: Kind) -> None:
    """Write `params`, numpy arrays: matrices in `kind`, norms in f32."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    quantization = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}[kind]
    writer = GGUFWriter(str(path), "llama")
    _describe(writer, config)
    for tensor in tensors(config):
        values = np.ascontiguousarray(to_hf(params, tensor).astype(np.float32))
        if "q_proj" in tensor.name or "k_proj" in tensor.name:
            values = _neighbouring(values, config.head_dim)
        wanted = GGMLQuantizationType[quantization if values.ndim > 1 else "F32"]
        writer.add_tensor(_name(tensor.name), quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["< 0"])  # llama.cpp refuses a file without merges


def _name(hf: str) -> str:
    name = hf.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, layer, part = name.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.weight"
    return f"{NAMES[name]}.weight"


def _neighbouring(weights_OI: np.ndarray, head_dim: int) -> np.ndarray:
    halves = weights_OI.reshape(-1, 2, head_dim // 2, weights_OI.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights_OI.shape))
