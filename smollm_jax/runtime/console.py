"""Run a command's `main`: an error becomes one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

from smollm_jax.runtime.errors import EXIT_FAILED, EXIT_MISTAKE, EXIT_STOPPED, UserError


def say(message: str) -> None:
    """A line to stderr; results alone go to stdout."""
    print(message, file=sys.stderr, flush=True)


OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def guarded(main: Callable[[], int]) -> int:
    """Run `main`; a mistake of the user becomes one line and exit code 2, a fault of ours a traceback."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_STOPPED
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        return explained(error)


def explained(error: Exception) -> int:
    """Say what went wrong; returns the exit code."""
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
    if isinstance(error, UserError):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_MISTAKE
    traceback.print_exception(error)
    return EXIT_FAILED
