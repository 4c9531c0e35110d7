"""Send a run's records to experiment trackers: trackio and Weights & Biases (wandb).

Both have the same functions. RUN/trackers.json keeps the run's id and how far each tracker has come. So a resumed
run continues the same run there, and sends every line once: also lines from before the tracker was asked for. A
tracker that fails is told once and left out. No run waits for a tracker or ends with it.
"""

import contextlib
import secrets
import sys
from collections.abc import Callable, Iterator
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smollm_jax.config.serialization import to_dict
from smollm_jax.config.settings import Config
from smollm_jax.runs.records import read_metrics
from smollm_jax.runtime.background import BackgroundTask
from smollm_jax.runtime.errors import install, one_line, require
from smollm_jax.runtime.files import Damaged, read_json, write_json_atomic

KNOWN = ("tensorboard", "trackio", "wandb")
PROJECT = "smollm-jax"
START_SECONDS, END_SECONDS = 60.0, 30.0  # to connect, and to send the rest
Fields = Callable[[dict[str, Any]], dict[str, Any]]


def trackers_of(config: Config) -> list[str]:
    """Return the names in --report-to. Raises `UserError` for an unknown one, or one that is not installed."""
    names = list(dict.fromkeys(name.strip() for name in config.run.report_to.split(",") if name.strip()))
    for name in names:
        require(name in KNOWN, f"--report-to {name}: expected {', '.join(KNOWN)}, separated by commas")
        has_it = name == "tensorboard" or find_spec(name) is not None
        require(has_it, f"--report-to {name} needs the package {name}: {install(name)}")
    return names


class Tracker:
    """A run in the tracker called `name`. `fields` selects and names what is sent of a line of metrics.jsonl."""

    def __init__(self, name: str, run_dir: Path, config: Config, fields: Fields, tell: Callable[[str], None]):
        self._name, self._fields, self._tell, self._is_over = name, fields, tell, False
        self._path = run_dir / "trackers.json"
        self._about = _read(self._path)
        self._sent: dict[str, int] = self._about.setdefault(name, {})
        self._module: Any = None
        self._run: Any = None
        with self._failure_told():
            if _read(self._path)["id"] != self._about["id"]:  # before another tracker draws an id of its own
                write_json_atomic(self._path, self._about)
            BackgroundTask(lambda: self._open(run_dir, to_dict(config))).result(START_SECONDS)
            for line in read_metrics(run_dir):
                self._send(line)

    def _open(self, run_dir: Path, settings: dict[str, Any]) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._module, about = import_module(self._name), self._about
            name = f"{run_dir.resolve().name}-{about['id']}"
            more: dict[str, Any] = {"embed": False, "private": True}  # of trackio: no public link, no public Space
            if self._name == "wandb":
                # nothing but what the run records: no console, git, packages or figures of the machine
                settings_of_wandb = self._module.Settings(
                    console="off", disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True,
                    x_save_requirements=False, init_timeout=START_SECONDS - 5, login_timeout=1,
                )  # fmt: skip
                name = run_dir.resolve().name
                more = {"id": about["id"], "dir": str(run_dir), "settings": settings_of_wandb}
            self._run = self._module.init(project=PROJECT, name=name, config=settings, resume="allow", **more)
            if self._name == "wandb":  # its own counter would drop a step that comes after a later one
                self._run.define_metric("*", step_metric="step")

    def line(self, line: dict[str, Any]) -> None:
        """Send a line of metrics.jsonl."""
        if not self._is_over:
            with self._failure_told():
                self._send(line)

    def evaluation(self, step: int, samples: list[tuple[str, str]], picture: Path) -> None:
        """Send the samples of an evaluation and the plot of the losses."""
        if self._is_over or step <= self._sent.get("samples", -1):
            return
        with self._failure_told():
            content = {f"samples/{prompt}": self._text(prompt + text) for prompt, text in samples}
            if picture.is_file():
                content["loss plot"] = self._module.Image(str(picture))
            self._log(step, content, "samples")

    def close(self) -> None:
        """Wait a while for the tracker to send what it has."""
        if not self._is_over:
            with self._failure_told():
                BackgroundTask(self._finish).result(END_SECONDS)
        self._is_over = True

    def _finish(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()

    def _send(self, line: dict[str, Any]) -> None:
        kind = "evaluation" if "eval_seconds" in line else "train" if "loss" in line else ""
        kind = kind or f"scores of {line.get('time')}"  # a checkpoint may be scored again, on other tasks
        if line["step"] > self._sent.get(kind, -1):
            self._log(line["step"], self._fields(line), kind)

    def _log(self, step: int, content: dict[str, Any], kind: str) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            if self._name == "wandb":
                self._run.log(content | {"step": step})
            else:
                self._run.log(content, step=step)
        self._sent[kind] = step
        write_json_atomic(self._path, _read(self._path) | {"id": self._about["id"], self._name: self._sent})

    def _text(self, text: str) -> Any:
        if self._name == "wandb":
            return self._module.Html(f"<pre>{escape(text)}</pre>")
        return self._module.Markdown("".join(f"    {line}\n" for line in text.splitlines()))

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # of any kind: nothing optional ends a run
            self._is_over = True
            self._tell(f"{self._name} gets no more of this run ({one_line(error)}); metrics.jsonl has it all")


def _read(path: Path) -> dict[str, Any]:
    """Return what trackers.json holds, with a new id if it holds none."""
    with contextlib.suppress(Damaged, OSError):
        found = read_json(path)
        if isinstance(found, dict) and isinstance(found.get("id"), str):
            return {name: value for name, value in found.items() if name == "id" or isinstance(value, dict)}
    return {"id": secrets.token_hex(4)}
