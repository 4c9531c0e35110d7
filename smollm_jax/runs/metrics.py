"""Record a run: progress lines, metrics.jsonl, TensorBoard, samples.txt and loss.png.

Progress goes to stderr, numbers to files. Every line is flushed, so that a kill loses nothing that was shown.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm_jax.runtime.console import say
from smollm_jax.runtime.files import written_aside

SAMPLES_OF = "=== step "
OURS = logging.getLogger("smollm_jax")


class RunMetrics:
    """Writes the records of a run that continues at step `start` and ends at step `total`."""

    def __init__(self, run_dir: Path, *, start: int, total: int):
        from tqdm import tqdm

        self.run_dir, self.total = run_dir, total
        self._metrics, self._samples = (LineFile(run_dir / name) for name in ("metrics.jsonl", "samples.txt"))
        self._board = Board(run_dir / "tensorboard", start)
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if on_terminal else None
        self._handler = LinesAroundBar(self._bar)
        if self._bar is not None:
            OURS.addHandler(self._handler)
        self._began, self._start = time.monotonic(), start

    def progress(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def train(self, line: dict[str, Any]) -> None:
        self._record(line)
        rate, step = line["tokens_per_second"], line["step"]
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss}, {rate:,.0f} tokens/s")
            return
        left = (time.monotonic() - self._began) / max(step - self._start, 1) * (self.total - step)
        self.say(
            f"step {step:>{len(str(self.total))}}/{self.total}  loss {loss}  lr {line['learning_rate']:.2e}  "
            f"grad norm {_number(line['grad_norm'])}  {rate:,.0f} tokens/s  {_duration(left)} left"
        )

    def evaluation(self, line: dict[str, Any], samples: list[tuple[str, str]]) -> None:
        """Record a held-out loss and the continuations of prompts, and draw loss.png.

        The line in metrics.jsonl comes last: if it is there, the samples are too.
        """
        step = line["step"]
        written = [f"{SAMPLES_OF}{step}"]
        for prompt, text in samples:
            # a margin keeps a sample's own lines from looking like a heading
            written += [f"  {line}" for line in (prompt + "⟶" + text).splitlines()]
            self._board.text(f"samples/{prompt}", prompt + "**" + text + "**", step)
        self._samples.write("\n".join(written) + "\n")
        self._record(line)
        self.say(
            f"step {step}: held-out loss {_number(line['eval_loss'], 4)}, "
            f"{_number(line['eval_bits_per_byte'], 4)} bits per byte ({line['eval_tokens']:,} tokens)"
        )
        if samples:
            prompt, text = samples[0]
            self.say(f"  {prompt}⟶{' '.join(text.split())}")
        try:
            plot(self.run_dir)
        except OSError as error:
            self.say(f"loss.png could not be drawn: {error.strerror}")

    def say(self, message: str) -> None:
        """Print a line to stderr, above the progress bar if there is one."""
        if self._bar is None:
            say(message)
        else:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        OURS.removeHandler(self._handler)
        if self._bar is not None:
            self._bar.close()
        for file in (self._metrics, self._samples):
            file.close()

    def _record(self, line: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self._board.scalar(name, value, line["step"])


class LinesAroundBar(logging.Handler):
    """Writes log messages to stderr above a progress bar."""

    def __init__(self, bar: Any):
        super().__init__()
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        self._bar.write(self.format(record), file=sys.stderr)


class NullMetrics:
    """Takes the place of `RunMetrics` in every process but the first, and ignores every call."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class LineFile:
    """A file that grows by lines; text that a full disk refuses is kept and written first the next time."""

    def __init__(self, path: Path):
        self._file, self._left = path.open("ab", buffering=0), b""

    def write(self, text: str) -> None:
        refused_before = bool(self._left)
        self._left += text.encode()
        try:
            while self._left:
                self._left = self._left[self._file.write(self._left) :]
        except OSError as error:
            if not refused_before:
                say(f"{self._file.name} cannot be written ({error.strerror}); its lines are kept in memory")

    def close(self) -> None:
        self.write("")
        self._file.close()


class Board:
    """Writes TensorBoard events in the calling thread: the library's writer thread hangs on a full disk."""

    def __init__(self, folder: Path, start: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        self._writer: Any = EventsWriter(str(folder / "events"))
        # TensorBoard drops what an earlier process wrote after the checkpoint
        self._write(Event(wall_time=time.time(), step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, name: str, value: float, step: int) -> None:
        from tensorboardX.summary import scalar

        self._summary(scalar(name, value), step)

    def text(self, name: str, value: str, step: int) -> None:
        from tensorboardX.summary import text

        self._summary(text(name, value), step)

    def _summary(self, summary: Any, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            self._writer = None
            say(f"TensorBoard gets no more of this run ({error.strerror}); metrics.jsonl has it all")


def finite_or_none(value: float) -> float | None:
    """Return `value`, or None if it is NaN or infinite, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without one that a kill cut short."""
    return [values for _, values in _lines(run_dir / "metrics.jsonl")]


def plot(run_dir: Path) -> Path | None:
    """Draw loss.png from metrics.jsonl: training loss, its running mean, and the held-out loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(run_dir)
    train = [(x["step"], x["loss"]) for x in lines if x.get("loss") is not None]
    held_out = [
        (x["step"], x["eval_loss"], x["eval_bits_per_byte"]) for x in lines if x.get("eval_loss") is not None
    ]
    if not train:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=130)
    steps, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color="#9db4d0", linewidth=0.8, label="training")
    axes.plot(steps, _running_mean(losses), color="#1f4e8c", linewidth=1.6, label="training, running mean")
    if held_out:
        axes.plot(
            [x[0] for x in held_out], [x[1] for x in held_out], "o-", color="#c8502d", markersize=4,
            linewidth=1.2, label="held out",
        )  # fmt: skip
        step, loss, bits = held_out[-1]
        axes.annotate(
            f"{loss:.3f} nats a token\n{bits:.3f} bits a byte", (step, loss), xytext=(-6, 14),
            textcoords="offset points", ha="right", va="bottom", fontsize=9, color="#c8502d",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=run_dir.resolve().name)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    with written_aside(run_dir / "loss.png") as part:
        figure.savefig(part, format="png")
    plt.close(figure)
    return run_dir / "loss.png"


def _running_mean(values: tuple[float, ...]) -> list[float]:
    """Return an exponential mean with bias correction over about a twentieth of the curve."""
    keep = 1 - 1 / max(len(values) / 20, 1)
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def _number(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@dataclass(frozen=True)
class Records:
    """What is on record of a run after its files were cut back to a checkpoint."""

    evaluated: int
    """Last step whose evaluation is on record."""
    ledgers: dict[int, str]
    """Batch hash of every step on record, also of steps after the checkpoint: a repeated step must agree."""


def keep_records(run_dir: Path, step: int) -> Records:
    """Cut metrics.jsonl and samples.txt back to `step`, because the run repeats every later step."""
    metrics, samples = run_dir / "metrics.jsonl", run_dir / "samples.txt"
    lines = _lines(metrics)
    ledgers = {values["step"]: values["ledger"] for _, values in lines if "ledger" in values}
    kept = [(line, values) for line, values in lines if values["step"] <= step]
    evaluated = max((values["step"] for _, values in kept if "eval_loss" in values), default=0)
    if metrics.exists():
        _rewrite(metrics, [line for line, _ in kept])
    if samples.exists():
        texts = []
        for line in samples.read_text(encoding="utf-8").splitlines():
            if line.startswith(SAMPLES_OF):
                number = line.removeprefix(SAMPLES_OF)
                if not number.isdecimal() or int(number) > evaluated:
                    break
            texts.append(line)
        _rewrite(samples, texts)
    return Records(evaluated, ledgers)


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the lines of metrics.jsonl as text and values, without a line that a kill cut short."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            if isinstance(values["step"], int):
                lines.append((line, values))
    return lines


def _rewrite(path: Path, lines: list[str]) -> None:
    with written_aside(path) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
