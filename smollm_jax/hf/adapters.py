"""Write and read low-rank adapters as PEFT's folders, and tell a base by its weights.

PEFT keeps a matrix as (outputs, inputs) and each layer apart, as Hugging Face does. A conversion moves bits.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smollm_jax.config.adapters import AdapterConfig, adapter_shapes, apply_adapters
from smollm_jax.config.architecture import ADAPTED, ModelConfig
from smollm_jax.hf.mapping import TABLE, Params
from smollm_jax.hf.reader import opened, read_tensor
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.files import named_failure, read_json
from smollm_jax.runtime.trees import flatten, unflatten

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, BASE_HASH, BASE_STEP = "base_model.model.", "base_sha256", "base_step"  # the last two are ours
SUFFIX = {"A": ".lora_A.weight", "B": ".lora_B.weight", "m": ".lora_magnitude_vector"}
# settings of PEFT that would change the result, and the values at which they do not
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "fan_in_fan_out": (False,), "modules_to_save": (None, []), "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}), "trainable_token_indices": (None,), "alora_invocation_tokens": (None,),
    "layer_replication": (None,), "lora_bias": (False,), "target_parameters": (None, []), "use_qalora": (False,),
    "use_bdlora": (None, False), "arrow_config": (None,), "kasa_config": (None,), "velora_config": (None,),
    "monteclora_config": (None,),
    # others, such as pissa and loftq, change the base
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"), "revision": (None, "", "main"),
}  # fmt: skip
# settings that are read here, or that change no result of finished adapters
KNOWN = set(
    """
    peft_type task_type r lora_alpha target_modules base_model_name_or_path use_rslora use_dora inference_mode
    lora_dropout auto_mapping peft_version exclude_modules layers_to_transform layers_pattern megatron_config
    megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size ensure_weight_tying
    runtime_config
""".split()
)


class AdapterFolder(NamedTuple):
    """A PEFT folder: the place of its base, hash and step of its base if on record, and its settings."""

    base: str
    base_hash: str | None
    base_step: int | None
    settings: dict[str, Any]
    folder: Path


def weights_sha256(params: Params) -> str:
    """Return the SHA-256 of f32 weights in the order of their names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten(params, "/").items()):
        digest.update(f"{name} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).data)
    return digest.hexdigest()


def adapted_sha256(base: str, adapters: Params, scale: float) -> str:
    """Return the SHA-256 of weights with adapters, by the hash of the base.

    Merged weights have no hash that holds everywhere: the last bits of a product depend on the machine.
    """
    return hashlib.sha256(f"{base} {weights_sha256(adapters)} {scale!r}".encode()).hexdigest()


def merge(base: Params, adapters: Params, scale: float) -> Params:
    """Return the base's f32 weights with the adapters in them. All are numpy arrays."""
    return unflatten(apply_adapters(flatten(base, "/"), flatten(adapters, "/"), scale), "/")


def is_adapter_folder(path: Path) -> bool:
    return (path / SETTINGS).is_file()


def peft_tensors(config: AdapterConfig, model: ModelConfig) -> Iterator[tuple[str, str, int, int]]:
    """Yield for each tensor its name, our path and layer, and how many leading dims of ours are one of PEFT's."""
    for path in adapter_shapes(config, model):
        matrix, part = path.rsplit("_", 1)
        module = TABLE[matrix][0].removesuffix(".weight")
        inputs = {"A": ADAPTED[matrix], "B": 1, "m": 0}[part]
        for layer in range(model.num_layers):
            yield f"{PREFIX}{module.format(layer)}{SUFFIX[part]}", path, layer, inputs


def write_adapters(
    folder: Path, adapters: Params, config: AdapterConfig, model: ModelConfig, *, base: dict[str, Any]
) -> None:
    """Write the two files of PEFT into `folder`. `base` has the path and SHA-256 of the frozen weights."""
    from safetensors.numpy import save_file

    named, values = flatten(adapters, "/"), {}
    for name, path, layer, inputs in peft_tensors(config, model):
        leaf = np.asarray(named[path][layer])
        if inputs:
            leaf = leaf.reshape(math.prod(leaf.shape[:inputs]), -1).T
        values[name] = np.ascontiguousarray(leaf.reshape(-1) if inputs == 0 else leaf)
    step = {} if base.get("step") is None else {BASE_STEP: str(base["step"])}
    metadata = {"format": "pt", BASE_HASH: base["sha256"], **step}
    with named_failure(folder / WEIGHTS):
        save_file(values, folder / WEIGHTS, metadata=metadata)
    modules = [TABLE[path][0].removesuffix(".weight").split(".")[-1] for path in config.targets]
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base["path"],
        "r": config.lora_rank, "lora_alpha": config.alpha, "lora_dropout": 0.0, "target_modules": modules,
        "bias": "none", "use_rslora": False, "use_dora": config.dora, "inference_mode": True,
        "fan_in_fan_out": False, "modules_to_save": None,
    }  # fmt: skip
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / WEIGHTS).chmod((folder / SETTINGS).stat().st_mode)  # safetensors makes it for the owner alone


def open_adapters(folder: Path) -> AdapterFolder:
    """Return what the settings of a PEFT folder say. Raises `UserError` for adapters that are not LoRA or DoRA."""
    settings, where = read_json(folder / SETTINGS), folder / SETTINGS
    require(isinstance(settings, dict), f"{where} must hold an object")
    kind = settings.get("peft_type")
    require(kind == "LORA", f"{where} says peft_type={kind!r}; LORA can be read")
    for name, neutral in NEUTRAL.items():
        value = settings.get(name, neutral[0])
        require(value in neutral, f"{where} says {name}={value!r}; only {neutral[0]!r} can be read")
    others = [name for name, value in settings.items() if value and name not in {*KNOWN, *NEUTRAL}]
    require(not others, f"{where} says {', '.join(others[:3])}, which this version does not know")
    for name, kinds in (("r", int), ("lora_alpha", (int, float)), ("base_model_name_or_path", str)):
        value = settings.get(name)
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        fits = fits and (bool(value) if kinds is str else 0 < value < math.inf)
        expected = "a name" if kinds is str else "a number above 0"
        require(fits, f"{where} says {name}={value!r}; expected {expected}")
    require((folder / WEIGHTS).is_file(), f"{folder} has no {WEIGHTS}; only safetensors are read")
    with opened(folder / WEIGHTS) as file:
        recorded = file.metadata() or {}
    step = recorded.get(BASE_STEP, "")
    known = int(step) if step.isdecimal() and len(step) < 19 else None
    return AdapterFolder(settings["base_model_name_or_path"], recorded.get(BASE_HASH), known, settings, folder)


def read_adapters(found: AdapterFolder, model: ModelConfig) -> tuple[Params, float]:
    """Return the adapters of a PEFT folder as stacked f32 arrays, and their scale.

    Raises `UserError` naming a tensor that is missing, unknown or of another shape than `model` asks for.
    """
    settings, file = found.settings, found.folder / WEIGHTS
    with opened(file) as content:
        names = set(content.keys())
    targets = [
        path.split("/")[-1]
        for path in ADAPTED
        if any(f".{TABLE[path][0].removesuffix('.weight').split('.')[-1]}.lora_" in name for name in names)
    ]
    require(bool(targets), f"{file} holds no adapter of this architecture")
    alpha, dora = float(settings["lora_alpha"]), bool(settings.get("use_dora"))
    config = AdapterConfig(lora_rank=settings["r"], lora_alpha=alpha, lora_targets=",".join(targets), dora=dora)
    shapes, read = adapter_shapes(config, model), dict[str, np.ndarray]()
    for name, path, layer, inputs in peft_tensors(config, model):
        require(name in names, f"{file} lacks tensor {name}")
        names.remove(name)
        value, shape = read_tensor(file, name), shapes[path][1:]
        outer = (math.prod(shape[inputs:]), *([math.prod(shape[:inputs])] if inputs else []))
        fits = f"tensor {name}: expected shape {outer} from the base, got {value.shape}"
        require(value.shape == outer, f"{fits}; the adapters are for another base")
        place = read.setdefault(path, np.empty(shapes[path], np.float32))[layer]
        place[...] = (value.T if inputs else value).reshape(place.shape)
    require(not names, f"{file} holds tensor {min(names, default='')}, which the base does not have")
    rank = settings["r"] ** (0.5 if settings.get("use_rslora") else 1.0)
    return unflatten(read, "/"), alpha / rank
