"""Define the command evaluate: a model's scores on text, or on tasks of lm-evaluation-harness."""

import inspect
import json
from typing import Annotated, Any, Literal

import tyro

from smollm_jax.cli.arguments import check_model
from smollm_jax.config.settings import DataConfig
from smollm_jax.runtime.errors import require

Positional = Annotated[str, tyro.conf.Positional]
OF_BOTH, OF_TASKS = ("path", "dtype"), ("tasks", "limit", "num_fewshot", "apply_chat_template", "output")


def evaluate(
    path: Positional,
    *,
    data: str | None = None,
    tasks: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    output: str | None = None,
    data_kind: Literal["text", "chat"] = "text",
    loss_on: Literal["assistant", "all"] = "assistant",
    text_column: str = DataConfig.text_column,
    split: str = DataConfig.split,
    seq_len: int | None = None,
    batch_size: int = 8,
    max_batches: int | None = None,
    on_bad_data: Literal["stop", "skip"] = "stop",
    dtype: Literal["float32", "bfloat16"] = "float32",
    special_tokens: Literal["text", "parse"] | None = None,
) -> int:
    """Score a model on text (--data) or on tasks of lm-evaluation-harness (--tasks). A JSON line comes last.

    For example: smollm evaluate runs/quickstart --data texts.jsonl, or --tasks smollm2 --limit 100

    Args:
        path: Run, exported folder, GGUF file or Hub id.
        data: Any source that train_jax.py reads. Gives loss, perplexity and bits per byte.
        tasks: Names of lm_eval, the suite smollm2, or YAML files, separated by commas. Needs the extra eval.
        limit: Maximum number of documents per task.
        num_fewshot: Examples before each question. Default: as the task says, mostly 0.
        apply_chat_template: Put the questions of tasks through the model's chat template.
        output: Folder for results_TIME.json of the tasks. Default: RUN/scores; of other models scores/NAME.
        data_kind: text, or chat for conversations, which go through the model's chat template.
        loss_on: What counts of a conversation.
        text_column: Column that holds the text.
        split: Split of a Hub dataset.
        seq_len: Tokens per sequence. Default: the run's own, else 2,048 or the model's context if shorter.
        batch_size: Sequences per batch.
        max_batches: Maximum number of batches. Default: all the data.
        on_bad_data: What to do with a row that cannot be read: stop, or skip it with a line.
        dtype: Compute dtype.
        special_tokens: Special tokens that a text spells out. text: they stay text; parse: they become ids, as in
            transformers. Default: as the run was trained, else text. Tasks always parse them.
    """
    given = dict(locals())
    require((data is None) != (tasks is None), "give --data SOURCE or --tasks NAMES, and not both")
    check_model(path)
    for name, parameter in inspect.signature(evaluate).parameters.items():
        fits = name in OF_BOTH or (name in OF_TASKS) == (tasks is not None) or given[name] == parameter.default
        require(fits, f"--{name.replace('_', '-')} belongs to {'--data' if tasks else '--tasks'}")
    result = _on_text(**given) if tasks is None else _on_tasks(**given)
    print(json.dumps(result))
    return 0


def _on_text(  # noqa: PLR0917
    path: str, data: str, seq_len: int | None, batch_size: int, max_batches: int | None, dtype: str,
    special_tokens: Any, data_kind: Any, loss_on: Any, text_column: str, split: str, on_bad_data: Any, **_: Any,
) -> dict[str, Any]:  # fmt: skip
    from smollm_jax.runs.places import check_data

    check_data(data)
    from smollm_jax.training.evaluation import evaluate_model

    settings = DataConfig(
        data=data, data_kind=data_kind, loss_on=loss_on, text_column=text_column, split=split,
        on_bad_data=on_bad_data,
    )  # fmt: skip
    return evaluate_model(
        path, settings, seq_len=seq_len, batch_size=batch_size, max_batches=max_batches, dtype=dtype,
        special_tokens=special_tokens,
    )  # fmt: skip


def _on_tasks(  # noqa: PLR0917
    path: str, tasks: str, limit: int | None, num_fewshot: int | None, apply_chat_template: bool,
    output: str | None, dtype: str, **_: Any,
) -> dict[str, Any]:  # fmt: skip
    from smollm_jax.evaluation.report import evaluate_tasks

    table, scores = evaluate_tasks(
        path, tasks, dtype=dtype, limit=limit, num_fewshot=num_fewshot, chat=apply_chat_template, output=output
    )
    print(table)
    return scores
