"""Average the weights of models that share architecture and tokenizer, in float64.

The sums are float64 because many float32 or bfloat16 terms would each round. The result is written as float32.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax.checkpoint.listing import verified_checkpoints
from smollm_jax.config.architecture import ModelConfig
from smollm_jax.hf.card import About
from smollm_jax.hf.export import export_folder
from smollm_jax.hf.publish import refuse_foreign
from smollm_jax.runs.load import is_run, load_model, with_ids_of
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.files import expand_home
from smollm_jax.runtime.trees import flatten, unflatten
from smollm_jax.tokenizer.tokenizer import Tokenizer

NEARLY_PARALLEL = 1 - 1e-6  # cosine above which the great circle is a line: its sine would divide by about 0
# fields of the architecture that no forward pass reads
OF_NO_WEIGHT = {"initializer_range", "bos_token_id", "eos_token_id", "extra_eos_token_ids", "pad_token_id"}

Seen = Callable[[str, ModelConfig, Any, Tokenizer], None]


def newest(run: str, count: int) -> list[str]:
    """Return the newest `count` good checkpoints of a run as paths, oldest first. Raises `UserError` for fewer."""
    require(is_run(run), f"--last {count} is for one run; {run} is none")
    folder = expand_home(run) / "checkpoints"
    found = [str(folder / str(one.step)) for one in islice(verified_checkpoints(folder, group="params"), count)]
    require(len(found) == count, f"--last {count}: {run} holds {len(found)} good ones; --keep-last keeps more")
    return found[::-1]


def run_of(path: str) -> tuple[Path, int | None] | None:
    """Return the run and step of RUN or RUN/checkpoints/STEP, None for other paths."""
    place = expand_home(path)
    if place.parent.name == "checkpoints" and place.name.isdecimal() and is_run(place.parent.parent):
        return place.parent.parent, int(place.name)
    return (place, None) if is_run(place) else None


def open_part(path: str) -> tuple[ModelConfig, Any, Tokenizer]:
    """Return a model as `load_model` does. RUN/checkpoints/STEP names a checkpoint of a run."""
    run, step = run_of(path) or (path, None)
    model, params, tokenizer = load_model(run, step)
    return with_ids_of(model, tokenizer), params, tokenizer


def averaged(
    paths: Sequence[str], weights: Sequence[float], seen: Seen, *, slerp: float | None = None
) -> tuple[ModelConfig, Any, Tokenizer]:
    """Return the mean of models with these weights, or of two models their point `slerp` on the great circle.

    The float64 mean and one model are in memory at a time, for `slerp` two models. `seen` is called with each.
    Raises `UserError` if architectures or tokenizers differ.
    """
    total: dict[str, np.ndarray] = {}
    first: tuple[ModelConfig, Tokenizer] | None = None
    for path, weight in zip(paths, weights, strict=True):
        model, params, tokenizer = open_part(path)
        first = first or (model, tokenizer)
        _require_same(first, (model, tokenizer), paths[0], path)
        seen(path, model, params, tokenizer)
        leaves = flatten(params, "/")
        if slerp is None:
            _add(total, leaves, weight / sum(weights))
        elif not total:
            total = leaves
        else:
            for name, leaf in leaves.items():
                total[name] = on_circle(name, total[name], leaf, slerp).astype(np.float32)
        del params, leaves  # before the next model is read
    assert first is not None
    mean = {name: total.pop(name).astype(np.float32, copy=False) for name in sorted(total)}
    return first[0], unflatten(mean, "/"), first[1]


def _require_same(
    first: tuple[ModelConfig, Tokenizer], other: tuple[ModelConfig, Tokenizer], name: str, path: str
) -> None:
    """Raise `UserError` naming what differs between the first model and another."""
    ours, theirs = vars(first[0]), vars(other[0])
    differ = [f"{x} {ours[x]} and {theirs[x]}" for x in ours if x not in OF_NO_WEIGHT and ours[x] != theirs[x]]
    require(not differ, f"{name} and {path} have other architectures, so no average: {', '.join(differ)}")
    same = first[1].fingerprint == other[1].fingerprint
    require(same, f"{name} and {path} have other tokenizers, so their embeddings have no average")


def _add(total: dict[str, np.ndarray], leaves: Mapping[str, np.ndarray], weight: float) -> None:
    for name, leaf in leaves.items():
        part = np.multiply(leaf, weight, dtype=np.float64)
        total[name] = np.add(total[name], part, out=part) if name in total else part


def on_circle(name: str, one: np.ndarray, other: np.ndarray, t: float) -> np.ndarray:
    """Return the point t, from 0 to 1, between two arrays on the great circle (Shoemake 1985), in float64.

    The arrays are vectors, of a stack of layers one vector per layer. Nearly parallel ones take the line.
    """
    a, b = (x.reshape(len(x) if name.startswith("blocks/") else 1, -1).astype(np.float64) for x in (one, other))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.clip((a * b).sum(1) / np.where(lengths > 0, lengths, 1), -1, 1)
    is_line = (np.abs(cosine) > NEARLY_PARALLEL) | (lengths == 0)
    angle = np.where(is_line, 1, np.arccos(cosine))
    parts = [np.where(is_line, share, np.sin(share * angle) / np.sin(angle)) for share in (1 - t, t)]
    return (parts[0][:, None] * a + parts[1][:, None] * b).reshape(one.shape)


def check_out(out: str, paths: Sequence[str]) -> None:
    """Raise `UserError` if `out` holds what no export wrote, or a part of the average. No weights are read yet."""
    refuse_foreign(expand_home(out), expand_home(out))
    place = expand_home(out).resolve()
    for path in paths:
        part = (run_of(path) or (expand_home(path),))[0].resolve()
        inside = place == part or part in place.parents
        require(not inside, f"--out {out} lies in {path}, which is averaged; give another --out")


def write_average(
    model: ModelConfig, params: Any, tokenizer: Tokenizer, out: str, *, rows: dict[str, Any], verify: bool
) -> str:
    """Write the average as a Hugging Face folder whose card has `rows`. Returns and raises as `export_folder`."""
    about = About(title=Path(out).name, rows=rows, chat=bool(tokenizer.chat_template))
    with tempfile.TemporaryDirectory(prefix="smollm-jax-") as folder:
        tokenizer.save(Path(folder))
        return export_folder(params, model, expand_home(out), tokenizer_folder=folder, about=about, verify=verify)
