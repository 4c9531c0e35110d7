"""Facts about a model for its page: size, step, loss curve, data and openings. The run, if any, is the source.

A run that is still training is read again each time, so its curve grows on the page. This file knows no layout.
"""

import base64
import time
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from smollm_jax.config.recipes import QUESTIONS
from smollm_jax.config.settings import Config
from smollm_jax.runs.load import is_run, newest_step, read_run
from smollm_jax.runs.records import evaluations, read_metrics
from smollm_jax.runtime.errors import UserError

OPENINGS = (
    "Photosynthesis is the process by which",
    "Once upon a time, in a small village by the sea,",
    "Chapter 3: The Water Cycle\n\nWater is always on the move.",
    "A step-by-step guide to growing tomatoes at home\n\nStep 1:",
    "The reason why the sky looks blue is",
)
LIVE_SECONDS = 300  # after its last record a run no longer counts as training
MOST_POINTS, WIDTH, HEIGHT = 400, 600, 180
LARGEST_PICTURE = 4_000_000  # bytes of loss.png


@dataclass(frozen=True)
class Facts:
    """Facts about a model. `step` is the checkpoint that is served, `run` is the model's run folder."""

    parameters: int | None = None
    has_chat: bool = False
    run: Path | None = None
    config: Config | None = None
    step: int | None = None
    picture: Path | None = None
    follows: bool = False  # the page takes up new checkpoints of the run

    @property
    def openings(self) -> tuple[str, ...]:
        """Return the run's own prompts, or else prompts for a model of textbooks."""
        return (self.config.run.sample_prompts if self.config else ()) or OPENINGS

    @property
    def questions(self) -> tuple[str, ...]:
        """Return the run's own questions to its chat model, or else questions to any."""
        own = self.config.run.sample_prompts if self.config and self.config.data.is_chat else ()
        return own or QUESTIONS

    def live(self) -> str:
        """Return a line of HTML on the run if it is training now, else nothing."""
        lines = self._lines()
        if not self._is_training(lines):
            return ""
        total, last = self._total(), lines[-1]["step"]
        losses = [line["loss"] for line in lines if line.get("loss") is not None]
        loss = f" · loss {losses[-1]:.3f}" if losses else ""
        serves = f" · the page serves step {self.step:,}" if self.step is not None else ""
        return (
            f'<span class="training">Training</span> step {last:,} of {total:,}{loss}{serves}'
            f'<progress aria-label="Steps done" max="{total}" value="{last}"></progress>'
        )

    def _lines(self) -> list[dict[str, Any]]:
        return _lines_of(self.run, _stamp(self.run)) if self.run else []

    def _total(self) -> int:
        """Return the steps of the run, which may have been extended since the page was built."""
        try:
            return read_run(self.run or "").total_steps
        except UserError:  # an imported model, or a file that is being written
            return self.config.total_steps if self.config else 0

    def _is_training(self, lines: list[dict[str, Any]]) -> bool:
        if not self.follows or self.config is None or self.run is None or not lines:
            return False
        is_new = time.time() - _stamp(self.run)[1] / 1e9 < LIVE_SECONDS
        return is_new and lines[-1]["step"] < self._total()

    def html(self) -> str:
        """Return table and loss curve as HTML. Reads the run's metrics again if they changed."""
        lines = self._lines()
        rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in self._rows(lines))
        return f"<dl>{rows}</dl>{curve(lines) or self._picture()}"

    def _rows(self, lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
        kind = (
            "answers in a conversation, and completes text" if self.has_chat else "completes text; does not chat"
        )
        rows = [("Kind", kind)]
        if self.parameters is not None:
            rows.append(("Parameters", f"{self.parameters:,}"))
        if self.config is None or not lines:  # an imported model has not seen the data in its settings
            return rows
        total, last = self._total(), lines[-1]
        if self.step is not None:
            rows.append(("Checkpoint", f"step {self.step:,} of {total:,}"))
        if self.step is not None and last.get("step", 0) > self.step:
            after = "the page takes up each new checkpoint" if self.follows else "RUN as PATH serves its newest"
            rows.append(("Run", f"is at step {last['step']:,}; {after}"))
        known = [line for line in evaluations(lines) if self.step is None or line["step"] <= self.step]
        if known:
            found = known[-1]
            value = f"{found['eval_bits_per_byte']:.3f} bits per byte, loss {found['eval_loss']:.3f}"
            rows.append(("Held-out", f"{value} (step {found['step']:,})"))
        return [*rows, ("Data", self.config.data.data)]

    def _picture(self) -> str:
        if self.picture is None or self.picture.stat().st_size > LARGEST_PICTURE:
            return ""
        data = base64.b64encode(self.picture.read_bytes()).decode()
        return f'<img alt="Loss over the steps of the run" src="data:image/png;base64,{data}">'


def _stamp(run: Path) -> tuple[int, int]:
    """Return size and modification time of a run's records, which change if the records do."""
    try:
        about = (run / "metrics.jsonl").stat()
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns


@lru_cache(maxsize=1)  # every open page polls
def _lines_of(run: Path, stamp: tuple[int, int]) -> list[dict[str, Any]]:  # noqa: ARG001 - a key of the cache
    return read_metrics(run)


def read_facts(path: str, parameters: int | None, *, has_chat: bool, step: int | None = None) -> Facts:
    """Return the facts about the run, export, other folder or Hub id `path`, and the `step` that is served."""
    folder = Path(path).expanduser()
    picture = folder / "loss.png" if (folder / "loss.png").is_file() else None
    # an export is a folder inside its run
    run = next((one for one in (folder, folder.absolute().parent) if is_run(one)), None)
    if run is None or (run != folder and folder.name not in ("export", "export-ema")):
        return Facts(parameters, has_chat, picture=picture)
    try:
        return Facts(
            parameters,
            has_chat,
            run,
            read_run(run),
            newest_step(run) if step is None else step,
            picture,
            run == folder,
        )
    except UserError:  # the model could be opened without these facts
        return Facts(parameters, has_chat, picture=picture)


def curve(lines: list[dict[str, Any]]) -> str:
    """Return the losses as an SVG in the page's own colours. The SVG is empty for fewer than two points."""
    train = [(x["step"], x["loss"]) for x in lines if x.get("loss") is not None]
    held_out = [(x["step"], x["eval_loss"]) for x in evaluations(lines)]
    if len(train) < 2:
        return ""
    train = train[:: -(-len(train) // MOST_POINTS)] + train[-1:]
    losses = [loss for _, loss in train + held_out]
    low, high, end = min(losses), max(losses), train[-1][0]

    def line(points: list[tuple[int, float]], name: str) -> str:
        scale = HEIGHT / ((high - low) or 1.0)
        spots = " ".join(f"{x / end * WIDTH:.1f},{(high - y) * scale:.1f}" for x, y in points)
        return f'<polyline class="{name}" points="{spots}" vector-effect="non-scaling-stroke"/>'

    lines_drawn = line(train, "train") + line(held_out, "held-out")
    legend = '<span class="train">training</span> <span class="held-out">held out</span>'
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" preserveAspectRatio="none" '
        f'aria-label="Loss from {train[0][1]:.2f} to {train[-1][1]:.2f} over {end:,} steps">{lines_drawn}</svg>'
        f"<figcaption>{legend} <span>loss {high:.2f} to {low:.2f}, step 0 to {end:,}</span></figcaption></figure>"
    )
