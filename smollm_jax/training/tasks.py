"""Score a run on tasks of lm-evaluation-harness at its evaluations. The first process alone does.

The tasks are loaded before the first step, so that a mistake costs no training. A failure later is told once, and
the run goes on without tasks.
"""

from functools import cache
from typing import Any

from smollm_jax.config.settings import Config
from smollm_jax.distributed.processes import Processes
from smollm_jax.distributed.sharding import on_one_device
from smollm_jax.evaluation.scorer import Scorer
from smollm_jax.evaluation.tasks import Scores, load_tasks, run_tasks, scores_of
from smollm_jax.runtime.errors import one_line, say
from smollm_jax.training.adapters import whole_weights
from smollm_jax.training.run import Run, loaded_generator


class _Stopped(Exception):
    """A stop is requested while tasks are scored."""


def load_run_tasks(config: Config, job: Processes) -> Any:
    """Return the loaded tasks of --eval-tasks, None in other processes. Raises `UserError` in all of them."""
    names = config.run.eval_tasks
    with job.all_or_none():
        if not names or not job.first:
            return None
        say(f"tasks       loading {names}")
        return load_tasks(names)


def score_on_tasks(run: Run) -> Scores:
    """Return the scores of the run on its tasks, by names such as hellaswag/acc_norm. Empty if stopped."""
    if not run.config.run.eval_tasks or run.interrupted:
        return {}
    params = on_one_device(whole_weights(run.config, run.state, run.mesh), run.mesh)
    if run.tasks is None:
        return {}
    from smollm_jax.evaluation.harness import HarnessModel

    def watch(_done: int, _total: int) -> None:
        run.job.watchdog.reset()
        if run.interrupted:
            raise _Stopped

    config, limit = run.config.model, run.config.run.eval_task_limit or None
    try:
        run.scorer = run.scorer or Scorer(config, run.dtype)
        generator = cache(lambda: loaded_generator(run, params))
        model = HarnessModel(
            config, run.tokenizer, scorer=run.scorer, params=params, generator=generator, watch=watch
        )
        return scores_of(run_tasks(run.tasks, model, limit=limit))
    except _Stopped:
        return {}
    except Exception as error:  # of a task's own code, any: nothing optional ends a run
        run.tasks = None
        run.report.say(f"--eval-tasks failed and are left out from here: {one_line(error)}")
        return {}
    finally:
        if run.generator is not None:
            run.generator.unload()  # the next step needs the memory
