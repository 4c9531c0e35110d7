"""Find each data file that a path or pattern names, without other files of folders."""

import os
import re
from pathlib import Path

from smollm_jax.runtime.errors import UserError, one_line, require, say_once
from smollm_jax.runtime.files import matching

JSON = (".json", ".json.gz")  # of C4 and Dolma: lines of JSON. Settings files have this name too
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", *JSON)
ABOUT = re.compile(
    r"(authors|changelog|contributing|copying|licen[cs]e|notice|readme|requirements)\.txt"
    r"|(config|dataset_dict|dataset_infos?|metadata|state)\.json", re.IGNORECASE
)  # fmt: skip
SHOWN = 5  # names in a line


def data_files(pattern: str) -> list[str]:
    """Return the files as `find_files` does. Raises `UserError` if there is none, or one that is not read."""
    try:
        files = find_files(pattern)
    except OSError as error:
        raise UserError(f"--data {pattern}: {one_line(error)}") from None
    require(bool(files), f"--data {pattern} matches no file; give a path or glob of {', '.join(SUFFIXES)}")
    require_known(files, pattern)
    for path in files:
        is_file = os.path.isfile(path)
        require(is_file, f"--data {pattern}: {path} is no regular file, and data is read more than once")
    return files


def require_known(files: list[str], spec: str) -> None:
    """Raise `UserError` for a file of a format that is not read."""
    for path in files:
        require(path.endswith(SUFFIXES), f"--data {spec}: {path} is none of {', '.join(SUFFIXES)}")


def find_files(pattern: str) -> list[str]:
    """Return the files in the order of their names. A folder stands for the data files below it.

    Raises `OSError` for a folder that cannot be read, and `UserError` for the home folder of an unknown user.
    """
    found = matching(pattern)
    # texts/** names a folder and also its files: the folder decides which of them are data
    folders = {path for path in found if os.path.isdir(path)}
    found = [path for path in found if not folders & {*map(str, Path(path).parents)}]
    # through a link to a parent a file is found again and again
    paths = sorted({str(Path(f)) for path in found for f in (_inside(path) if path in folders else [path])})
    return list(
        {(os.path.realpath(os.path.dirname(f)), os.path.basename(f)): f for f in reversed(paths)}.values()
    )[::-1]


def _inside(folder: str) -> list[str]:
    """Return the data files below a folder, and log the files that are passed over.

    Hidden files (.ipynb_checkpoints) and folders of tools (__MACOSX, _delta_log) are passed over. Beside other
    files, descriptions of the data (LICENSE.txt) and .json are passed over too.
    """
    files, passed, seen = [], [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        seen.add(os.path.realpath(root))
        passed += [os.path.join(root, name) for name in folders if name.startswith((".", "_"))]
        # a linked folder is read too, but none twice
        kept = (name for name in folders if not name.startswith((".", "_")))
        folders[:] = [name for name in kept if os.path.realpath(os.path.join(root, name)) not in seen]
        data = [name for name in names if name.endswith(SUFFIXES)]
        passed += [os.path.join(root, name) for name in data if name.startswith(".")]
        files += [os.path.join(root, name) for name in data if not name.startswith(".")]
    for beside in (lambda path: ABOUT.fullmatch(Path(path).name), lambda path: path.endswith(JSON)):
        others = [path for path in files if not beside(path)]
        files, passed = (others, passed + [path for path in files if beside(path)]) if others else (files, passed)
    if passed:
        more = f" and {len(passed) - SHOWN} more" if len(passed) > SHOWN else ""
        shown = ", ".join(sorted(os.path.relpath(path, folder) for path in passed)[:SHOWN])
        say_once(f"passed over in {folder}: {shown}{more}; name a file or a pattern to read it")
    return files


def _raise(error: OSError) -> None:
    raise error
