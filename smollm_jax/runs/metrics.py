"""Record a run: progress lines, metrics.jsonl, TensorBoard, samples.txt and loss.png.

Progress goes to stderr, numbers to files. Every line is flushed, so that a kill loses nothing that was shown.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm
from tqdm.contrib.logging import tqdm_logging_redirect

from smollm_jax.runtime.errors import one_line, say
from smollm_jax.runtime.files import read_whole, written_aside

SAMPLES_OF = "=== step "


class RunMetrics:
    """Writes the records of a run that continues at step `start` and ends at step `total`."""

    def __init__(self, run_dir: Path, *, start: int, total: int):
        self.run_dir, self.total = run_dir, total
        self._metrics, self._samples = (LineFile(run_dir / name) for name in ("metrics.jsonl", "samples.txt"))
        self._board = Board(run_dir / "tensorboard", start)
        self._bar: Any = None
        self._shown = contextlib.ExitStack()
        if sys.stderr.isatty():
            bar = tqdm_logging_redirect(total=total, initial=start, unit="step", dynamic_ncols=True)
            self._bar = self._shown.enter_context(bar)
        self._began, self._start = time.monotonic(), start

    def progress(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def train(self, line: dict[str, Any]) -> None:
        self._record(line)
        rate, step, loss = line["tokens_per_second"], line["step"], _number(line["loss"], 4)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss}, {rate:,.0f} tokens/s")
            return
        left = (time.monotonic() - self._began) / max(step - self._start, 1) * (self.total - step)
        self.say(
            f"step {step:>{len(str(self.total))}}/{self.total}  loss {loss}  lr {line['learning_rate']:.2e}  "
            f"grad norm {_number(line['grad_norm'])}  {rate:,.0f} tokens/s  {tqdm.format_interval(left)} left"
        )

    def evaluation(self, line: dict[str, Any], samples: list[tuple[str, str]]) -> None:
        """Record a held-out loss and the continuations of prompts, and draw loss.png.

        The line in metrics.jsonl comes last: if it is there, the samples are too.
        """
        from tensorboardX.summary import text as text_summary

        step = line["step"]
        written = [f"{SAMPLES_OF}{step}"]
        for prompt, text in samples:
            # a margin keeps a sample's own lines from looking like a heading
            written += [f"  {line}" for line in (prompt + "⟶" + text).splitlines()]
            self._board.write(step, summary=partial(text_summary, f"samples/{prompt}", f"{prompt}**{text}**"))
        self._samples.write("\n".join(written) + "\n")
        self._record(line)
        self.say(
            f"step {step}: held-out loss {_number(line['eval_loss'], 4)}, "
            f"{_number(line['eval_bits_per_byte'], 4)} bits per byte ({line['eval_tokens']:,} tokens)"
        )
        for prompt, text in samples[:1]:
            self.say(f"  {prompt}⟶{' '.join(text.split())}")
        draw(self.run_dir, self.run_dir / "loss.png", self.say)

    def say(self, message: str) -> None:
        """Print a line to stderr, above the progress bar if there is one."""
        if self._bar is None:
            say(message)
        else:
            with contextlib.suppress(OSError):  # the terminal is closed
                self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        self._shown.close()
        self._metrics.close()
        self._samples.close()

    def _record(self, line: dict[str, Any]) -> None:
        from tensorboardX.summary import scalar

        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self._board.write(line["step"], summary=partial(scalar, name, value))


class NullMetrics:
    """Takes the place of `RunMetrics` in every process but the first, and ignores every call."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class LineFile:
    """A file that grows by lines; text that a full disk refuses is kept and written first the next time."""

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
                say(f"{self._path} cannot be written ({error.strerror}); its lines are kept in memory")
            self._is_refused = True

    def close(self) -> None:
        self.write("")
        if self._file is not None:
            self._file.close()


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)  # a pipe would wait for its reader


class Board:
    """Writes TensorBoard events in the calling thread: the library's writer thread hangs on a full disk."""

    def __init__(self, folder: Path, start: int):
        self._folder, self._writer, self._is_over = folder, cast(Any, None), False
        self.write(start + 1, session_log=self._open)

    def _open(self) -> Any:
        """Open a file of events; returns the event that makes TensorBoard drop what was written after `start`."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(self._folder / "events"))
        return SessionLog(status=SessionLog.START)

    def write(self, step: int, **content: Callable[[], Any]) -> None:
        """Write an event; `content` makes a summary or session log."""
        from tensorboardX.proto.event_pb2 import Event

        if self._is_over:
            return
        try:
            made = {name: make() for name, make in content.items()}
            self._writer.write_event(Event(wall_time=time.time(), step=step, **made))
            self._writer.flush()
        except Exception as error:  # of any kind: nothing optional ends a run
            self._is_over = True
            say(f"TensorBoard gets no more of this run ({one_line(error)}); metrics.jsonl has it all")


def finite_or_none(value: float) -> float | None:
    """Return `value`, or None if it is NaN or infinite, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without damaged ones, such as one that a kill cut short."""
    return [values for line in _lines(run_dir / "metrics.jsonl") if (values := _whole(line)) is not None]


def evaluations(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of evaluations whose results are finite."""
    return [x for x in lines if None not in (x.get("eval_loss"), x.get("eval_bits_per_byte"))]


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file, whatever bytes are in it; none if it is no file."""
    text = read_whole(path).decode("utf-8", "replace") if path.is_file() else ""
    return text.removesuffix("\n").split("\n") if text else []


def _whole(line: str) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, None if it is not as a run writes it."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not _is_number(values.get("step"), int) or values["step"] < 0:
        return None
    losses = [values.get(name) for name in ("loss", "eval_loss", "eval_bits_per_byte")]  # null if not finite
    return values if all(loss is None or _is_number(loss, int | float) for loss in losses) else None


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf


def draw(run_dir: Path, picture: Path, tell: Callable[[str], None] = say) -> bool:
    """Draw the losses of a run as `picture`; returns whether it is there. A failure is only a line for `tell`."""
    try:
        return plot(run_dir, picture)
    except Exception as error:  # of matplotlib, its fonts or its settings: any
        tell(f"{picture} could not be drawn: {one_line(error)}")
        return False


def plot(run_dir: Path, picture: Path) -> bool:
    """Draw training loss, its running mean and the held-out loss; returns False if there is no loss yet."""
    given = os.environ.pop("MPLBACKEND", None)  # a notebook's may name what is not installed here
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of caches that it cannot keep
    from matplotlib.figure import Figure

    if given is not None:
        os.environ["MPLBACKEND"] = given

    lines = read_metrics(run_dir)
    train = [(x["step"], x["loss"]) for x in lines if x.get("loss") is not None]
    held_out = evaluations(lines)
    if not train:
        return False
    figure = Figure(figsize=(8, 4.5), dpi=130)
    axes = figure.subplots()
    steps, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color="#9db4d0", linewidth=0.8, label="training")
    axes.plot(steps, _running_mean(losses), color="#1f4e8c", linewidth=1.6, label="training, running mean")
    if held_out:
        points, last, orange = [(x["step"], x["eval_loss"]) for x in held_out], held_out[-1], "#c8502d"
        axes.plot(*zip(*points, strict=True), "o-", color=orange, markersize=4, linewidth=1.2, label="held out")
        axes.annotate(
            f"{last['eval_loss']:.3f} nats a token\n{last['eval_bits_per_byte']:.3f} bits a byte", points[-1],
            xytext=(-6, 14), textcoords="offset points", ha="right", va="bottom", fontsize=9, color=orange,
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.set_title(run_dir.resolve().name, parse_math=False)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    with written_aside(picture) as part:
        figure.savefig(part, format="png")
    return True


def _running_mean(values: tuple[float, ...]) -> list[float]:
    """Return an exponential mean with bias correction over about a twentieth of the curve."""
    keep = 1 - 1 / max(len(values) / 20, 1)
    sums, weights = (accumulate(x, lambda old, new: keep * old + new) for x in (values, [1.0] * len(values)))
    return [total / weight for total, weight in zip(sums, weights, strict=True)]


def _number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def keep_records(run_dir: Path, step: int) -> tuple[int, dict[int, str]]:
    """Cut metrics.jsonl and samples.txt back to `step`, because the run repeats every later step.

    Returns the last step whose evaluation is kept, and the batch hash of every step that was on record, also of
    later ones: a repeated step must agree.
    """
    metrics, samples = run_dir / "metrics.jsonl", run_dir / "samples.txt"
    lines = read_metrics(run_dir)
    kept = [values for values in lines if values["step"] <= step]
    evaluated = max((values["step"] for values in kept if "eval_loss" in values), default=0)

    def is_kept(line: str) -> bool:
        number = line.removeprefix(SAMPLES_OF)
        return number == line or (number.isdecimal() and int(number) <= evaluated)

    if metrics.is_file():
        _rewrite(metrics, map(json.dumps, kept))
    if samples.is_file():
        _rewrite(samples, takewhile(is_kept, _lines(samples)))
    return evaluated, {values["step"]: values["ledger"] for values in lines if "ledger" in values}


def _rewrite(path: Path, lines: Iterable[str]) -> None:
    with written_aside(path) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
