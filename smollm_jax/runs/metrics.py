"""Record a run: progress lines, metrics.jsonl, TensorBoard, samples.txt and loss.png.

Progress goes to stderr, numbers to files. Every line is flushed, so that a kill loses nothing that was shown.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm
from tqdm.contrib.logging import tqdm_logging_redirect

from smollm_jax.config.preference import FIGURES
from smollm_jax.config.settings import Config
from smollm_jax.runs.plot import draw
from smollm_jax.runs.records import BETWEEN, OF_EMA, OF_TASKS, SAMPLES_OF, scores_in
from smollm_jax.runs.trackers import Tracker, trackers_of
from smollm_jax.runtime.errors import one_line, printable, say
from smollm_jax.runtime.notebook import progress_bar

# the groups in which TensorBoard shows the fields of a line. Other fields are left out
TAGS = {
    "train": ("loss", "step_loss", "z_loss", *FIGURES),
    "eval": ("eval_loss", "eval_bits_per_byte", *OF_EMA, "eval_tokens", *(f"eval_{name}" for name in FIGURES)),
    "optimizer": ("learning_rate", "grad_norm", "bad_steps", "loss_scale", "skipped_steps"),
    "speed": ("tokens_per_second", "step_seconds", "mfu", "eval_seconds", "peak_memory_gib"),
    "data": ("tokens", "data_wait_seconds", "skipped_documents"),
}
TAG_OF = {name: f"{group}/{name.removeprefix('eval_')}" for group, names in TAGS.items() for name in names}


TIMED_STEPS = 3


def tagged(line: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a line of metrics.jsonl by the names that TensorBoard and trackers show."""
    tags = {name: name if name.startswith(OF_TASKS) else TAG_OF.get(name, "") for name in line}
    return {tags[name]: value for name, value in line.items() if tags[name] and value is not None}


class RunMetrics:
    """A writer of a run's records. The run continues at step `start`, and ends at `total` or as `config` says."""

    def __init__(self, run_dir: Path, *, start: int, total: int = 0, config: Config | None = None):
        self.run_dir, self.total = run_dir, config.total_steps if config else total
        self._metrics, self._samples = (LineFile(run_dir / name) for name in ("metrics.jsonl", "samples.txt"))
        names = trackers_of(config) if config else ["tensorboard"]
        self._board = Board(run_dir / "tensorboard", start, is_wanted="tensorboard" in names)
        self._bar: Any = None
        self._shown = contextlib.ExitStack()
        if (bar_class := progress_bar()) is not None:
            bar = tqdm_logging_redirect(
                total=total, initial=start, unit="step", dynamic_ncols=True, tqdm_class=bar_class
            )
            self._bar = self._shown.enter_context(bar)
        self._began, self._start, self._first = time.monotonic(), start, 0.0
        others = [name for name in names if config and name != "tensorboard"]
        self._trackers = [Tracker(name, run_dir, cast(Config, config), tagged, self.say) for name in others]

    def progress(self, step: int) -> None:
        """Count a step. The first few steps predict how long the others will take."""
        done = step - self._start
        if done == 1:
            self._first = time.monotonic()
        if done == TIMED_STEPS + 1 and self.total - step > 10 * TIMED_STEPS:
            left = (time.monotonic() - self._first) / TIMED_STEPS * (self.total - step)
            self.say(f"time        {duration(left)} left, by the first {TIMED_STEPS} steps")
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def train(self, line: dict[str, Any]) -> None:
        self._record(line)
        rate, step, loss = line["tokens_per_second"], line["step"], _number(line["loss"], 4) + _of_pairs(line)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss}, {rate:,.0f} tokens/s")
            return
        left = (time.monotonic() - self._began) / max(step - self._start, 1) * (self.total - step)
        self.say(
            f"step {step:>{len(str(self.total))}}/{self.total}  loss {loss}  lr {line['learning_rate']:.2e}  "
            f"grad norm {_number(line['grad_norm'])}  {rate:,.0f} tokens/s  {tqdm.format_interval(left)} left"
        )

    def evaluation(self, line: dict[str, Any], samples: list[tuple[str, str]]) -> None:
        """Record any held-out loss and the continuations of prompts, and draw loss.png.

        The line in metrics.jsonl comes last: if it is there, the samples are too.
        """
        step = line["step"]
        written = [f"{SAMPLES_OF}{step}"]
        for prompt, text in samples:
            # a margin keeps a sample's own lines from looking like a heading
            written += [f"  {line}" for line in (prompt + BETWEEN + text).splitlines()]
            # an indented block: no sign in it is Markdown's
            shown = "".join(f"    {line}\n" for line in f"{prompt}{BETWEEN}{text}".splitlines())
            self._board.write(step, summary=partial(_summary, "text", f"samples/{prompt}", shown))
        self._samples.write("\n".join(written) + "\n")
        self._record(line)
        if "eval_loss" in line:
            self.say(
                f"step {step}: held-out loss {_number(line['eval_loss'], 4)}{_of_pairs(line, 'eval_')}, "
                f"{_number(line['eval_bits_per_byte'], 4)} bits per byte ({line['eval_tokens']:,} tokens)"
            )
        if "eval_ema_loss" in line:
            loss, bits = (_number(line[name], 4) for name in OF_EMA)
            self.say(f"step {step}: of the moving average {loss}, {bits} bits per byte")
        scores = [f"{name} {value:.4f}" for name, value in scores_in(line).items() if not name.endswith("_stderr")]
        if scores:
            self.say(f"step {step}: {', '.join(scores)}")
        for prompt, text in samples[:1]:
            self.say(f"  {prompt}{BETWEEN}{' '.join(text.split())}")
        draw(self.run_dir, self.run_dir / "loss.png", self.say)
        for tracker in self._trackers:
            tracker.evaluation(step, samples, self.run_dir / "loss.png")

    def say(self, message: str) -> None:
        """Print a line to stderr, above the progress bar if there is one."""
        if self._bar is None:
            say(message)
        else:
            with contextlib.suppress(OSError):  # the terminal is closed
                self._bar.write(printable(message), file=sys.stderr)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
        self._shown.close()
        self._metrics.close()
        self._samples.close()

    def _record(self, line: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        for tag, value in tagged(line).items():
            self._board.write(line["step"], summary=partial(_summary, "scalar", tag, value))
        for tracker in self._trackers:
            tracker.line(line)


class NullMetrics:
    """A stand-in for `RunMetrics` in every process but the first. Ignores every call."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class LineFile:
    """A file that grows by lines. Text that a full disk refuses is kept and written first the next time."""

    def __init__(self, path: Path):
        self._path, self._left, self._is_refused = path, b"", False
        self._file: Any = None
        self.write("")

    def write(self, text: str) -> None:
        self._left += text.encode("utf-8", "replace")
        try:
            if self._file is None:
                self._file = open(self._path, "ab", buffering=0, opener=_at_once)  # noqa: SIM115 - kept open
            while self._left:
                self._left = self._left[self._file.write(self._left) :]
            self._is_refused = False
        except OSError as error:
            if not self._is_refused:
                say(f"{self._path} cannot be written ({one_line(error)}); its lines are kept in memory")
            self._is_refused = True

    def close(self) -> None:
        self.write("")
        if self._file is not None:
            self._file.close()


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)  # a pipe would wait for its reader


class Board:
    """A writer of TensorBoard events in the calling thread. The library's own thread hangs on a full disk."""

    def __init__(self, folder: Path, start: int, *, is_wanted: bool = True):
        self._folder, self._writer, self._is_over = folder, cast(Any, None), not is_wanted
        self.write(start + 1, session_log=self._open)

    def _open(self) -> Any:
        """Open a file of events. Returns the event that makes TensorBoard drop events after `start`."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(self._folder / "events"))
        return SessionLog(status=SessionLog.START)

    def write(self, step: int, **content: Callable[[], Any]) -> None:
        """Write an event. `content` makes a summary or session log."""
        if self._is_over:
            return
        try:
            from tensorboardX.proto.event_pb2 import Event

            made = {name: make() for name, make in content.items()}
            self._writer.write_event(Event(wall_time=time.time(), step=step, **made))
            self._writer.flush()
        except Exception as error:  # of any kind: nothing optional ends a run
            self._is_over = True
            say(f"TensorBoard gets no more of this run ({one_line(error)}); metrics.jsonl has it all")


def _summary(kind: str, name: str, value: Any) -> Any:
    # an installation may be broken: the board says so
    return getattr(import_module("tensorboardX.summary"), kind)(name, value)


def _of_pairs(line: dict[str, Any], prefix: str = "") -> str:
    """Return how often the chosen answer of a pair has the larger reward, and by how much. Empty for texts."""
    share, margin = (line.get(f"{prefix}rewards/{name}") for name in ("accuracies", "margins"))
    return "" if share is None or margin is None else f", chosen preferred {share:.1%} (margin {margin:.3f})"


def duration(seconds: float) -> str:
    """Return a duration as a person would: about 3 minutes, or about 20 days."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:,.0f} {unit}"
    return f"about {max(seconds, 2):.0f} seconds"


def finite_or_none(value: float) -> float | None:
    """Return `value`, or None if it is NaN or infinite, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def _number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
