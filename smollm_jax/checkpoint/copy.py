"""Copy a checkpoint into another run, with other meta."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smollm_jax.checkpoint.listing import META, find_checkpoint
from smollm_jax.checkpoint.manager import TEMPORARY
from smollm_jax.checkpoint.manifest import MANIFEST, read_manifest, seal
from smollm_jax.runtime.errors import UserError, one_line
from smollm_jax.runtime.files import Damaged, fsync, write_json


def copy_checkpoint(
    source: Path, step: int, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Copy checkpoint `step` from the folder `source` to `target`, with the meta that `change` returns.

    It appears whole or not at all. The copy has the checksums of the original. Raises `UserError` if there is no
    such checkpoint, if it is damaged, or if a run under way removes it meanwhile.
    """
    meta = change(find_checkpoint(source, step).meta)
    target.mkdir(parents=True, exist_ok=True)
    temporary = target / f"{TEMPORARY}{step}-copy"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        before = read_manifest(source / str(step))
        shutil.copytree(source / str(step), temporary, ignore=shutil.ignore_patterns(MANIFEST))
        write_json(temporary / META, meta)
        seal(temporary, before["about"])
        after = read_manifest(temporary)
    except (OSError, Damaged) as error:
        first = error.args[0][0][2] if isinstance(error, shutil.Error) else one_line(error)
        shutil.rmtree(temporary, ignore_errors=True)
        what = "could not be copied" if (source / str(step)).exists() else "vanished while it was copied"
        raise UserError(f"checkpoint {step} in {source} {what}: {first}") from None
    changed = [
        name for name in before["files"] if name != META and after["files"].get(name) != before["files"][name]
    ]
    if changed:
        raise UserError(f"checkpoint {step} in {source} changed while it was copied: {', '.join(changed[:3])}")
    temporary.rename(target / str(step))
    fsync(target)
