"""Score a model of any kind on tasks: run, print, and keep the results."""

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from smollm_jax import __version__
from smollm_jax.config.settings import ComputeConfig
from smollm_jax.evaluation.published import beside_published
from smollm_jax.evaluation.tasks import load_tasks, run_tasks, scores_of
from smollm_jax.generation.generator import Generator
from smollm_jax.model.transformer import SmolLM
from smollm_jax.runs.load import is_run, load_model, newest_step
from smollm_jax.runs.records import record_scores
from smollm_jax.runtime.devices import use_compilation_cache
from smollm_jax.runtime.errors import UserError, one_line, require, say
from smollm_jax.runtime.files import expand_home, named_failure, write_json_atomic
from smollm_jax.runtime.notebook import progress_bar

TELL_SECONDS = 30.0  # between lines about the progress, where no bar can be seen


def evaluate_tasks(
    path: str,
    names: str,
    *,
    dtype: str,
    limit: int | None,
    num_fewshot: int | None,
    chat: bool,
    output: str | None,
) -> tuple[str, dict[str, Any]]:
    """Score a run, exported folder, GGUF file or Hub id on tasks. Returns tables, and the scores as plain values.

    lm_eval's results go to a file results_TIME.json in `output`, by default RUN/scores or ./scores/NAME. The
    scores of a run also go to its metrics.jsonl, from which an export's card takes them. Raises `UserError`.
    """
    require(limit is None or limit > 0, f"--limit {limit} must be at least 1")
    tasks = load_tasks(names, num_fewshot)  # before gigabytes are read
    from smollm_jax.evaluation.harness import HarnessModel
    from smollm_jax.evaluation.scorer import Scorer

    run = expand_home(path) if is_run(path) else None
    step = None if run is None else newest_step(run)
    folder = (
        expand_home(output) if output else run / "scores" if run else Path("scores") / Path(path).resolve().name
    )
    with named_failure(folder):
        folder.mkdir(parents=True, exist_ok=True)  # before hours of work
    config, params, tokenizer = load_model(path, step)
    require(
        not chat or bool(tokenizer.chat_template),
        f"{path} has no chat template, which --apply-chat-template needs",
    )
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        use_compilation_cache(ComputeConfig().compilation_cache_dir)
    params = jax.tree.map(jnp.asarray, params)
    generator = cache(lambda: Generator(SmolLM.from_params(config, params, dtype=dtype)))
    began = time.time()
    with Watch() as watch:
        scorer = Scorer(config, jnp.dtype(dtype))
        model = HarnessModel(config, tokenizer, scorer=scorer, params=params, generator=generator, watch=watch)
        with _mistake_of_a_task(names):
            results = run_tasks(tasks, model, limit=limit, chat=chat)
    scores, seconds = scores_of(results), time.time() - began
    about = {
        "path": path, "step": step, "tasks": names, "limit": limit, "num_fewshot": results.get("n-shot"),
        "apply_chat_template": chat, "dtype": dtype, "seconds": seconds,
    }  # fmt: skip
    versions = {"smollm_jax": __version__, "lm_eval": version("lm_eval")}
    stamp = time.strftime("%Y-%m-%dT%H-%M-%S", time.localtime(began))
    file = folder / f"results_{stamp}.json"
    write_json_atomic(file, plain(results | {"config": about, "versions_of_code": versions, "date": began}))
    say(f"results are in {file}")
    if run is not None and step is not None:
        record_scores(run, step, scores, limit, num_fewshot)
    return tables(results, scores), about | {"scores": scores}


@contextlib.contextmanager
def _mistake_of_a_task(names: str) -> Iterator[None]:
    """Raise a `UserError` for an error of lm_eval or of a task's own code, outside of our model."""
    try:
        yield
    except Exception as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, UserError) or any(file.endswith("evaluation/harness.py") for file in files):
            raise
        raise UserError(f"tasks {names} failed in lm_eval: {one_line(error)}") from None


def tables(results: dict[str, Any], scores: dict[str, float]) -> str:
    """Return lm_eval's own tables with standard errors, and the suite's scores beside the published ones."""
    from lm_eval.utils import make_table

    found = [make_table(results)]
    found += [make_table(results, "groups")] if results.get("groups") else []
    return "\n\n".join(filter(None, [*(table.strip() for table in found), beside_published(scores)]))


def plain(results: dict[str, Any]) -> Any:
    """Return lm_eval's results as values that JSON can hold."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(results, default=handle_non_serializable))


class Watch:
    """A progress bar over requests, or a line now and then. Called with the number of requests done and of all."""

    def __init__(self, tell: Callable[[str], None] = say):
        self._tell, self._bar = tell, progress_bar()
        self._shown: Any = None
        self._last = self._began = time.monotonic()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._shown is not None:
            self._shown.close()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._bar is not None:
            if self._shown is None or self._shown.total != total:
                self.__exit__()
                self._shown = self._bar(total=total, unit="request", dynamic_ncols=True)
            self._shown.update(done - self._shown.n)
        elif now - self._last > TELL_SECONDS:
            self._last = now
            self._tell(f"{done:,} of {total:,} requests after {now - self._began:.0f} s")
