"""Read config.json and safetensors of a Hugging Face folder or Hub id, nothing else.

No pickle is loaded and no remote code run: a folder with only those is refused. Whatever is missing, damaged or
unsupported raises `UserError` naming the field, tensor or file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.config.settings import RUNS
from smollm_jax.hf.config_json import LARGEST_SIZE, model_config, token_ids
from smollm_jax.hf.gguf_file import SUFFIX
from smollm_jax.hf.mapping import Params, from_hf, tensors
from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.runtime.files import expand_home, read_json
from smollm_jax.runtime.retry import download_snapshot

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# files to download from the Hub: no pickles and no code
WANTED = ("config.json", "generation_config.json", "adapter_config.json", "*.safetensors", INDEX, "tokenizer*",
          "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")  # fmt: skip
DOWNLOAD_SECONDS = 600.0  # weights of gigabytes may break off several times on the way
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
READABLE = ("float32", "bfloat16", "float16")  # f32 holds each of these without rounding


def read_folder(path: str | Path) -> tuple[ModelConfig, Params]:
    """Return a folder's or Hub id's architecture and f32 numpy parameters. Raises `UserError`."""
    folder = local_folder(path)
    config = read_config(folder)
    where = tensor_files(folder)
    stored = {tensor.name: tensor.name for tensor in tensors(config)}
    if EMBEDDING.removeprefix("model.") in where:  # saved from a LlamaModel, which has no head
        stored = {name: name.removeprefix("model.") for name in stored}
    elif config.tie_embeddings and EMBEDDING not in where and HEAD in where:
        stored[EMBEDDING] = HEAD  # transformers takes either name
    if missing := [name for name in stored.values() if name not in where]:
        raise UserError(f"{folder} lacks tensor {missing[0]} ({len(missing)} missing)")
    # old exports hold RoPE's frequencies, which follow from theta
    more = sorted(set(where) - {*stored.values(), HEAD})
    if extra := [name for name in more if not name.endswith("rotary_emb.inv_freq")]:
        lacks = f"which a Llama of this config.json does not have ({len(extra)} such)"
        raise UserError(f"{folder} holds tensor {extra[0]}, {lacks}")
    params = from_hf(lambda name: read_tensor(where[stored[name]], stored[name]), config)
    if config.tie_embeddings and HEAD in where:
        head = read_tensor(where[HEAD], HEAD).astype(np.float32)
        differs = f"{folder}: lm_head.weight differs from the embedding though tie_word_embeddings is true"
        require(np.array_equal(head, params["embedding"]), differs)
    return config, params


def read_config(folder: Path) -> ModelConfig:
    """Return the architecture, which ends a text as config.json and generation_config.json together say."""
    is_one = (folder / "config.json").is_file()
    require(is_one, f"{folder} holds no config.json; expected a Hugging Face folder or Hub id")
    config = model_config(read_json(folder / "config.json"))
    if not (folder / "generation_config.json").is_file():
        return config
    generation = read_json(folder / "generation_config.json")
    require(isinstance(generation, dict), f"{folder}/generation_config.json must hold an object")
    ids = token_ids(generation, "eos_token_id", LARGEST_SIZE)
    # no text has an id beyond the vocabulary
    return config.ending_at([*config.stop_ids, *(i for i in ids if i < config.vocab_size)])


def local_folder(path: str | Path) -> Path:
    """Return `path` if it is a folder, else that Hub id's snapshot. Raises `UserError`."""
    folder = check_place(path)
    if folder.is_dir():
        return folder
    try:
        return download_snapshot(str(path), WANTED, patience=DOWNLOAD_SECONDS)
    except Exception as error:  # its kind differs between releases of three libraries
        reason = f"cannot be fetched from the Hub ({one_line(error)})"
        raise UserError(f"{path} is no folder here and {reason}") from None


def is_gguf(path: str | Path) -> bool:
    """Return whether `path` is a file whose name ends in .gguf."""
    path = expand_home(path)
    return path.suffix == SUFFIX and path.is_file()


def check_place(path: str | Path) -> Path:
    """Return `path` with ~ expanded. Raises `UserError` if it is no folder or .gguf file and no id."""
    folder = expand_home(path)
    if folder.is_dir() or is_gguf(path):
        return folder
    is_id = str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))
    # the Hub is not asked for a run. A folder named as an owner on the Hub may hold other models of that owner
    runs = sorted(file.parent.name for file in folder.parent.glob("*/checkpoints"))
    if is_id and (runs or str(folder.parent) == RUNS):
        held = f"{folder.parent} holds {', '.join(runs[:5]) or 'no run'}{' and more' if runs[5:] else ''}"
        raise UserError(f"there is no folder {path}; {held}")
    require(is_id, f"there is no folder {path}; a Hub id reads OWNER/NAME, such as HuggingFaceTB/SmolLM2-135M")
    return folder


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors file of each tensor in `folder`. Raises `UserError`.

    The single file goes before an index, as in transformers: the index beside it is an older model's.
    """
    sharded = (folder / INDEX).exists() and not (folder / WEIGHTS).exists()
    index = _weight_map(folder / INDEX) if sharded else {}
    where: dict[str, Path] = {}
    for file in sorted({folder / name for name in index.values()} or {folder / WEIGHTS}):
        if not file.is_file():
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
            instead = f" but {pickles[0]}, a pickle, which can run code" if pickles else ""
            raise UserError(f"{folder} has no {file.name}{instead}; only safetensors are read")
        with opened(file) as tensors_of:
            names = list(tensors_of.keys())
        for name in names:
            require(name not in where, f"{folder}: tensor {name} stands in more than one file")
            where[name] = file
    for name, listed in index.items():
        is_there = where.get(name) == folder / listed
        require(is_there, f"{folder / INDEX} says {listed} holds {name}, but it does not")
    return where


def _weight_map(file: Path) -> dict[str, str]:
    """Return the file name of each tensor in an index. Raises `UserError` if a name leaves the folder."""
    content = read_json(file)
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not index:
        raise UserError(f"{file} holds no weight_map")
    for name, listed in index.items():
        plain = isinstance(listed, str) and Path(listed).name == listed and listed.endswith(".safetensors")
        plain = plain and len(listed.encode("utf-8", "replace")) <= 255 and "\0" not in listed  # a file name
        require(plain, f"{file}: {name} is said to be in {str(listed)[:99]!r}, no safetensors file of this folder")
    return index


@contextmanager
def opened(file: Path, part: str = "") -> Iterator[Any]:
    """Open a safetensors file. Raises `UserError` if the file, or the part read from it, is damaged."""
    import ml_dtypes  # noqa: F401 - lets numpy hold bf16
    from safetensors import SafetensorError, safe_open

    try:
        file.open("rb").close()  # safetensors says of a file that may not be read that it is missing
        with safe_open(file, framework="numpy") as tensors_of:
            yield tensors_of
    except PermissionError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (SafetensorError, OSError, TypeError, AttributeError, MemoryError) as error:
        raise UserError(f"{file}{part} cannot be read, it may be cut short: {one_line(error)}") from None


def read_tensor(file: Path, name: str) -> np.ndarray:
    with opened(file, f", tensor {name},") as tensors_of:
        value = tensors_of.get_tensor(name)
    held = f"tensor {name} holds {value.dtype.name}"
    require(value.dtype.name in READABLE, f"{held}; {', '.join(READABLE)} can be read")
    return value
