"""Parse a command line into a `Config`, and report a mistake in one line.

The recipe and the preset are parsed first, because they are the defaults that `--help` shows. tyro builds the
flags from the dataclasses, one group per dataclass; its error boxes are folded into a single line.
"""

import argparse
import contextlib
import functools
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import tyro

from smollm_jax.config.architecture import MODELS
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.settings import Config
from smollm_jax.runtime.errors import UserError, require, say

Command = Callable[..., int]
FLAG = re.compile(r"--(?:no-)?([A-Za-z][\w-]*)(?:=.*)?", re.DOTALL)
SEVERAL = {"data": "A,B", "eval-data": "A,B", "sample-prompts": "A B", "stop": "A B"}  # flags of several values


def parse(argv: list[str], *, prog: str = "train_jax.py") -> Config:
    """Return the `Config` of `argv`; raises `UserError` on a mistake and `SystemExit(0)` after `--help`."""
    given, others = take_flags(argv, prog, recipe={"default": "replica"}, preset={})
    _report_repeats(others)
    require(given.recipe in RECIPES, f"--recipe {given.recipe}: expected one of {', '.join(RECIPES)}")
    default = RECIPES[given.recipe]
    if given.preset is not None:
        require(given.preset in MODELS, f"--preset {given.preset}: expected one of {', '.join(MODELS)}")
        model = MODELS[given.preset]
        data = replace(default.data, seq_len=min(default.data.seq_len, model.max_seq_len))
        default = replace(default, preset=given.preset, model=model, data=data)
    about = "Pre-train a SmolLM2-class model; the same command again resumes."
    flat = (tyro.conf.OmitArgPrefixes,)
    with _mistake_in_one_line(prog):
        return tyro.cli(Config, args=argv, prog=prog, description=about, default=default, config=flat)


def take_flags(argv: list[str], prog: str, **flags: dict[str, Any]) -> tuple[argparse.Namespace, list[str]]:
    """Return the values of some flags, described as for argparse, and the other arguments; raises `UserError`."""
    _report_repeats(
        [word for word in argv if (found := FLAG.fullmatch(word)) and found[1].replace("-", "_") in flags]
    )
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, description in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **description)
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see {prog} --help") from None


def parse_command(
    commands: tuple[Command, ...] | Command, argv: list[str], prog: str, *, description: str | None = None
) -> Callable[[], int]:
    """Return the command of `argv` with its arguments, ready to be called; raises like `parse`.

    The flags, types and help come from the command's signature and docstring.
    """
    _report_repeats(argv)
    with _mistake_in_one_line(prog):
        if callable(commands):
            return tyro.cli(_deferred(commands), args=argv, prog=prog)
        named = {command.__name__.removesuffix("_"): _deferred(command) for command in commands}
        return tyro.extras.subcommand_cli_from_dict(named, args=argv, prog=prog, description=description)


def _report_repeats(argv: list[str]) -> None:
    """Log a flag given twice, because the last one counts; raises `UserError` if both may be meant."""
    before = argv[: argv.index("--")] if "--" in argv else argv
    given = Counter(found[1].replace("_", "-") for word in before if (found := FLAG.fullmatch(word)))
    for name, count in given.items():
        values = SEVERAL.get(name)
        require(count == 1 or not values, f"--{name} is given {count} times; give it once: --{name} {values}")
        if count > 1:
            say(f"--{name} is given {count} times; the last one counts")


def _deferred(command: Command) -> Callable[..., Callable[[], int]]:
    """Return a function that only fills in arguments: tyro calls it while its output is captured."""

    @functools.wraps(command)
    def fill_in(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    return fill_in


@contextlib.contextmanager
def _mistake_in_one_line(prog: str) -> Iterator[None]:
    """Raise `UserError` with the message in tyro's first error box, instead of printing the boxes and exiting."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            yield
    except SystemExit as stop:
        if stop.code == 0:
            raise
        first_box = output.getvalue().partition("For full helptext")[0].splitlines()
        text = [line.strip("│─ ") for line in first_box if not line.startswith(("╭", "╰"))]
        words = re.sub(r"^Error parsing \S+: ", "", " ".join(filter(None, text)))
        raise UserError(f"{words or 'the arguments could not be read'}; see {prog} --help") from None
