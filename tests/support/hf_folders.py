"""Parameters and Hugging Face folders for tests, and ways to damage a folder."""

import json
from dataclasses import replace

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.model.transformer import init_params

TINY = ModelConfig(
    vocab_size=300,
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=40,
    rope_theta=12_345.0,
    max_seq_len=96,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)
UNTIED = replace(TINY, tie_embeddings=False)


def numpy_params(config, seed=0):
    """Parameters every element of which differs, norms too: a swapped pair shows."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(lambda: init_params(config, 0))
    return jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), like)


def bits(tree):
    return [np.asarray(leaf).view(np.uint32) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(bits(one), bits(other), strict=True):
        np.testing.assert_array_equal(a, b)


def change_config(folder, **changes):
    file = folder / "config.json"
    content = {k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not Ellipsis}
    file.write_text(json.dumps(content))


def change_tensors(folder, change):
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors")


def as_shards(folder, parts=3):
    """The same folder with its weights in several files."""
    values = load_file(folder / "model.safetensors")
    names, index = sorted(values), {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file({name: values[name] for name in names[i::parts]}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names[i::parts], file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
