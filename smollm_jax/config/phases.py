"""Divide a run into phases, each of so many steps with one batch size. Keep the published rates of recipes."""

import re
from typing import NamedTuple

from smollm_jax.runtime.errors import require

# of each recipe, at most a tenth of the run
WARMUP_STEPS = {"replica": 100, "smollm2": 2_000, "fast": 0, "quickstart": 50, "sft": 2**31, "dpo": 2**31}
# alignment-handbook, recipes/smollm2: peak learning rates of fine-tuning, for models below a number of parameters
SFT_RATES = ((1e9, 1e-3), (float("inf"), 3e-4))


class Phase(NamedTuple):
    """A part of a run: `steps` updates with `batch_size` sequences each."""

    steps: int
    batch_size: int


def parse_phases(text: str) -> tuple[Phase, ...]:
    """Return the phases of a text such as "5000x32,50x8". Raises `UserError` for any other text."""
    parts = [re.fullmatch(r"(\d+)x(\d+)", part.strip()) for part in text.split(",")]
    phases = tuple(Phase(int(part[1]), int(part[2])) for part in parts if part)
    good = len(phases) == len(parts) and all(min(phase) > 0 for phase in phases)
    require(good, f"phases={text!r} must read STEPSxBATCH,STEPSxBATCH such as 5000x32,50x8")
    return phases


def resize(phases: tuple[Phase, ...], steps: int | None, batch_size: int | None) -> tuple[Phase, ...]:
    """Return `phases` with another total of steps and another batch size. None keeps either.

    Fewer steps cut the end off, more steps make the longest phase longer. The longest phase has the batch size,
    and no other phase a larger one.
    """
    longest, total = max(phases, key=lambda phase: phase.steps), sum(phase.steps for phase in phases)
    resized, left = [], total if steps is None else steps
    more = max(0, left - total)
    for phase in phases:
        length = min(phase.steps + (more if phase is longest else 0), left)
        left -= length
        most = phase.batch_size if batch_size is None else batch_size
        resized.append(Phase(length, most if phase is longest else min(phase.batch_size, most)))
    return tuple(phase for phase in resized if phase.steps > 0)


def check_extend(extend: int, schedule: str) -> None:
    """Raise `UserError` if a run of `schedule` cannot have `extend` more steps with the same rates before."""
    require(
        not extend or schedule in ("constant", "wsd"),
        f"extend={extend}: more steps would change every rate of the {schedule} schedule; smollm anneal RUN "
        "--from STEP --steps N goes on from a checkpoint, --init-from RUN starts a new schedule",
    )


def up_to(phases: tuple[Phase, ...], steps: int) -> tuple[Phase, ...]:
    """Return `phases` cut after `steps`, or with a longer last phase. Steps that both have keep their batch."""
    cut = resize(phases, min(steps, sum(phase.steps for phase in phases)), None)
    more = steps - sum(phase.steps for phase in cut)
    return (*cut[:-1], Phase(cut[-1].steps + more, cut[-1].batch_size))
