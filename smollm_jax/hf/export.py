"""Our parameters to a Hugging Face folder, checked before it is put in place, and back.

The only door to Hugging Face models: names and layouts are in layout.py, reading in hf_folder.py. numpy and
safetensors do the work. Where torch is installed, every folder written is loaded by transformers and its
logits on real text are compared with ours; a folder that disagrees is not left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.hf.config_json import hf_config
from smollm_jax.hf.mapping import Params, Tensor, leaf, shapes_of, tensors, to_hf
from smollm_jax.hf.model_card import model_card
from smollm_jax.hf.reader import INDEX, WANTED, WEIGHTS, metadata_of, read_folder, tensor_files
from smollm_jax.runtime.errors import require
from smollm_jax.tokenizer.tokenizer import FILES as TOKENIZER_FILES
from smollm_jax.tokenizer.tokenizer import Tokenizer

MARK = "exported by smollm-jax"  # in the safetensors header: only our own folders are written over
CARD, CURVE = "README.md", "loss.png"
SHARD_BYTES = 5 * 10**9
CHECKED_TOKENS = 64
# of the largest logit: f32 sums in another order differ by 1e-6 to 1e-5, a wrong layout by about 1
LARGEST_DIFFERENCE = 1e-3
# real text: random ids meet neither the frequent tokens nor what attention makes of a sentence
TEXT = """The water cycle moves water between the sea, the air and the land. When the sun warms the surface of
the ocean, water evaporates and rises as vapour; high up it cools, condenses into clouds, and falls again as
rain or snow. In 1580 Bernard Palissy wrote that rivers are fed by rain alone, which few people then believed."""


def write_folder(
    params: Params, config: ModelConfig, out: Path, *, dtype: str, tokenizer_folder: str | Path | None
) -> None:
    """Write config, weights and tokenizer files into the new folder `out`; `params` are numpy arrays."""
    import ml_dtypes
    from safetensors.numpy import save_file

    targets = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
    require(dtype in targets, f"dtype {dtype!r}: expected float32 or bfloat16")
    target = targets[dtype]
    out.mkdir(parents=True)
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors(config):
        nbytes = int(np.prod(tensor.shape)) * target.itemsize
        if size + nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    index: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        values = {t.name: np.ascontiguousarray(to_hf(params, t).astype(target)) for t in shard}
        save_file(values, out / file, metadata={"format": "pt", "note": MARK})
        index |= dict.fromkeys(values, file)
    if len(shards) > 1:
        total = sum(int(np.prod(t.shape)) for t in tensors(config)) * target.itemsize
        _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(out / "config.json", hf_config(config, dtype))
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _write_json(out / "generation_config.json", {"_from_model_config": True, **ids})
    if tokenizer_folder is not None:
        _copy_tokenizer(Path(tokenizer_folder), out, config)


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

    Raises `ValueError` when `out` holds something else, `RuntimeError` when the check fails: an older export
    stays as it is then.
    """
    out = Path(os.path.abspath(out))  # "." has no name of its own
    _refuse_foreign(out)
    params = _numpy(params)
    part, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    try:
        write_folder(params, config, part, dtype=dtype, tokenizer_folder=tokenizer_folder)
        checked = check(part, params, config, dtype) if verify else "not checked (--no-verify)"
        facts = dict(card_facts or {})
        curve = facts.pop("curve", None)
        if curve is not None:
            shutil.copyfile(curve, part / CURVE)
        card = model_card(config, facts, dtype=dtype, checked=checked, curve=curve is not None)
        (part / CARD).write_text(card, encoding="utf-8")
        if out.exists():
            out.rename(old)
        part.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return checked


def check(folder: Path, params: Params, config: ModelConfig, dtype: str) -> str:
    """Compare what was written with `params`; returns what was compared, raises `RuntimeError` on a difference."""
    import ml_dtypes

    try:
        read_config, read = read_folder(folder)
    except ValueError as error:
        raise RuntimeError(f"the export cannot be read back: {error}") from None
    if read_config != config:
        raise RuntimeError(f"config.json reads back as {read_config}, not {config}")
    for path in shapes_of(config):
        ours = leaf(params, path)
        if dtype == "bfloat16":
            ours = ours.astype(ml_dtypes.bfloat16).astype(np.float32)
        # as integers: NaN equals itself, and 0 is not -0
        if not np.array_equal(ours.view(np.uint32), leaf(read, path).view(np.uint32)):
            raise RuntimeError(f"{'/'.join(path)} reads back otherwise than it was written")
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return "read back through our own import, bit for bit; torch is not installed, so no logits were compared"
    tokens, kind = _tokens_to_check(folder, config)
    difference = _logit_difference(folder, read_config, read, tokens)
    if not difference <= LARGEST_DIFFERENCE:  # also when it is NaN
        raise RuntimeError(
            f"logits from PyTorch and JAX differ by {difference:.1e} of the largest on {kind}; at most "
            f"{LARGEST_DIFFERENCE:.0e} is rounding"
        )
    return (
        f"logits from PyTorch and JAX agree to {difference:.1e} of the largest on {tokens.size} tokens of "
        f"{kind}; bits read back equal"
    )


def load_hf(path: str | Path) -> Any:
    """The `SmolLM` of a Hugging Face folder or Hub id, in f32; raises `ValueError` naming what does not fit."""
    import jax
    import jax.numpy as jnp

    from smollm_jax.model.transformer import SmolLM

    config, params = read_folder(path)
    return SmolLM.from_params(config, jax.tree.map(jnp.asarray, params))


def save_hf(model: Any, path: str | Path, tokenizer: Any = None) -> None:
    """Write `model` as a Hugging Face folder, in f32; `tokenizer` is a folder, ours, or one of transformers'."""
    from smollm_jax.model.transformer import params_of

    if tokenizer is None or isinstance(tokenizer, str | Path):
        export(params_of(model), model.config, path, tokenizer_folder=tokenizer)
        return
    with tempfile.TemporaryDirectory(prefix="smollm-jax-") as folder:
        (tokenizer.save if isinstance(tokenizer, Tokenizer) else tokenizer.save_pretrained)(folder)
        export(params_of(model), model.config, path, tokenizer_folder=folder)


def _refuse_foreign(out: Path) -> None:
    """Raise `ValueError` unless `out` is free, empty, or an export of ours with nothing added to it."""
    require(not out.exists() or out.is_dir(), f"{out} is a file; give another --out")
    held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if not held:
        return
    try:
        files = set(tensor_files(out).values())
    except ValueError:
        files = set()
    ours = bool(files) and all(metadata_of(file).get("note") == MARK for file in files)
    require(ours, f"{out} is not empty and no export of ours; give another --out")
    known = [re.escape(name).replace(r"\*", ".*") for name in (*WANTED, CARD, CURVE)]
    added = [name for name in held if not any(re.fullmatch(pattern, name) for pattern in known)]
    require(not added, f"{out} holds {(added or [''])[0]}, which no export wrote; give another --out")


def _copy_tokenizer(folder: Path, out: Path, config: ModelConfig) -> None:
    """The tokenizer files alone: a whole Hugging Face folder may be given, whose config.json is another."""
    tokenizer = Tokenizer(folder)
    require(
        tokenizer.vocab_size <= config.vocab_size,
        f"the tokenizer in {folder} has {tokenizer.vocab_size} entries, the model only {config.vocab_size}",
    )
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def _tokens_to_check(folder: Path, config: ModelConfig) -> tuple[np.ndarray, str]:
    """Ids (1, T) to compare logits on: `TEXT` where there is a tokenizer, and what they are."""
    length = min(CHECKED_TOKENS, config.max_seq_len)
    if (folder / "tokenizer.json").exists():
        return Tokenizer(folder).encode(TEXT)[None, :length], "English text"
    return np.random.default_rng(0).integers(0, config.vocab_size, (1, length)), "random ids (no tokenizer)"


def _logit_difference(folder: Path, config: ModelConfig, params: Params, tokens: np.ndarray) -> float:
    """Largest difference of logits between transformers and us, as a share of the largest logit."""
    import jax
    import torch
    from transformers import AutoModelForCausalLM

    from smollm_jax.model.transformer import SmolLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, use_safetensors=True
    )
    theirs, report = loaded
    problems = {kind: names for kind, names in report.items() if names}
    if problems:
        raise RuntimeError(f"transformers reports {problems}")
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    # accelerators round the operands of f32 products unless told otherwise
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(
            SmolLM.from_params(config, jax.tree.map(jax.numpy.asarray, params))(jax.numpy.asarray(tokens))
        )
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def _numpy(tree: Any) -> Any:
    return {name: _numpy(value) for name, value in tree.items()} if isinstance(tree, dict) else np.asarray(tree)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
