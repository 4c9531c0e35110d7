"""Find the tasks of lm-evaluation-harness, run them, and read their results.

A task is a name of lm_eval's, one of the suite `smollm2`, or a YAML file. lm_eval is an extra. So it is imported
inside functions, after a check.
"""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from smollm_jax.runtime.errors import UserError, install, one_line, require, say
from smollm_jax.runtime.retry import be_quiet

SUITE = Path(__file__).with_name("smollm2")
FEWSHOT_SEED = 1234  # of lm_eval's own command line
BOOTSTRAP = 1_000  # resamples for the standard errors that have no formula. lm_eval's 100,000 take minutes

Scores = dict[str, float]


def require_harness() -> None:
    """Raise `UserError` unless lm_eval can be imported."""
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise UserError(f"--tasks and --eval-tasks need lm_eval: {install('eval')} ({one_line(error)})") from None


def load_tasks(names: str, num_fewshot: int | None = None) -> Any:
    """Return the tasks of comma-separated names or YAML files, with their data, as `run_tasks` takes them.

    `num_fewshot` is set for tasks that do not fix it at 0. Raises `UserError` for an unknown name, or data that
    cannot be read.
    """
    require_harness()
    given = [name.strip() for name in names.split(",") if name.strip()]
    require(bool(given), f"tasks {names!r}: expected names of lm_eval or YAML files, separated by commas")
    require(num_fewshot is None or num_fewshot >= 0, f"--num-fewshot {num_fewshot} must be 0 or more")
    files = [name for name in given if name.endswith((".yaml", ".yml"))]
    for file in files:
        require(Path(file).is_file(), f"there is no task file {file}")
    be_quiet()
    with _aside():
        manager = _manager([name for name in given if name not in files])
        try:
            tasks = manager.load(given)
        except Exception as error:  # of datasets, the Hub or a task's own code: any
            raise UserError(f"tasks {names} could not be loaded: {one_line(error)}") from None
    zero_shot = [name for name, task in tasks["tasks"].items() if task.get_config("num_fewshot") == 0]
    if zero_shot and num_fewshot:
        say(f"--num-fewshot {num_fewshot} changes nothing for {', '.join(zero_shot)}: these fix 0")
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None or (num_fewshot is not None and task.get_config("num_fewshot")):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return tasks


def _manager(names: Sequence[str]) -> Any:
    """Return an index of tasks that knows the names. Raises `UserError` for an unknown one.

    The index of all of lm_eval's 14,000 tasks takes seconds. A task in a folder of about its name needs none.
    """
    import lm_eval.tasks

    folders = [path for path in Path(lm_eval.tasks.__file__).parent.iterdir() if path.is_dir()]
    near = [path for path in folders if any(f"{name}_".startswith(f"{path.name}_") for name in names)]
    manager = lm_eval.tasks.TaskManager(include_path=[SUITE, *near], include_defaults=False)
    suite = {path.stem for path in SUITE.glob("*.yaml")}
    if all(name in manager.all_subtasks or name in suite for name in names):
        return manager
    manager = lm_eval.tasks.TaskManager(include_path=[SUITE])
    for name in names:
        close = get_close_matches(name, manager.all_tasks, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        require(name in manager.task_index, f"lm_eval has no task {name!r}{hint}")
    return manager


def run_tasks(tasks: Any, model: Any, *, limit: int | None = None, chat: bool = False) -> dict[str, Any]:
    """Return lm_eval's results of a `HarnessModel` on loaded tasks. The same few-shot examples every time.

    `limit` is the number of documents per task. `chat` applies the chat template, few-shot examples as turns.
    """
    import lm_eval.api.task
    import lm_eval.evaluator

    # a bar for each task, while questions are put together, is one too many
    lm_eval.api.task.tqdm = lambda documents, **_: documents  # type: ignore[attr-defined]
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with _aside():
        results: Any = lm_eval.evaluator.evaluate(
            lm=model, task_dict=tasks, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False,
            apply_chat_template=chat, fewshot_as_multiturn=chat,
        )  # fmt: skip
    return dict(results)


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Keep what lm_eval prints out of stdout, which is for results, and its notes out of the log."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm_eval would fork a process full of JAX's threads
    with contextlib.redirect_stdout(sys.stderr):
        yield


def scores_of(results: dict[str, Any]) -> Scores:
    """Return the figures of lm_eval's results by names such as arc_easy/acc and arc_easy/acc_stderr."""
    found = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, variant = key.partition(",")
            if comma and isinstance(value, int | float) and math.isfinite(value):  # a mean of nothing is NaN
                found[f"{task}/{metric}" + ("" if variant == "none" else f",{variant}")] = float(value)
    return found
