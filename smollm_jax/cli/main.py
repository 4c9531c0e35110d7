"""Run the console command `smollm COMMAND`, which is also `python -m smollm_jax COMMAND`."""

import inspect
import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from smollm_jax import __version__
from smollm_jax.cli import commands
from smollm_jax.cli.anneal import anneal
from smollm_jax.cli.arguments import ABOUT, Command, parse, parse_command
from smollm_jax.cli.average import average
from smollm_jax.cli.chat import chat
from smollm_jax.cli.evaluate import evaluate
from smollm_jax.cli.generate import generate
from smollm_jax.cli.serve import serve
from smollm_jax.runtime.devices import has_accelerator, quiet_libtpu
from smollm_jax.runtime.errors import EXIT_STOPPED, UserError, run_main, say
from smollm_jax.runtime.signals import StopRequest, leave

SIMPLE: tuple[Command, ...] = (
    serve, chat, generate, evaluate, commands.export, commands.import_, commands.push,
    commands.checkpoints, commands.batch, average,
)  # fmt: skip
# these take the flags of train too, beside their own
LIKE_TRAIN: tuple[Callable[[list[str], str], int], ...] = (anneal, commands.verify_resume, commands.plan)


def console() -> None:
    """Run the command line and exit with the code of its command."""
    prog = "smollm" if Path(sys.argv[0]).stem == "smollm" else "python -m smollm_jax"
    name, *argv = sys.argv[1:] or ["--help"]
    if name == "train":
        train(argv, f"{prog} train")
    run_and_leave(lambda: command(name, argv, prog))


def run_and_leave(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with its code. SIGTERM and SIGHUP clean up as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one of them
            signal.signal(number, signal.default_int_handler)
    if not has_accelerator():
        quiet_libtpu()
    try:
        code = run_main(main)
    except KeyboardInterrupt:  # a second signal, while the first was reported
        code = EXIT_STOPPED
    leave(code)


def train(argv: list[str], prog: str) -> None:
    """Train as `argv` says and exit. Codes: 0 finished, 75 stopped and saved, 2 a mistake, 1 anything else."""

    def main(stop: StopRequest) -> int:
        config = parse(argv, prog=prog)
        from smollm_jax.distributed.launch import may_be_several
        from smollm_jax.runs.places import check_places

        if not may_be_several(config.compute):  # a job's processes have to learn of a mistake together, in fit
            check_places(config)
        say(f"smollm-jax  {__version__}, loading JAX")
        if not has_accelerator():
            quiet_libtpu()
        from smollm_jax.training.fit import fit  # JAX only now: --help and mistakes answer at once

        return fit(config, stop)

    with StopRequest() as request:
        leave(run_main(lambda: main(request)))


def command(name: str, argv: list[str], prog: str) -> int:
    """Run the command `name`. Raises `UserError` if there is none."""
    if name in ("-h", "--help", "help"):
        print(overview(prog))
        return 0
    if name == "--version":
        print(__version__)
        return 0
    for simple in SIMPLE:
        if name == _name(simple):
            return parse_command(simple, argv, f"{prog} {name}")()
    for like_train in LIKE_TRAIN:
        if name == _name(like_train):
            return like_train(argv, f"{prog} {name}")
    names = ["train", *map(_name, (*SIMPLE, *LIKE_TRAIN))]
    close = get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(names)}"
    raise UserError(f"{prog} has no command {name!r}; {hint}")


def overview(prog: str) -> str:
    """Return a line for each command."""
    about = {"train": ABOUT} | {
        _name(one): str(inspect.getdoc(one)).split("\n")[0] for one in (*SIMPLE, *LIKE_TRAIN)
    }
    lines = [f"  {name:<14} {text}" for name, text in about.items()]
    return "\n".join([f"usage: {prog} COMMAND ...", "", *lines, "", f"{prog} COMMAND --help has its flags."])


def _name(function: Callable[..., int]) -> str:
    return function.__name__.strip("_").replace("_", "-")
