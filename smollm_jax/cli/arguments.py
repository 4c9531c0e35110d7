"""Parse a command line into a `Config` or a command. Reports a mistake in one line.

The defaults that `--help` shows come first: of a recipe and a preset, a file, or a run folder. The flags are built
from the dataclasses by tyro, one group per dataclass. The error boxes of tyro are folded into a single line.
"""

import argparse
import contextlib
import functools
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, make_dataclass
from difflib import get_close_matches
from typing import Any

import tyro

from smollm_jax.config.defaults import default_settings, with_own_context
from smollm_jax.config.settings import Config
from smollm_jax.runtime.errors import UserError, require, say

Command = Callable[..., int]
FLAG = re.compile(r"--(?:no-)?([A-Za-z][\w-]*)(?:=.*)?", re.DOTALL)
SEVERAL = {"data": "A,B", "eval-data": "A,B", "sample-prompts": "A B", "stop": "A B"}  # flags of several values
# how other trainers spell a flag: Hugging Face's, nanoGPT's, LitGPT's
SPELLINGS = {
    "--steps": "max-steps max-iters total-steps",
    "--epochs with --steps": "num-train-epochs",
    "--batch-size": "per-device-train-batch-size micro-batch-size train-batch-size",
    "--grad-accum": "gradient-accumulation-steps",
    "--seq-len": "block-size max-seq-length max-length context-length sequence-length",
    "--num-layers": "n-layer num-hidden-layers",
    "--num-heads": "n-head num-attention-heads",
    "--num-kv-heads": "num-key-value-heads n-kv-head",
    "--hidden-size": "n-embd d-model",
    "--learning-rate": "lr max-lr",
    "--final-learning-rate": "min-lr",
    "--schedule": "lr-scheduler-type lr-schedule",
    "--warmup-steps": "warmup-iters lr-warmup-steps",
    "--clip-norm": "max-grad-norm grad-clip gradient-clip-val",
    "--beta1": "adam-beta1",
    "--beta2": "adam-beta2",
    "--epsilon": "adam-epsilon",
    "--run-dir": "output-dir out-dir save-dir",
    "--new-run": "overwrite-output-dir",
    "--checkpoint-every": "save-steps save-interval",
    "--keep-last": "save-total-limit",
    "--eval-every": "eval-steps eval-interval",
    "--log-every": "logging-steps log-interval",
    "--init-from": "model-name-or-path model init-checkpoint-dir",
    "--resume RUN": "resume-from-checkpoint",
    "--data": "dataset dataset-name train-file data-path",
    "--tokenizer": "tokenizer-name tokenizer-path",
    "--dtype bfloat16": "bf16 precision",
    "--dtype float16": "fp16",
    "--remat full": "gradient-checkpointing",
    "--attention": "attn-implementation",
    "--max-new-tokens": "max-tokens length",
}
ELSEWHERE = {name: ours for ours, names in SPELLINGS.items() for name in names.split()}
ABOUT = "Pre-train a SmolLM2-class model; the same command again resumes."
FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
CLOSE = 0.75  # similarity of two spellings from which on one may be a typo of the other


@dataclass(frozen=True, kw_only=True)
class Start:
    """The source of the defaults of all other flags."""

    config: str | None = None
    """YAML or JSON file of some or all settings, such as a run's config.json."""
    resume: str | None = None
    """Run folder to continue, under its own settings. Flags may change free settings."""


def parse(argv: list[str], *, prog: str = "train_jax.py", about: str = ABOUT, own: Any = None) -> Any:
    """Return the `Config` of `argv`, or (own, config) for a dataclass `own` of further flags.

    The values of `own` are the defaults. Raises `UserError` on a mistake and `SystemExit(0)` after `--help`.
    """
    start, others = take_flags(argv, prog, recipe={}, preset={}, config={}, resume={})
    _report_repeats(others)
    groups = {"start": Start(), "train": _default(start)}
    if own is not None:
        groups = {"own": own} | groups
    arguments: Any = make_dataclass("Arguments", [(name, type(value)) for name, value in groups.items()])
    with _mistake_in_one_line(prog):
        parsed = tyro.cli(
            arguments, args=others, prog=prog, description=about, default=arguments(**groups), config=FLAT
        )
    given = {found[1].replace("-", "_") for word in others if (found := FLAG.fullmatch(word))}
    config = with_own_context(parsed.train, given)
    return config if own is None else (parsed.own, config)


def _default(start: argparse.Namespace) -> Config:
    return default_settings(recipe=start.recipe, preset=start.preset, file=start.config, resume=start.resume)


def check_model(path: str) -> None:
    """Raise `UserError`, before anything heavy is imported, unless `path` is a folder or reads like a Hub id."""
    from smollm_jax.hf.reader import check_place

    check_place(path)


def take_flags(argv: list[str], prog: str, **flags: dict[str, Any]) -> tuple[argparse.Namespace, list[str]]:
    """Return the values of some flags, described as for argparse, and other arguments. Raises `UserError`."""
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


def parse_command(command: Command, argv: list[str], prog: str) -> Callable[[], int]:
    """Return the command with its arguments, ready to be called. Raises as `parse` does.

    The flags, types and help come from its signature and docstring.
    """
    _report_repeats(argv)
    with _mistake_in_one_line(prog):
        return tyro.cli(_deferred(command), args=argv, prog=prog, config=FLAT)


def parse_part(command: Callable[..., Any], argv: list[str], prog: str) -> tuple[Any, list[str]]:
    """Return what the command returns for its own arguments, and the other arguments. Raises as `parse` does."""
    with _mistake_in_one_line(prog):
        call, others = tyro.cli(_deferred(command), args=argv, prog=prog, config=FLAT, return_unknown_args=True)
    _report_repeats([word for word in argv if word not in others])
    return call(), others


def _report_repeats(argv: list[str]) -> None:
    """Log a flag given twice, because the last one counts. Raises `UserError` if both may be meant."""
    before = argv[: argv.index("--")] if "--" in argv else argv
    given = Counter(found[1].replace("_", "-") for word in before if (found := FLAG.fullmatch(word)))
    for name, count in given.items():
        values = SEVERAL.get(name)
        require(count == 1 or not values, f"--{name} is given {count} times; give it once: --{name} {values}")
        if count > 1:
            say(f"--{name} is given {count} times; the last one counts")


def _deferred(command: Command) -> Callable[..., Callable[[], int]]:
    """Return a function that only fills in arguments: tyro calls it while output is captured."""

    @functools.wraps(command)
    def fill_in(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    return fill_in


@contextlib.contextmanager
def _mistake_in_one_line(prog: str) -> Iterator[None]:
    """Raise `UserError` with the text of tyro's first error box. Prints no box and does not exit."""
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
        raise UserError(f"{_plainly(words) or 'the arguments could not be read'}; see {prog} --help") from None


def _plainly(words: str) -> str:
    """Shorten an error of tyro's. Names the flag that may be meant by an unknown one."""
    if found := re.search(
        r"no type matching (\S+) could be instantiated from \['(.*?)'\].*helptext: (\S+)", words
    ):
        return f"{found[3]} {found[2]}: expected {found[1].removeprefix('{None}|')}"
    if found := re.match(r"Missing from .*?: (.*?)\(required\)", words):
        return f"{found[1].split()[0]} is missing"
    unknown = re.match(r"Unrecognized options: ([^,\s]+)", words)
    if unknown is None:
        return words
    flag = FLAG.fullmatch(unknown[1])
    if flag is None:
        return f"{unknown[1]!r} is one argument too many; a value follows its flag, as in --prompt TEXT"
    listed = re.findall(r"--([a-z][\w-]*)", words.partition("Perhaps you meant:")[2])
    meant = ELSEWHERE.get(flag[1].replace("_", "-")) or next(
        (f"--{x}" for x in get_close_matches(flag[1], listed, 1, CLOSE)), None
    )
    return f"--{flag[1]} is no flag here" + (f"; did you mean {meant}?" if meant else "")
