"""Phases of a run: so many steps with batches of one size, one phase after the other."""

from __future__ import annotations

from dataclasses import dataclass

from smollm_jax.runtime.errors import require


@dataclass(frozen=True, kw_only=True)
class Phase:
    """`steps` updates with `batch_size` sequences each."""

    steps: int
    batch_size: int


def parse_phases(text: str) -> tuple[Phase, ...]:
    """Return the phases of a text such as "5000x32,50x8"; raises `UserError` for any other text."""
    phases = []
    for part in text.split(","):
        steps, _, batch_size = part.strip().partition("x")
        require(
            steps.isdecimal() and batch_size.isdecimal() and int(steps) > 0 and int(batch_size) > 0,
            f"phases={text!r} must read STEPSxBATCH,STEPSxBATCH such as 5000x32,50x8",
        )
        phases.append(Phase(steps=int(steps), batch_size=int(batch_size)))
    return tuple(phases)


def resize(phases: tuple[Phase, ...], steps: int | None, batch_size: int | None) -> tuple[Phase, ...]:
    """Return `phases` with another total of steps and another batch size; None keeps either.

    Fewer steps cut the end off, more steps make the longest phase longer. The longest phase has the batch size,
    and no other phase a larger one.
    """
    longest = max(phases, key=lambda phase: phase.steps)
    resized, left = [], steps
    for phase in phases:
        length, size = phase.steps, phase.batch_size
        if steps is not None and left is not None:
            if phase is longest:
                length += max(0, steps - sum(phase.steps for phase in phases))
            length = min(length, left)
            left -= length
        if batch_size is not None:
            size = batch_size if phase is longest else min(size, batch_size)
        if length > 0:
            resized.append(Phase(steps=length, batch_size=size))
    return tuple(resized)
