"""Run a command's `main`: an error becomes one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

from smollm_jax.runtime.errors import EXIT_FAILED, EXIT_MISTAKE, EXIT_STOPPED, UserError, one_line

OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def say(message: str) -> None:
    """Print a line to stderr; stdout is for results."""
    print(message, file=sys.stderr, flush=True)


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
        say(f"error: {one_line(error, limit=None)}")
        return EXIT_MISTAKE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            say(f"error: {error.filename or 'a file'}: {error.strerror}")
        else:  # a bug of ours
            traceback.print_exception(error)
        return EXIT_FAILED
