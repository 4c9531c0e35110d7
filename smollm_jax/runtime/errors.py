"""Errors of a user, of a source and of a machine, and the exit codes of every command."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in arguments, settings or input; its message is the one line a user is shown."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


EXIT_MISTAKE = 2


EXIT_STOPPED = 75  # stopped on request with everything saved: run me again (EX_TEMPFAIL of sysexits.h)
EXIT_FAILED = 1


class SourceTimeout(RuntimeError):
    """A source has not answered for --data-timeout seconds."""


def brief(error: BaseException) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines()
    text = " ".join(lines[0].split())[:200] if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def said_by(error: Exception) -> str:
    """What a compiler or driver said of a program that does not run on the device, in a line."""
    return f"{type(error).__name__}, " + " ".join(str(error).split())[:200]
