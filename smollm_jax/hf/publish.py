"""Check an exported folder for additions and changes, and upload it to the Hub.

Only files that an export consists of are uploaded. huggingface_hub handles the token: HF_TOKEN, or the token of
`hf auth login`. The token is neither read nor printed here.
"""

import json
import re
from functools import partial
from pathlib import Path

import xxhash

from smollm_jax.hf.adapters import SETTINGS, is_adapter_folder, open_adapters
from smollm_jax.hf.adapters import WEIGHTS as ADAPTERS
from smollm_jax.hf.card import PLACE, REPO
from smollm_jax.hf.config_json import model_config
from smollm_jax.hf.reader import INDEX, tensor_files
from smollm_jax.runtime.background import BackgroundTask
from smollm_jax.runtime.errors import UserError, one_line, require, say
from smollm_jax.runtime.files import checksum, expand_home, held_in, leads_out, read_json, read_whole
from smollm_jax.tokenizer.tokenizer import FILES

ANSWER_SECONDS, SLOWEST_BYTES = 60.0, 50_000  # of the Hub, which may accept and never answer. Bytes per second
CARD, CURVE = "README.md", "loss.png"
# exact names: a person keeps notes beside an export, under names such as tokenizer_notes.md
NAMES = {"config.json", "generation_config.json", INDEX, *FILES, CARD, CURVE, SETTINGS, ADAPTERS}
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors", re.ASCII)
RECORD = re.compile(rb"\n<!-- written by smollm-jax, as the checksums tell: (.*) -->\n\Z")


def is_exported(name: str) -> bool:
    """Return whether an export may hold a file of this name."""
    return name in NAMES or WEIGHTS.fullmatch(name) is not None


def refuse_links(folder: Path) -> None:
    """Raise `UserError` if a model's file links out of `folder`. Links in the Hub's cache are exempt."""
    for path in sorted(folder.iterdir()):
        is_safe = not (is_exported(path.name) and leads_out(path))
        require(is_safe, f"{path} is a link out of the folder, and is not copied; put the file itself there")


def write_card(folder: Path, text: str) -> None:
    """Write the model card of an export. The checksums of all files stand at its end."""
    card = folder / CARD
    card.write_text(text, encoding="utf-8", errors="replace")
    record = json.dumps({path.name: checksum(path) for path in sorted(folder.iterdir())})
    with card.open("a", encoding="utf-8") as file:
        file.write(f"\n<!-- written by smollm-jax, as the checksums tell: {record} -->\n")


def refuse_foreign(out: Path, part: Path) -> None:
    """Raise `UserError` unless `out` is free, empty but for `part`, or an unchanged export."""
    require(not out.exists() or out.is_dir(), f"{out} is a file; give another --out")
    held = [path for path in held_in(out) if path != part] if out.exists() else []
    if not held:
        return
    card = read_whole(out / CARD) if (out / CARD).is_file() else b""
    found = RECORD.search(card)
    try:
        record = json.loads(found[1]) if found else None
    except (ValueError, RecursionError):
        record = None
    if found is None or not isinstance(record, dict):
        raise UserError(
            f"{out} is not empty and no export as this version writes it; give another --out, or move it away"
        )
    for path in held:
        require(path.name in record, f"{out} holds {path.name}, which no export wrote; give another --out")
        is_file = path.is_file() and not path.is_symlink()
        text = xxhash.xxh3_128_hexdigest(card[: found.start()])
        is_same = is_file and record[path.name] == (text if path.name == CARD else checksum(path))
        require(is_same, f"{out} holds {path.name}, which has changed since its export; give another --out")


def push(folder: str | Path, repo: str, *, dry_run: bool = False, private: bool = False) -> str:
    """Upload `folder` to the model repository `repo`, created if missing. Returns the address.

    `dry_run` returns the list of files and sizes instead, and needs no token and no network. Raises `UserError` if
    the folder is no whole export, the token is missing, or the Hub cannot be reached.
    """
    folder = expand_home(folder)
    require(bool(REPO.fullmatch(repo)), f"repository {repo!r} must read OWNER/NAME")
    require(folder.is_dir(), f"there is no folder {folder}; python -m smollm_jax export makes one")
    is_run = (folder / "checkpoints").is_dir()
    require(not is_run, f"{folder} is a run; push {folder / 'export'}, or the folder that export wrote")
    if is_adapter_folder(folder):
        base = open_adapters(folder).base
        named = f"{folder / SETTINGS} names the base {base}, which nobody else has; put its Hub id there"
        require(bool(REPO.fullmatch(base)) and not Path(base).exists(), named)
    else:
        require((folder / "config.json").is_file(), f"{folder} holds no config.json; it is no exported folder")
        model_config(read_json(folder / "config.json"))
        tensor_files(folder)  # raises if weights are missing
    files = sorted(path for path in folder.iterdir() if path.is_file() and is_exported(path.name))
    for path in files:
        require(
            not path.is_symlink(), f"{path} is a link, and only files are published; put the file itself there"
        )
    sizes = {path.name: path.stat().st_size for path in files}
    if dry_run:
        lines = [f"{size:>15,}  {name}" for name, size in sizes.items()]
        where = f"would go to {repo}{' (private)' if private else ''}"
        return "\n".join([*lines, f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files {where}"])
    from huggingface_hub import HfApi, get_token

    require(get_token() is not None, "no Hub token; set HF_TOKEN or run: hf auth login")
    create = partial(HfApi().create_repo, repo, private=private, exist_ok=True)
    upload = partial(
        HfApi().upload_folder, repo_id=repo, folder_path=folder, allow_patterns=sorted({*sizes} - {CARD}),
        commit_message="Exported by smollm-jax",
    )  # fmt: skip
    # the card with the model's new name, and without the checksums, which are for the folder
    card = RECORD.sub(b"", (folder / CARD).read_bytes()) if CARD in sizes else b""
    describe = partial(
        HfApi().upload_file, path_or_fileobj=card.replace(PLACE.encode(), repo.encode()), path_in_repo=CARD,
        repo_id=repo, commit_message="Model card",
    )  # fmt: skip
    try:
        address = BackgroundTask(create).result(ANSWER_SECONDS)
        say(f"uploading {sum(sizes.values()):,} bytes to {address}")
        BackgroundTask(upload).result(ANSWER_SECONDS + sum(sizes.values()) / SLOWEST_BYTES)
        if card:
            BackgroundTask(describe).result(ANSWER_SECONDS)
    except Exception as error:  # its kind differs between releases of the client
        raise UserError(f"{repo} could not be written on the Hub: {one_line(error)}") from None
    return str(address)
