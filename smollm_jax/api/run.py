"""A training run as an object: its folder, its metrics, its loss curve, its models."""

from pathlib import Path
from typing import Any

from smollm_jax.api.model import Model, load
from smollm_jax.config.settings import Config
from smollm_jax.runs.load import read_run
from smollm_jax.runs.plot import plot
from smollm_jax.runs.records import read_metrics
from smollm_jax.runtime.errors import UserError, one_line, require
from smollm_jax.runtime.files import expand_home


class Picture:
    """A PNG file that a notebook shows."""

    def __init__(self, path: Path):
        self.path = path

    def __repr__(self) -> str:
        return f"Picture({str(self.path)!r})"

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


class Run:
    """The run in `folder`, of this session or an earlier one; raises `UserError` if it is none.

    `stopped` says whether `train` was interrupted: the same call goes on.
    """

    def __init__(self, folder: str | Path, *, stopped: bool = False):
        self.folder, self.stopped = expand_home(folder), stopped
        read_run(self.folder)  # raises; a run that was stopped early has no checkpoint yet

    @property
    def config(self) -> Config:
        """Every setting of the run."""
        return read_run(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: of steps with "loss", of evaluations with "eval_loss"."""
        return read_metrics(self.folder)

    @property
    def step(self) -> int:
        """The last step on record."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run has made all of its steps."""
        return self.step >= self.config.total_steps

    @property
    def export(self) -> Path | None:
        """The Hugging Face folder that a finished run has written; None before."""
        folder = self.folder / "export"
        return folder if folder.is_dir() else None

    def plot(self, path: str | Path | None = None) -> Picture:
        """Draw the losses as a PNG, by default RUN/loss.png; a notebook shows the result."""
        picture = self.folder / "loss.png" if path is None else Path(path)
        try:
            is_drawn = plot(self.folder, picture)
        except OSError as error:
            raise UserError(f"{picture} cannot be written: {one_line(error)}") from None
        require(is_drawn, f"{self.folder} has no loss on record yet")
        return Picture(picture)

    def load(self, step: int | None = None, **options: Any) -> Model:
        """Open checkpoint `step`, by default the newest good one; further keywords as of `smollm_jax.load`."""
        return load(self.folder, step=step, **options)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        state = "stopped" if self.stopped else "finished" if self.finished else "not finished"
        losses = [line["loss"] for line in self.metrics if line.get("loss") is not None]
        loss = f", loss {losses[-1]:.4f}" if losses else ""
        return f"Run({str(self.folder)!r}: {state} at step {self.step:,} of {self.config.total_steps:,}{loss})"
