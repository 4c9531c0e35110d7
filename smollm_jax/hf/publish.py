"""Publish an exported folder: its model card, and its upload to the Hugging Face Hub.

Only files that an export consists of are uploaded, no other file in the folder. huggingface_hub handles the token
(HF_TOKEN or `hf auth login`); this module neither reads nor prints it.
"""

import re
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from smollm_jax.config.architecture import ModelConfig
from smollm_jax.hf.config_json import model_config
from smollm_jax.hf.reader import WANTED, tensor_files
from smollm_jax.runtime.background import BackgroundTask
from smollm_jax.runtime.errors import UserError, one_line, require, say
from smollm_jax.runtime.files import read_json

ANSWER_SECONDS, SLOWEST_BYTES = 60.0, 50_000  # of the Hub, which may accept and never answer; bytes per second
CARD, CURVE = "README.md", "loss.png"
# https://huggingface.co/docs/huggingface_hub: letters, digits, "-", "_" and "." on both sides of the slash
REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def is_exported(name: str) -> bool:
    """Return whether an export may hold a file of this name."""
    return any(fnmatchcase(name, pattern) for pattern in (*WANTED, CARD, CURVE))


def push(folder: str | Path, repo: str, *, dry_run: bool = False, private: bool = False) -> str:
    """Upload `folder` to the model repository `repo`, created if it is missing; returns the address.

    `dry_run` returns the list of files and sizes instead, and needs no token and no network. Raises `UserError` if
    the folder is no whole export, if there is no token, or if the Hub cannot be reached.
    """
    folder = Path(folder)
    require(bool(REPO.fullmatch(repo)), f"repository {repo!r} must read OWNER/NAME")
    require(folder.is_dir(), f"there is no folder {folder}; python -m smollm_jax export makes one")
    require((folder / "config.json").is_file(), f"{folder} holds no config.json; it is no exported folder")
    model_config(read_json(folder / "config.json"))
    tensor_files(folder)  # raises if weights are missing
    files = sorted(path for path in folder.iterdir() if path.is_file() and is_exported(path.name))
    sizes = {path.name: path.stat().st_size for path in files}
    if dry_run:
        lines = [f"{size:>15,}  {name}" for name, size in sizes.items()]
        where = f"would go to {repo}{' (private)' if private else ''}"
        return "\n".join([*lines, f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files {where}"])
    from huggingface_hub import HfApi, get_token

    require(get_token() is not None, "no Hub token; set HF_TOKEN or run: hf auth login")
    create = partial(HfApi().create_repo, repo, private=private, exist_ok=True)
    upload = partial(
        HfApi().upload_folder, repo_id=repo, folder_path=folder, allow_patterns=list(sizes),
        commit_message="Exported by smollm-jax",
    )  # fmt: skip
    try:
        address = BackgroundTask(create).result(ANSWER_SECONDS)
        say(f"uploading {sum(sizes.values()):,} bytes to {address}")
        BackgroundTask(upload).result(ANSWER_SECONDS + sum(sizes.values()) / SLOWEST_BYTES)
    except Exception as error:  # its kind differs between releases of the client
        raise UserError(f"{repo} could not be written on the Hub: {one_line(error)}") from None
    return str(address)


def model_card(config: ModelConfig, facts: dict[str, Any], *, dtype: str, checked: str, curve: bool) -> str:
    """Return Markdown with the front matter that the Hub reads; `facts` by label, left out if None."""
    rows = {"Parameters": f"{config.num_parameters:,}", "File dtype": dtype}
    rows |= {label: _cell(value) for label, value in facts.items() if value is not None}
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    picture = f"\n![loss]({CURVE})\n" if curve else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- smollm
- jax
---

# A SmolLM2-class model

Trained with smollm-jax. A base model: it continues text and follows no instructions.

| | |
|---|---|
{table}
{picture}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0]))
```

Check at export: {checked}.
"""


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return "`" + value.replace("|", "\\|") + "`"  # a bar would end the cell
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
