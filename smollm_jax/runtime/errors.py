"""Errors of the user, of a data source and of the machine, and the exit codes of every command."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_MISTAKE = 2
EXIT_STOPPED = 75  # stopped on request with everything saved: run me again (EX_TEMPFAIL of sysexits.h)

LONGEST_LINE = 200


class UserError(ValueError):
    """A mistake in arguments, settings or input; its message is the one line that the user reads."""


class SourceTimeout(RuntimeError):
    """A data source has not answered for --data-timeout seconds."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def one_line(error: BaseException, limit: int | None = LONGEST_LINE) -> str:
    """Return type and message of an error as one line; a `UserError` needs no type."""
    text, kind = " ".join(str(error).split())[:limit], type(error).__name__
    if isinstance(error, UserError):
        return text
    return f"{kind}: {text}" if text else kind
