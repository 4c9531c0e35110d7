"""Export a model as a checked folder with a GGUF file and a Modelfile."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.hf.card import LICENSE, About, model_card
from smollm_jax.hf.export import TEXT
from smollm_jax.hf.gguf_file import SUFFIX, library, read_file
from smollm_jax.hf.gguf_model import BLOCK, DTYPES, gguf_name, read_gguf, write_gguf
from smollm_jax.hf.gguf_vocabulary import vocabulary_fields
from smollm_jax.hf.mapping import Params, tensors, to_hf
from smollm_jax.hf.ollama import modelfile
from smollm_jax.hf.publish import refuse_foreign, write_card
from smollm_jax.runtime.errors import UserError, require
from smollm_jax.runtime.files import written_aside
from smollm_jax.tokenizer.tokenizer import Tokenizer

MODELFILE = "Modelfile"
# Largest error of a weight as a part of the largest of its block: half a step of the format, a whole one where its
# range has another length on both sides of zero, and the rounding of scale and minimum to f16.
ERRORS = {"Q8_0": 0.0046, "Q5_1": 0.0335, "Q5_0": 0.064, "Q4_1": 0.068, "Q4_0": 0.127}
SMALLEST = 1e-5  # of a weight: a scale below the least f16 is 0
TEXTS = (
    TEXT,
    "In 1999, 3.14159 != 22/7\n\n\tdef f(x):\n        return x**2  # don't",
    "naïve Größe 東京 🦙🏽 \u00a0 ",
)


def export_gguf(
    params: Params, config: ModelConfig, tokenizer: Tokenizer, out: str | Path, *, dtype: str = "f16",
    about: About | None = None, verify: bool = True,
) -> tuple[Path, str]:  # fmt: skip
    """Write a folder, check it, then move it to `out`. Returns the GGUF file and a sentence on the check.

    An older unchanged export is replaced. Raises `UserError` if `out` holds anything else, or GGUF has no field
    for the tokenizer. Raises `RuntimeError` if the check fails: an older export stays.
    """
    require(dtype in DTYPES, f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    library()
    out, about = Path(os.path.realpath(out)), about or About()
    title = " ".join(about.title.split())
    name = f"{re.sub(r'[^a-zA-Z0-9.-]+', '-', title).strip('.-') or 'model'}-{dtype}{SUFFIX}"
    with written_aside(out) as part:
        refuse_foreign(out, part)
        part.mkdir(parents=True)
        vocabulary, general = vocabulary_fields(tokenizer, config), _general(config, about, title)
        write_gguf(params, config, vocabulary, part / name, dtype=dtype, general=general)
        checked = check(part / name, params, config, tokenizer) if verify else "not checked (--no-verify)"
        (part / MODELFILE).write_text(modelfile(name, tokenizer, config), encoding="utf-8")
        held = read_file(part / name)
        card = model_card(config, about, dtype=held.bits, checked=checked, picture=None, gguf=name)
        write_card(part, card)
        refuse_foreign(out, part)  # again: writing took a while
    return out / name, checked


def _general(config: ModelConfig, about: About, title: str) -> dict[str, Any]:
    label = library().size_label(config.num_parameters, 0, 0, 0)
    fields = {"type": "model", "name": title, "basename": title, "size_label": label, "license": LICENSE}
    languages = {"languages": [about.language]} if about.language else {}
    return {f"general.{name}": value for name, value in (fields | languages).items()}


def check(path: Path, params: Params, config: ModelConfig, tokenizer: Tokenizer) -> str:
    """Compare a written file with what it was made of. Returns the outcome, raises `RuntimeError` on a difference.

    Weights in f32, f16 and bf16 must be the rounded ones, others within the error of their format.
    """
    try:
        read_config, read, vocabulary = read_gguf(path)
    except UserError as error:
        raise RuntimeError(f"the export cannot be read back: {error}") from None
    # what no field of GGUF holds
    lost = {"initializer_range": 0, "extra_eos_token_ids": ()}
    ours, theirs = (dict(sorted(vars(one).items())) | lost for one in (config, read_config))
    if ours != theirs:
        raise RuntimeError(f"the architecture reads back as {read_config}, not {config}")
    for text in TEXTS:
        if any(vocabulary.encode(text, mode).tolist() != tokenizer.encode(text, mode).tolist()
               for mode in ("text", "parse")):  # fmt: skip
            raise RuntimeError(f"the tokenizer reads back otherwise: it gives other ids for {text[:20]!r}")
    held, squares, errors = read_file(path), 0.0, 0.0
    for tensor in tensors(config):
        kind = held.tensors[gguf_name(tensor)].kind.name
        ours_OI, theirs_OI = (to_hf(one, tensor).astype(np.float32) for one in (params, read))
        if not _agrees(ours_OI, theirs_OI, kind):
            raise RuntimeError(f"{tensor.name} reads back otherwise than it was written, as {kind}")
        squares += float(np.square(ours_OI, dtype=np.float64).sum())
        errors += float(np.square(theirs_OI - ours_OI, dtype=np.float64).sum())
    share = 100 * (errors / squares) ** 0.5 if squares else 0.0
    rounding = f"weights within {share:.2g} %" if errors else "equal weights"
    return f"{held.bits}; read back: {rounding}, the same architecture, and the same ids for {len(TEXTS)} texts"


def _agrees(ours_OI: np.ndarray, theirs_OI: np.ndarray, kind: str) -> bool:
    import ml_dtypes

    exact = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    if kind in exact:
        with np.errstate(over="ignore"):
            rounded = ours_OI.astype(exact[kind]).astype(np.float32)
        is_whole = bool(np.isfinite(rounded).all()) or not np.isfinite(ours_OI).all()
        return is_whole and np.array_equal(rounded.view(np.uint32), theirs_OI.view(np.uint32))
    blocks = ours_OI.reshape(-1, BLOCK)
    bound = ERRORS[kind] * np.abs(blocks).max(axis=1, keepdims=True) + SMALLEST
    return bool((np.abs(theirs_OI.reshape(-1, BLOCK) - blocks) <= bound).all())  # False for NaN
