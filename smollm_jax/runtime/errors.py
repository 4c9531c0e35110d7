"""Handle errors of user, data source and machine, one line each, and exit codes."""

import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

EXIT_FAILED = 1
EXIT_MISTAKE = 2
EXIT_STOPPED = 75  # stopped on request with everything saved: run me again (EX_TEMPFAIL of sysexits.h)

OF_THE_MACHINE = {  # a disk, a file system, a permission or a limit
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EBUSY,
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOLCK,
}  # fmt: skip
LONGEST_LINE = 200
REPEAT_SECONDS = 0.05  # until a signal that a callback has swallowed is sent again
RUST_ERRNO = re.compile(r"(?:os error |Os \{ code: )(\d+)")
# files of libraries that fail on variables of the environment, and the variables that they read
READS = {
    "/jax/_src/config.py": "JAX_.*",
    "/jax/_src/xla_bridge.py": "JAX_PLATFORMS|JAX_PLATFORM_NAME|(CUDA|ROCR|HIP)_VISIBLE_DEVICES",
    "/httpx": "(?i:(all|https?)_proxy)|SSL_CERT_FILE|SSL_CERT_DIR",
    "/huggingface_hub/constants.py": "HF_.*|HUGGING.*",
    "/matplotlib/": "MPL.*|MATPLOTLIBRC",
    "/gradio/": "GRADIO_.*",
    "/torch/__init__.py": "TORCH_.*|PYTORCH_.*|LD_LIBRARY_PATH",
    "/tempfile.py": "TMPDIR|TEMP|TMP",
}
# variables of JAX: set for another program, they would end a run or change its results
NOT_FOLLOWED = (
    "JAX_ENABLE_X64", "JAX_DEFAULT_DTYPE_BITS", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION",
    "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE",
)  # fmt: skip
ESCAPED = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"}


class UserError(ValueError):
    """A mistake in arguments, settings or input. Its message is the one line that the user reads."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it, and shows nothing else
        return [f"UserError: {one_line(self)}"]


class SourceTimeout(RuntimeError):
    """A data source has not answered for --data-timeout seconds."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def install(extra: str) -> str:
    """Return the command that installs an extra of the package. A checkout is installed from its folder."""
    is_checkout = Path(__file__).parents[2].joinpath("constraints.txt").is_file()
    return (
        f"pip install -c constraints.txt -e '.[{extra}]'" if is_checkout else f"pip install 'smollm-jax[{extra}]'"
    )


def one_line(error: BaseException) -> str:
    """Return an error's type and message as one line. A `UserError` needs no type, and is never cut.

    Characters that a terminal would obey, for example in the name of a file, are escaped.
    """
    text, kind = " ".join(str(error).split()), type(error).__name__
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if isinstance(error, UserError):
        return text
    return f"{kind}: {text[:LONGEST_LINE]}" if text else kind


def printable(text: str) -> str:
    """Escape a text's control characters, which could move a terminal's cursor or forge its lines."""
    return text.translate(ESCAPED)


def say(message: str) -> None:
    """Print a line to stderr, as stdout is for results. No run ends because nobody reads stderr."""
    with contextlib.suppress(OSError, ValueError):  # the terminal is closed, or the log's disk full
        print(printable(message), file=sys.stderr, flush=True)


@cache
def say_once(message: str) -> None:
    """Print a line to stderr unless this process has printed it before."""
    say(message)


def open_streams() -> None:
    """Make stdout and stderr take every text, and replace a closed one.

    A file that opens with the number of a closed stream would receive what libraries print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale may know less than Unicode


def run_main(main: Callable[[], int]) -> int:
    """Run `main` and return its exit code. An exception is explained on stderr and becomes an exit code."""
    open_streams()
    watch_unraisable()
    for name in filter(os.environ.__contains__, NOT_FOLLOWED):  # JAX, imported later, reads them
        say(f"{name}={os.environ.pop(name)} of the environment is not followed: it would change the results")
    try:
        code = main()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_STOPPED
    except BrokenPipeError:  # the reader of our output has closed it, such as `head`
        _drop_output()
        return EXIT_FAILED
    except UserError as error:
        say(f"error: {one_line(error)}")
        return EXIT_MISTAKE
    except Exception as error:
        return _explain(error)


def watch_unraisable() -> None:
    """Handle two errors of callbacks, which no code can catch. Other errors go to the hook of before.

    A Ctrl-C or SIGTERM inside one, such as JAX's at a garbage collection, is sent again. After a failed save,
    tensorstore's threads report each other array to orbax's event loop, which has ended: not shown.
    """
    before = sys.unraisablehook
    if before.__module__ == __name__:
        return

    def handle(error: "sys.UnraisableHookArgs") -> None:
        if error.exc_type is KeyboardInterrupt:
            again = threading.Timer(REPEAT_SECONDS, _interrupt_main)  # this function is such a callback too
            again.daemon = True
            again.start()
        elif not (error.exc_type is RuntimeError and str(error.exc_value) == "Event loop is closed"):
            before(error)

    sys.unraisablehook = handle


def _interrupt_main() -> None:
    """Send the main thread a signal that is handled: a shell's background commands ignore SIGINT."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if callable(signal.getsignal(number)):
            return signal.pthread_kill(threading.main_thread().ident or 0, number)


def _explain(error: Exception) -> int:
    """Print an exception, in one line unless it is a bug of ours. Returns the exit code."""
    if variables := of_environment(error):
        say(f"error: {one_line(error)}; check {variables} in the environment")
        return EXIT_MISTAKE
    if isinstance(error, MemoryError):
        say(f"error: out of memory: {error}".rstrip(": "))
    elif refused := of_machine(error):
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""  # a print has no file's name
        unnamed = "stdout" if "print(" in line or "stdout" in line else "a file"
        say(f"error: {one_line(UserError(refused.filename or unnamed))}: {refused.strerror}")
        _drop_output()
    else:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    return EXIT_FAILED


def _drop_output() -> None:
    """Let the interpreter's last flush of stdout succeed."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def of_machine(error: BaseException) -> OSError | None:
    """Return the error as the refusal of a disk or a permission. None if it is of another kind.

    Libraries written in Rust give the number of the operating system's error in their message.
    """
    if isinstance(error, OSError):
        return error if error.errno in OF_THE_MACHINE else None
    found = RUST_ERRNO.search(str(error))
    number = int(found[1]) if found else 0
    return OSError(number, os.strerror(number)) if number in OF_THE_MACHINE else None


def of_environment(error: BaseException) -> str:
    """Return the variables, with values, that made a library fail. Empty if none is known to."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = max((i for i, file in enumerate(files) if f"{os.sep}smollm_jax{os.sep}" in file), default=-1)
    beyond, text = files[ours + 1 :], str(error)
    words = set(re.findall("[a-z]+", text.lower())) - {"jax", "all"}
    for part, names in READS.items():
        if any(part in file for file in beyond):
            found = {name: value for name, value in os.environ.items() if value and re.fullmatch(names, name)}
            said = {n: v for n, v in found.items() if _names(text, v) or set(n.lower().split("_")) & words}
            # errors of a proxy or certificate may name neither. For others, only named variables are to blame
            blamed = said or (found if part == "/httpx" else {})
            return ", ".join(f"{name}={_hidden(value)}" for name, value in sorted(blamed.items()))
    return ""


def _names(text: str, value: str) -> bool:
    """Return whether a text names a value, as a whole word. Values such as 1 do not count."""
    return len(value) > 1 and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


def _hidden(value: str) -> str:
    """Return a value for a log, without the password of a URL."""
    return re.sub(r"//[^/@]*@", "//***@", value)[:LONGEST_LINE]
