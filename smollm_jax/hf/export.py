"""Export our parameters as a Hugging Face folder, checked before it gets its name.

The work is done with numpy and safetensors. If torch is installed, transformers loads every folder written. Its
logits on real text are compared with ours, and a folder that disagrees is removed.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.config.adapters import AdapterConfig
from smollm_jax.config.architecture import ModelConfig, parameter_shapes
from smollm_jax.hf.adapters import open_adapters, read_adapters, write_adapters
from smollm_jax.hf.card import About, model_card
from smollm_jax.hf.config_json import generation_config, hf_config
from smollm_jax.hf.mapping import Params, tensors, to_hf
from smollm_jax.hf.publish import CURVE, refuse_foreign, write_card
from smollm_jax.hf.reader import INDEX, read_config, read_folder
from smollm_jax.runtime.errors import UserError, one_line, require, say
from smollm_jax.runtime.files import expand_home, moved_aside, named_failure, read_json, written_aside
from smollm_jax.runtime.trees import flatten, unflatten
from smollm_jax.tokenizer.tokenizer import Tokenizer

MARK = "exported by smollm-jax"  # in the safetensors header
SHARD_BYTES = 5 * 10**9
CHECKED_TOKENS = 64
# of the largest logit: f32 sums in another order differ by 1e-6 to 1e-5, a wrong layout by about 1
LARGEST_DIFFERENCE = 1e-3
LARGEST_LOSS, ROUNDING = 0.1, 1e-5  # of what adapters change, and of the largest logit where they change nothing
NO_TORCH = "; torch is not installed, so no logits were compared"  # for the one who exports, not for the card
# real text: random ids reach neither the frequent tokens nor attention over a sentence
TEXT = """The water cycle moves water between the sea, the air and the land. When the sun warms the surface of
the ocean, water evaporates and rises as vapour; high up it cools, condenses into clouds, and falls again as
rain or snow. In 1580 Bernard Palissy wrote that rivers are fed by rain alone, which few people then believed."""


def write_folder(params: Params, config: ModelConfig, out: Path, *, dtype: str = "float32") -> None:
    """Write config and weights into the new folder `out`. `params` are numpy arrays."""
    import ml_dtypes  # noqa: F401 - lets numpy hold bf16
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    require(dtype in ("float32", "bfloat16"), f"dtype {dtype!r}: expected float32 or bfloat16")
    out.mkdir(parents=True)
    shapes = {name: leaf.shape for name, leaf in flatten(params, "/").items()}
    for name, shape in parameter_shapes(config).items():
        require(shapes.get(name) == shape, f"{name} is {shapes.get(name)} in the weights, {shape} in the config")
    held = {tensor.name: tensor for tensor in tensors(config)}
    split = split_state_dict_into_shards_factory(
        held,
        get_storage_size=lambda tensor: math.prod(tensor.shape) * np.dtype(dtype).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        values = {name: np.ascontiguousarray(to_hf(params, held[name]).astype(dtype)) for name in names}
        with named_failure(out / file):
            save_file(values, out / file, metadata={"format": "pt", "note": MARK})
        _sort_metadata(out / file)
    values = hf_config(config, dtype)
    contents: dict[str, Any] = {"config.json": values, "generation_config.json": generation_config(values)}
    if split.is_sharded:
        contents[INDEX] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    for file, content in contents.items():
        (out / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in split.filename_to_tensors:  # safetensors makes them for the owner alone
        (out / file).chmod((out / "config.json").stat().st_mode)


def export_folder(
    params: Params,
    config: ModelConfig,
    out: str | Path,
    *,
    dtype: str = "float32",
    tokenizer_folder: str | Path | None = None,
    about: About | None = None,
    curve: Path | Callable[[Path], bool] | None = None,
    verify: bool = True,
    aside: bool = False,
    compare: Callable[[Params, Path], str] | None = None,
) -> str:
    """Write a Hugging Face folder, check it, then move it to `out`. Returns a sentence on the check.

    `compare` checks the parameters of the written folder further, and returns what it found.
    `curve` is a picture, or draws one at a path and returns whether it did. An older unchanged export is replaced.
    If `out` holds anything else, it is renamed if `aside` is true. Otherwise raises `UserError`. Raises
    `RuntimeError` if the check fails: an older export stays.
    """
    out = Path(os.path.realpath(out))  # "." has no name of its own, and a link stays a link
    params = unflatten({name: np.asarray(leaf) for name, leaf in flatten(params, "/").items()}, "/")
    with written_aside(out) as part:
        _make_way(out, part, aside=aside)
        write_folder(params, config, part, dtype=dtype)
        if tokenizer_folder is not None:
            tokenizer = Tokenizer(tokenizer_folder)
            sizes = f"{tokenizer.vocab_size} entries, the model only {config.vocab_size}"
            require(tokenizer.vocab_size <= config.vocab_size, f"the tokenizer in {tokenizer_folder} has {sizes}")
            # its files alone: the folder may be another model's, with a config.json of its own
            tokenizer.save(part)
            _name_context(part / "tokenizer_config.json", tokenizer, config)
        checked = check(part, params, config, dtype) if verify else "not checked (--no-verify)"
        if verify and compare is not None:
            checked += f"; {compare(read_folder(part)[1], part)}"
        if isinstance(curve, Path):
            shutil.copyfile(curve, part / CURVE)
        drawn = curve(part / CURVE) if callable(curve) else curve is not None
        picture = CURVE if drawn else None
        told = checked.removesuffix(NO_TORCH)
        write_card(part, model_card(config, about or About(), dtype=dtype, checked=told, picture=picture))
        _make_way(out, part, aside=aside)  # again: writing took a while
    return checked


def check(folder: Path, params: Params, config: ModelConfig, dtype: str) -> str:
    """Compare a written folder with `params`. Returns what was compared, raises `RuntimeError` on a difference."""
    try:
        config_read, read = read_folder(folder)
    except ValueError as error:
        raise RuntimeError(f"the export cannot be read back: {error}") from None
    if config_read != config:
        raise RuntimeError(f"config.json reads back as {config_read}, not {config}")
    read_back = flatten(read, "/")
    for name, leaf in flatten(params, "/").items():
        ours = leaf.astype(dtype).astype(np.float32)
        # as integers: NaN equals itself, and 0 is not -0
        if not np.array_equal(ours.view(np.uint32), read_back[name].view(np.uint32)):
            raise RuntimeError(f"{name} reads back otherwise than it was written")
    try:
        import torch  # noqa: F401 - an installed torch may be broken, too
        import transformers  # noqa: F401
    except ImportError:
        return f"read back through our own import, bit for bit{NO_TORCH}"
    return f"{_compare_logits(folder, config_read, read)}; bits read back equal"


def export_adapters(
    adapters: Params, settings: AdapterConfig, config: ModelConfig, out: str | Path,
    *, base: dict[str, Any], tokenizer_folder: Path, about: About, verify: bool, aside: bool,
) -> str:  # fmt: skip
    """Write adapters as PEFT's folder with a tokenizer, check it, then move it to `out`.

    Returns and raises as `export_folder` does.
    """
    out = Path(os.path.realpath(out))
    with written_aside(out) as part:
        _make_way(out, part, aside=aside)
        part.mkdir(parents=True)
        write_adapters(part, adapters, settings, config, base=base)
        tokenizer = Tokenizer(tokenizer_folder)
        tokenizer.save(part)
        _name_context(part / "tokenizer_config.json", tokenizer, config)
        checked = "not checked (--no-verify)"
        if verify:
            read = flatten(read_adapters(open_adapters(part), config)[0], "/")
            for name, leaf in flatten(adapters, "/").items():
                if not np.array_equal(np.asarray(leaf).view(np.uint32), read[name].view(np.uint32)):
                    raise RuntimeError(f"{name} reads back otherwise than it was written")
            checked = "adapters read back bit for bit"
        written = open_adapters(part).settings
        card = model_card(config, about, dtype="float32", checked=checked, picture=None, adapter=written)
        write_card(part, card)
        _make_way(out, part, aside=aside)
    return checked


def compare_merged(base: Params, adapters: Params, scale: float, merged: Params, folder: Path) -> str:
    """Compare logits of a merged folder with base and adapters apart. Raises `RuntimeError` if they differ.

    Rounding may cost a small part of what the adapters change, and of the largest logit.
    """
    import jax
    import jax.numpy as jnp

    from smollm_jax.model.transformer import Adapters, SmolLM

    config = read_config(folder)
    tokens = Tokenizer(folder).encode(TEXT)[None, : min(CHECKED_TOKENS, config.max_seq_len)]

    @jax.jit
    def logits(params: Params, adapters: Params | None) -> jax.Array:
        model = SmolLM.from_params(config, params)
        apart = None if adapters is None else Adapters(adapters, scale)
        return model.features(jnp.asarray(tokens), adapters=apart) @ model.head_VD.T

    with jax.default_matmul_precision("highest"):
        apart, together = np.asarray(logits(base, adapters)), np.asarray(logits(merged, None))
        changed = float(np.abs(apart - np.asarray(logits(base, None))).max())
    largest = float(np.abs(apart).max())
    difference = float(np.abs(apart - together).max() / largest)
    found = f"logits of the merged weights differ from base and adapters by {difference:.1e} of the largest"
    if not difference <= LARGEST_DIFFERENCE:
        raise RuntimeError(f"{found}; at most {LARGEST_DIFFERENCE:.0e} is allowed, give --dtype float32")
    if difference > max(LARGEST_LOSS * changed / largest, ROUNDING):
        share = (
            f"the adapters change them by {changed / largest:.1e}, of which rounding may cost {LARGEST_LOSS:.0%}"
        )
        raise RuntimeError(f"{found}; {share}, give --dtype float32")
    return found


def load_hf(path: str | Path) -> Any:
    """Return the `SmolLM` of a Hugging Face folder or Hub id in f32. Raises `UserError` naming a misfit."""
    import jax
    import jax.numpy as jnp

    from smollm_jax.model.transformer import SmolLM

    is_run = (expand_home(path) / "checkpoints").is_dir()
    require(not is_run, f"{path} is a run; smollm_jax.load({str(path)!r}) opens it, as load_hf does {path}/export")
    config, params = read_folder(path)
    return SmolLM.from_params(config, jax.tree.map(jnp.asarray, params))


def save_hf(model: Any, path: str | Path, tokenizer: Any = None) -> None:
    """Write `model` as a Hugging Face folder, in f32. `tokenizer` is a folder, `Tokenizer` or transformers'."""
    from smollm_jax.model.transformer import params_of

    with tempfile.TemporaryDirectory(prefix="smollm-jax-") as folder:
        if tokenizer is not None and not isinstance(tokenizer, str | Path):
            (tokenizer.save if isinstance(tokenizer, Tokenizer) else tokenizer.save_pretrained)(folder)
            tokenizer = folder
        export_folder(params_of(model), model.config, path, tokenizer_folder=tokenizer)


def _name_context(settings: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Write the context as `model_max_length`, in tokens, unless there is one: transformers assumes 1e30."""
    if settings.is_file() and not tokenizer.settings.get("model_max_length"):
        values = read_json(settings) | {"model_max_length": config.max_seq_len}
        settings.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _make_way(out: Path, part: Path, *, aside: bool) -> None:
    """Raise `UserError` if `out` holds what no export wrote, or move it aside."""
    try:
        refuse_foreign(out, part)
    except UserError as error:
        if not aside:
            raise
        say(f"{error}; moved to {moved_aside(out)}")


def _compare_logits(folder: Path, config: ModelConfig, params: Params) -> str:
    """Compare transformers' logits with ours. Returns the outcome, raises `RuntimeError` if they differ."""
    import jax
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from smollm_jax.model.transformer import SmolLM

    logging.disable_progress_bar()  # it would stand among the last lines of a run

    length = min(CHECKED_TOKENS, config.max_seq_len)
    if (folder / "tokenizer.json").exists():
        tokens, kind = Tokenizer(folder).encode(TEXT)[None, :length], "English text"
    else:
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
        kind = "random ids (no tokenizer)"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # whatever a release of transformers raises: the callers know one kind
        raise RuntimeError(f"transformers cannot load it: {one_line(error)}") from error
    theirs, report = loaded
    if problems := {problem: names for problem, names in report.items() if names}:
        raise RuntimeError(f"transformers reports {problems}")
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    # accelerators round the operands of f32 products unless told otherwise
    with jax.default_matmul_precision("highest"):
        model = SmolLM.from_params(config, jax.tree.map(jax.numpy.asarray, params))
        ours = np.asarray(model(jax.numpy.asarray(tokens)))
    difference = float(np.abs(ours - expected).max() / np.abs(expected).max())
    if not difference <= LARGEST_DIFFERENCE:  # also when it is NaN
        found = f"logits from PyTorch and JAX differ by {difference:.1e} of the largest on {kind}"
        raise RuntimeError(f"{found}; at most {LARGEST_DIFFERENCE:.0e} is rounding")
    return (
        f"logits from PyTorch and JAX agree to {difference:.1e} of the largest on {tokens.size} tokens of {kind}"
    )


def _sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors header, which has another order in every process."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(written) == size, "safetensors writes its header otherwise than json.dumps"
        opened.seek(8)
        opened.write(written)
