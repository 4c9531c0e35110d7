"""Our parameters to a Hugging Face folder and back: one table of names and layouts, used in both directions.

The only door to Hugging Face models. numpy and safetensors do the work; torch and transformers are asked
for by the check alone. Only safetensors files are read: no pickle is ever loaded, no remote code trusted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.card import model_card
from smollm_jax.config import ModelConfig, require

Params = dict[str, Any]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MARK = "exported by smollm-jax"  # in the safetensors header: only our own folders are written over
SHARD_BYTES = 5 * 10**9
FILES = ("config.json", "generation_config.json", "*.safetensors", INDEX, "tokenizer*", "*.jinja",
         "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")  # fmt: skip
CHECKED_TOKENS = 48
LARGEST_LOGIT_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Entry:
    """One parameter: our path, HF's name ("{}" is the layer), and HF's shape as ours flattened and turned."""

    ours: tuple[str, ...]
    theirs: str
    inputs: int = 0
    """Leading dims of ours (the layer's not counted) that are HF's second, input, dim; 0: the same layout."""


TABLE = (
    Entry(("embedding",), "model.embed_tokens.weight"),
    Entry(("blocks", "attention_norm", "scale"), "model.layers.{}.input_layernorm.weight"),
    Entry(("blocks", "attention", "q"), "model.layers.{}.self_attn.q_proj.weight", 1),
    Entry(("blocks", "attention", "k"), "model.layers.{}.self_attn.k_proj.weight", 1),
    Entry(("blocks", "attention", "v"), "model.layers.{}.self_attn.v_proj.weight", 1),
    Entry(("blocks", "attention", "o"), "model.layers.{}.self_attn.o_proj.weight", 2),
    Entry(("blocks", "mlp_norm", "scale"), "model.layers.{}.post_attention_layernorm.weight"),
    Entry(("blocks", "mlp", "gate"), "model.layers.{}.mlp.gate_proj.weight", 1),
    Entry(("blocks", "mlp", "up"), "model.layers.{}.mlp.up_proj.weight", 1),
    Entry(("blocks", "mlp", "down"), "model.layers.{}.mlp.down_proj.weight", 1),
    Entry(("final_norm", "scale"), "model.norm.weight"),
    Entry(("head",), "lm_head.weight"),
)


def shapes_of(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of each of our parameters, the layer dim left out."""
    D, F, N, K, H = (
        config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim,
    )  # fmt: skip
    shapes = {
        "embedding": (config.vocab_size, D), "blocks/attention_norm/scale": (D,), "blocks/mlp_norm/scale": (D,),
        "blocks/attention/q": (D, N, H), "blocks/attention/k": (D, K, H), "blocks/attention/v": (D, K, H),
        "blocks/attention/o": (N, H, D), "blocks/mlp/gate": (D, F), "blocks/mlp/up": (D, F),
        "blocks/mlp/down": (F, D), "final_norm/scale": (D,),
    }  # fmt: skip
    if not config.tie_embeddings:
        shapes["head"] = (config.vocab_size, D)
    return {tuple(name.split("/")): shape for name, shape in shapes.items()}


def tensors(config: ModelConfig) -> list[tuple[str, Entry, int | None, tuple[int, ...]]]:
    """HF name, table entry, layer and HF shape of every tensor that a folder of this config holds."""
    shapes, out = shapes_of(config), []
    for entry in TABLE:
        if entry.ours not in shapes:
            continue
        shape = shapes[entry.ours]
        if entry.inputs:
            shape = (int(np.prod(shape[entry.inputs :])), int(np.prod(shape[: entry.inputs])))
        stacked = entry.ours[0] == "blocks"
        for layer in range(config.num_layers) if stacked else (None,):
            out.append((entry.theirs.format(layer), entry, layer, shape))
    return out


def to_hf(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """HF's tensors by name, views where the layout allows."""
    out = {}
    for name, entry, layer, shape in tensors(config):
        value = np.asarray(_leaf(params, entry.ours))
        value = value if layer is None else value[layer]
        out[name] = value.reshape(shape[::-1]).T if entry.inputs else value
    return out


def from_hf(read: Callable[[str], np.ndarray], config: ModelConfig) -> Params:
    """Our f32 parameters from `read(name)`; raises `ValueError` naming a tensor of another shape."""
    shapes, params = shapes_of(config), {}
    for name, entry, layer, shape in tensors(config):
        value = read(name)
        require(value.shape == shape, f"tensor {name}: expected shape {shape} from config.json, got {value.shape}")
        ours = shapes[entry.ours]
        value = (value.T if entry.inputs else value).reshape(ours)
        branch = params
        for part in entry.ours[:-1]:
            branch = branch.setdefault(part, {})
        if layer is None:
            branch[entry.ours[-1]] = value.astype(np.float32)
        else:
            stacked = branch.setdefault(entry.ours[-1], np.empty((config.num_layers, *ours), np.float32))
            stacked[layer] = value
    return params


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


def model_config(hf: dict[str, Any]) -> ModelConfig:
    """The architecture that a config.json describes; raises `ValueError` naming a field that we do not do."""
    require(isinstance(hf, dict), "config.json must be an object")
    require(hf.get("model_type") == "llama", f"model_type is {hf.get('model_type')!r}; only llama can be read")
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or {}
    kinds = {"rope_parameters": rope.get("rope_type", "default"),
             "rope_scaling": scaling.get("rope_type", scaling.get("type", "default"))}  # fmt: skip
    for field_name, kind in kinds.items():
        require(kind == "default", f"{field_name} asks for {kind!r}; only plain RoPE can be read")
    fixed = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "rope_interleaved": False}
    for field_name, value in fixed.items():
        came = hf.get(field_name, value)
        require(came == value, f"{field_name} is {came!r}; only {value!r} can be read")
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    require(theta is not None, "config.json has neither rope_theta nor rope_parameters.rope_theta")
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for field_name in (*needed, "rms_norm_eps", "max_position_embeddings"):
        require(isinstance(hf.get(field_name), int | float), f"config.json: {field_name} must be a number")
    heads = hf["num_attention_heads"]
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        intermediate_size=hf["intermediate_size"],
        rms_norm_eps=hf["rms_norm_eps"],
        rope_theta=float(theta),
        max_seq_len=hf["max_position_embeddings"],
        initializer_range=hf.get("initializer_range", 0.02),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        bos_token_id=_first(hf.get("bos_token_id")),
        eos_token_id=_first(hf.get("eos_token_id")),
    )


def read_folder(path: str | Path) -> tuple[ModelConfig, Params]:
    """Architecture and f32 parameters of a Hugging Face folder or Hub id.

    Raises `ValueError` naming the field or tensor that is missing, damaged or of another kind.
    """
    folder = local_folder(path)
    try:
        config = model_config(json.loads((folder / "config.json").read_text()))
    except FileNotFoundError:
        raise ValueError(f"{path} holds no config.json; expected a Hugging Face folder or Hub id") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from None
    where = _tensor_files(folder)
    names = [name for name, *_ in tensors(config)]
    missing = [name for name in names if name not in where]
    require(not missing, f"{folder} lacks tensor {(missing or [''])[0]} ({len(missing)} missing)")
    extra = sorted(set(where) - set(names) - {"lm_head.weight"} - {n for n in where if n.endswith("inv_freq")})
    require(not extra, f"{folder} holds tensor {(extra or [''])[0]}, which this architecture does not have")
    params = from_hf(lambda name: _read_tensor(where[name], name), config)
    if config.tie_embeddings and "lm_head.weight" in where:
        head = _read_tensor(where["lm_head.weight"], "lm_head.weight").astype(np.float32)
        require(
            np.array_equal(head, params["embedding"]),
            f"{folder}: lm_head.weight differs from the embedding though tie_word_embeddings is true",
        )
    return config, params


def local_folder(path: str | Path) -> Path:
    """`path` itself if it is a folder, otherwise the snapshot of that Hub id; raises `ValueError`."""
    if Path(path).is_dir():
        return Path(path)
    require(str(path).count("/") == 1 and not str(path).startswith((".", "/", "~")), f"there is no folder {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(FILES)))
    except Exception as error:  # the kinds differ with every release of three libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise ValueError(f"{path} is no folder here and cannot be fetched from the Hub ({reason})") from None


def write_folder(
    params: Params, config: ModelConfig, out: Path, *, dtype: str, tokenizer_folder: str | Path | None
) -> None:
    """Write config, weights and tokenizer files into the new folder `out`."""
    import ml_dtypes
    from safetensors.numpy import save_file

    out.mkdir(parents=True)
    target = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    for name, value in to_hf(params, config).items():
        cast = np.ascontiguousarray(value.astype(target))
        if size + cast.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = cast
        size, total = size + cast.nbytes, total + cast.nbytes
    header = {"format": "pt", "note": MARK}
    index = {}
    for i, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, out / file, metadata=header)
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(out / "config.json", hf_config(config, dtype))
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_json(out / "generation_config.json", {"_from_model_config": True, **ids})
    for file in Path(tokenizer_folder).iterdir() if tokenizer_folder else ():
        if file.is_file() and not file.name.startswith("."):
            shutil.copyfile(file, out / file.name)


def export(
    params: Params,
    config: ModelConfig,
    out: str | Path,
    *,
    dtype: str = "float32",
    tokenizer_folder: str | Path | None = None,
    card_facts: dict[str, Any] | None = None,
    verify: bool = True,
) -> str:
    """Write a Hugging Face folder, check it, and only then put it in place; returns how it was checked.

    Raises `ValueError` when `out` holds something else, `RuntimeError` when the check fails.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        ours = (out / WEIGHTS).exists() and MARK in (_header(out / WEIGHTS) or {}).values()
        require(ours or (out / INDEX).exists(), f"{out} is not empty and no export of ours; give another --out")
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        write_folder(params, config, part, dtype=dtype, tokenizer_folder=tokenizer_folder)
        checked = check(part, params, config, dtype) if verify else "not checked (--no-verify)"
        facts = dict(card_facts or {})
        curve = facts.pop("curve", None)
        if curve is not None:
            shutil.copyfile(curve, part / "loss.png")
        (part / "README.md").write_text(model_card(config, facts, dtype=dtype, checked=checked, curve=bool(curve)))
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return checked


def check(folder: Path, params: Params, config: ModelConfig, dtype: str) -> str:
    """Compare what was written with `params`; returns what was compared, raises `RuntimeError` on a difference."""
    import ml_dtypes

    read_config, read = read_folder(folder)
    for entry in (e for e in TABLE if e.ours in shapes_of(config)):
        ours = np.asarray(_leaf(params, entry.ours))
        if dtype == "bfloat16":
            ours = ours.astype(ml_dtypes.bfloat16).astype(np.float32)
        if not np.array_equal(ours, _leaf(read, entry.ours)):
            raise RuntimeError(f"{folder}: {'/'.join(entry.ours)} reads back otherwise than it was written")
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return "read back through our own import, bit for bit; torch is not installed, so no logits were compared"
    from smollm_jax.model import SmolLM

    theirs, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {kind: names for kind, names in report.items() if names}
    if problems:
        raise RuntimeError(f"{folder}: transformers reports {problems}")
    length = min(CHECKED_TOKENS, config.max_seq_len)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    difference = float(np.abs(np.asarray(SmolLM.from_params(read_config, read)(tokens)) - expected).max())
    if not difference <= LARGEST_LOGIT_DIFFERENCE:
        raise RuntimeError(f"{folder}: logits from PyTorch and JAX differ by {difference:.2e}")
    return f"logits from PyTorch and JAX agree to {difference:.1e} on {length} tokens; bits read back equal"


def load_hf(path: str | Path) -> Any:
    """The `SmolLM` of a Hugging Face folder or Hub id, in f32; raises `ValueError` naming what does not fit."""
    import jax
    import jax.numpy as jnp

    from smollm_jax.model import SmolLM

    config, params = read_folder(path)
    return SmolLM.from_params(config, jax.tree.map(jnp.asarray, params))


def save_hf(model: Any, path: str | Path, tokenizer: Any = None) -> None:
    """Write `model` as a Hugging Face folder, in f32; `tokenizer` is a folder, or anything with a save method."""
    import jax

    from smollm_jax.model import params_of

    params = jax.tree.map(np.asarray, params_of(model))
    folder = tokenizer if isinstance(tokenizer, str | Path) else None
    export(params, model.config, path, tokenizer_folder=folder)
    if tokenizer is not None and folder is None:
        getattr(tokenizer, "save_pretrained", getattr(tokenizer, "save", None))(str(path))


def _leaf(params: Params, path: tuple[str, ...]) -> Any:
    for part in path:
        params = params[part]
    return params


def _first(value: Any) -> int:
    if isinstance(value, list):
        value = value[0]
    return 0 if value is None else int(value)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _header(file: Path) -> dict[str, str] | None:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        return opened.metadata()


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The safetensors file of each tensor."""
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).exists():
        files = sorted(
            {folder / Path(f).name for f in json.loads((folder / INDEX).read_text())["weight_map"].values()}
        )
    else:
        files = [folder / WEIGHTS]
    pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    require(
        files[0].exists() or not pickles,
        f"{folder} holds {(pickles or [''])[0]}, a pickle, which can run code; only safetensors are read",
    )
    where = {}
    for file in files:
        require(file.exists(), f"{folder} lacks {file.name}")
        try:
            with safe_open(file, framework="numpy") as opened:
                where |= dict.fromkeys(opened.keys(), file)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read, it may be cut short: {error}") from None
    return where


def _read_tensor(file: Path, name: str) -> np.ndarray:
    import ml_dtypes  # noqa: F401 - lets numpy hold bf16
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        value = opened.get_tensor(name)
    require(
        value.dtype.kind in "fV" or "float" in value.dtype.name, f"tensor {name} holds {value.dtype}, not floats"
    )
    return value
