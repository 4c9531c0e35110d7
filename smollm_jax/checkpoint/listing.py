"""List and verify the checkpoints of a run.

This module reads names, manifests and `meta.json`, never an array. A listing is quick, as nothing heavy is
imported. No checkpoint is deleted: a damaged one is reported and, if a run is about to continue, renamed.
"""

import logging
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm_jax.checkpoint.manifest import verify
from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.runtime.files import Damaged, fsync, read_json

META, INDEX = "meta.json", "manifest.ocdbt"
BAD = ".bad"
LEAVES_SHOWN = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VerifiedCheckpoint:
    """A checkpoint that verifies."""

    step: int
    meta: dict[str, Any]
    leaves: dict[str, tuple[tuple[int, ...], str]]
    """Shape and dtype by leaf name."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint folder as `checkpoints RUN` lists it. `verdict` is "good" or what is wrong."""

    name: str
    step: int
    bytes: int
    age_seconds: float
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The rule for which checkpoints stay: the newest `keep_last`, and those with a reason of their own."""

    keep_last: int
    keep_every: int = 0
    """Every step that this divides stays (0: none)."""
    before: int | None = None
    """The last checkpoint up to this step stays: a learning rate decay begins after it."""

    def reasons(self, steps: Iterable[int]) -> dict[int, str]:
        """Return which of the `steps` of whole checkpoints stay, and why."""
        ordered = sorted(steps, reverse=True)
        why = dict.fromkeys(ordered[: self.keep_last], "")
        if self.keep_every:
            why |= {step: f"every {self.keep_every:,}" for step in ordered if step % self.keep_every == 0}
        before = self.before
        if before is not None and ordered and before <= ordered[0]:
            why |= dict.fromkeys([step for step in ordered if step <= before][:1], "before the decay")
        return why


def list_checkpoints(folder: str | Path) -> list[CheckpointInfo]:
    """Return all checkpoints of a run, quarantined ones too, fully verified and ordered by step."""
    infos = []
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        base, is_bad, _ = path.name.partition(BAD)
        step = _step_of(base)
        if step is None:
            continue
        try:
            open_checkpoint(path, step)
            verdict = "good"
        except Damaged as reason:
            verdict = one_line(reason)
        try:
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            age = max(0.0, time.time() - path.stat().st_mtime)  # clocks of two machines differ
        except FileNotFoundError:  # a run under way has just removed it
            continue
        verdict = f"set aside: {verdict}" if is_bad else verdict
        infos.append(CheckpointInfo(name=path.name, step=step, bytes=size, age_seconds=age, verdict=verdict))
    return sorted(infos, key=lambda info: (info.step, info.name))


def table(run_dir: Path, retention: Retention | None = None) -> str:
    """Return a line of step, size, age and verdict per checkpoint, and why it is kept by `retention`.

    Raises `UserError` for no run.
    """
    folder, lines = run_dir / "checkpoints", [f"{'checkpoint':>14}  {'size':>13}  {'age':>8}  verdict"]
    require(folder.is_dir(), f"{run_dir} is not a run: it has no checkpoints/")
    infos = list_checkpoints(folder)
    kept = retention.reasons(info.step for info in infos if info.verdict == "good") if retention else {}
    for info in infos:
        units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
        unit, length = next((pair for pair in units if info.age_seconds >= 2 * pair[1]), units[-1])
        why = f", kept: {why}" if info.verdict == "good" and (why := kept.get(info.step)) else ""
        age = f"{info.age_seconds / length:.0f} {unit}"
        lines.append(f"{info.name:>14}  {info.bytes / 1e6:>10,.1f} MB  {age:>8}  {info.verdict}{why}")
    return "\n".join(lines)


def steps_in(folder: Path) -> list[int]:
    """Return the steps that have a folder, newest first."""
    steps = [_step_of(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((step for step in steps if step is not None), reverse=True)


def open_checkpoint(
    path: Path, step: int, *, group: str | None = None, checksums: bool = True
) -> VerifiedCheckpoint:
    """Verify a checkpoint, or only one part of it and its meta. Raises `Damaged`."""
    manifest = verify(path, parts=None if group is None else {group, META}, checksums=checksums)
    about, files = manifest["about"], manifest["files"]
    if about.get("step") != step:
        raise Damaged(f"it says that it is of step {about.get('step')!r}")
    meta = read_json(path / META, META)
    if not isinstance(meta, dict):
        raise Damaged(f"{META} is not an object")
    try:
        leaves = {n: (tuple(map(int, v["shape"])), str(v["dtype"])) for n, v in about["leaves"].items()}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise Damaged("its manifest does not describe the leaves") from None
    for part in sorted({name.split("/")[0] for name in leaves}):
        # orbax joins nothing, and reports nothing, in a folder with brackets
        if group in (None, part) and f"{part}/{INDEX}" not in files:
            raise Damaged(f"{part}/{INDEX}, the index of its arrays, was never written")
    return VerifiedCheckpoint(step=step, meta=meta, leaves=leaves)


def find_checkpoint(folder: Path, step: int | None, *, group: str | None = None) -> VerifiedCheckpoint:
    """Return the checkpoint of `step`, or the newest good one. Raises `UserError` if missing or damaged."""
    if step is None:
        found = next(verified_checkpoints(folder, group=group), None)
        if found is None:
            raise UserError(f"{folder} holds no good checkpoint")
        return found
    if step not in (steps := steps_in(folder)):
        there = ", ".join(map(str, reversed(steps))) or "none"
        raise UserError(f"{folder} holds no checkpoint of step {step}; there are: {there}")
    try:
        return open_checkpoint(folder / str(step), step, group=group)
    except Damaged as reason:
        raise UserError(f"checkpoint {step} in {folder} is damaged: {reason}") from None


def verified_checkpoints(
    folder: Path, *, group: str | None = None, rename: bool = False
) -> Iterator[VerifiedCheckpoint]:
    """Yield the checkpoints that verify, newest first. Logs damaged ones and, with `rename`, renames them."""
    for step in steps_in(folder):
        path = folder / str(step)
        try:
            yield open_checkpoint(path, step, group=group)
        except Damaged as reason:
            if rename:
                quarantine(path, reason)
            else:
                logger.warning("checkpoint %s is damaged and passed over: %s", path, reason)


def compare(found: VerifiedCheckpoint, expected: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Raise `UserError` unless the leaves of the checkpoint have the expected names, shapes and dtypes."""

    def words(leaf: tuple[tuple[int, ...], str] | None) -> str:
        return "nothing" if leaf is None else f"{leaf[1]} ({','.join(map(str, leaf[0]))})"

    wrong = [
        f"{name}: expected {words(expected.get(name))}, the checkpoint holds {words(found.leaves.get(name))}"
        for name in expected | found.leaves
        if expected.get(name) != found.leaves.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - LEAVES_SHOWN} more leaves" if len(wrong) > LEAVES_SHOWN else ""
        raise UserError(f"checkpoint {found.step} does not fit: {'; '.join(wrong[:LEAVES_SHOWN])}{more}")


def quarantine(path: Path, reason: Damaged) -> None:
    """Rename a damaged checkpoint to STEP.bad, and log why."""
    aside, number = path.with_name(path.name + BAD), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{BAD}-{number}")
    path.rename(aside)
    fsync(path.parent)
    logger.warning("checkpoint %s is damaged: %s; it is left as %s", path, reason, aside.name)


def _step_of(name: str) -> int | None:
    """Return the step whose checkpoint has this folder name. None for other names."""
    return int(name) if re.fullmatch(r"0|[1-9][0-9]{0,17}", name) else None
