"""Errors of the user, of a data source and of the machine, one line for each, and the exit codes of commands."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

EXIT_FAILED = 1
EXIT_MISTAKE = 2
EXIT_STOPPED = 75  # stopped on request with everything saved: run me again (EX_TEMPFAIL of sysexits.h)

OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
LONGEST_LINE = 200
ESCAPED = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"}


class UserError(ValueError):
    """A mistake in arguments, settings or input; its message is the one line that the user reads."""


class SourceTimeout(RuntimeError):
    """A data source has not answered for --data-timeout seconds."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def one_line(error: BaseException) -> str:
    """Return type and message of an error as one line; a `UserError` needs no type, and is never cut."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, UserError):
        return text
    return f"{kind}: {text[:LONGEST_LINE]}" if text else kind


def printable(text: str) -> str:
    """Escape the control characters of a text, which could move a terminal's cursor or forge its lines."""
    return text.translate(ESCAPED)


def say(message: str) -> None:
    """Print a line to stderr; stdout is for results."""
    print(printable(message), file=sys.stderr, flush=True)


def run_main(main: Callable[[], int]) -> int:
    """Run `main` and return its exit code; an exception is explained on stderr and becomes an exit code."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_STOPPED
    except BrokenPipeError:  # the reader of our output has closed it, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except UserError as error:
        say(f"error: {one_line(error)}")
        return EXIT_MISTAKE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            say(f"error: {error.filename or 'a file'}: {error.strerror}")
        else:  # a bug of ours
            traceback.print_exception(error)
        return EXIT_FAILED
