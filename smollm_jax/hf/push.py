"""Upload an exported folder to the Hugging Face Hub, or list the files it would upload.

Only files that an export consists of are uploaded, no other file in the folder. huggingface_hub handles the token
(HF_TOKEN or `hf auth login`); this module neither reads nor prints it.
"""

from __future__ import annotations

import re
from pathlib import Path

from smollm_jax.hf.config_json import model_config
from smollm_jax.hf.export import is_exported
from smollm_jax.hf.reader import tensor_files
from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.runtime.files import read_json

# https://huggingface.co/docs/huggingface_hub: letters, digits, "-", "_" and "." on both sides of the slash
REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def push(folder: str | Path, repo: str, *, dry_run: bool = False, private: bool = False) -> str:
    """Upload `folder` to the model repository `repo`, created if it is missing; returns the address.

    `dry_run` returns the list of files and sizes instead, and needs no token and no network. Raises `UserError` if
    the folder is no export, if there is no token, or if the Hub cannot be reached.
    """
    folder = Path(folder)
    require(bool(REPO.fullmatch(repo)), f"repository {repo!r} must read OWNER/NAME")
    sizes = files_to_push(folder)
    if dry_run:
        lines = [f"{size:>15,}  {name}" for name, size in sizes.items()]
        where = f"would go to {repo}{' (private)' if private else ''}"
        return "\n".join([*lines, f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files {where}"])
    from huggingface_hub import HfApi, get_token

    require(get_token() is not None, "no Hub token; set HF_TOKEN or run: hf auth login")
    try:
        address = HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=list(sizes), commit_message="Exported by smollm-jax"
        )
    except Exception as error:  # its kind differs between releases of the client
        raise UserError(f"{repo} could not be written on the Hub: {one_line(error)}") from None
    return str(address)


def files_to_push(folder: Path) -> dict[str, int]:
    """Return the files of an export and their bytes; raises `UserError` if the export is incomplete."""
    require(folder.is_dir(), f"there is no folder {folder}; python -m smollm_jax export makes one")
    require((folder / "config.json").is_file(), f"{folder} holds no config.json; it is no exported folder")
    model_config(read_json(folder / "config.json"))
    tensor_files(folder)  # raises if weights are missing
    files = sorted(path for path in folder.iterdir() if path.is_file() and is_exported(path.name))
    return {path.name: path.stat().st_size for path in files}
