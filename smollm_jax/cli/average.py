"""Define the command average: one model from the weights of several, scored beside them."""

from typing import Annotated

import tyro

from smollm_jax.cli.arguments import check_model
from smollm_jax.runtime.errors import EXIT_FAILED, require, say


def average(
    paths: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    out: str,
    last: int | None = None,
    weights: tuple[float, ...] = (),
    slerp: float | None = None,
    data: str | None = None,
    verify: bool = True,
) -> int:
    """Average the weights of checkpoints or models, and score them and the result on the same held-out rows.

    For example: smollm average runs/mine --last 3 --out my-average

    Args:
        paths: One run with --last, or several of: a run, RUN/checkpoints/STEP, an exported folder, a Hub id.
        out: Hugging Face folder to write.
        last: Number of the run's newest checkpoints.
        weights: Weight of each path in the mean. Default: equal ones.
        slerp: Of two paths, the point between them on the great circle: 0 is the first, 1 the second.
        data: Text to score on. Default: the held-out documents of the first run among the paths.
        verify: Compare what was written with the average, and remove it if they differ.
    """
    require(bool(paths), "give a run with --last, or the paths to average")
    require((last is None) == (len(paths) > 1), "give one run with --last K, or several paths without it")
    require(last is None or last > 1, f"--last {last} must be at least 2")
    count = last or len(paths)
    require(len(weights) in (0, count), f"--weights: {len(weights)} for {count} models; give one for each")
    require(all(0 < weight < float("inf") for weight in weights), "--weights must be above 0")
    two = "--slerp is the point between two models, without --weights"
    require(slerp is None or (count == 2 and not weights), two)
    require(slerp is None or 0 <= slerp <= 1, f"--slerp {slerp} must be in [0, 1]")
    for path in paths:
        check_model(path)
    from smollm_jax.runs.average import averaged, check_out, newest, write_average
    from smollm_jax.runs.places import check_data

    check_out(out, paths)
    if data is not None:
        check_data(data)
    names = list(paths) if last is None else newest(paths[0], last)
    how = f"slerp {slerp:g}" if slerp is not None else "mean in float64"
    how += f", weights {' '.join(f'{weight:g}' for weight in weights)}" if weights else ""
    say(f"average     {how}, of {', '.join(names)}; loading JAX")
    from smollm_jax.training.held_out_rows import HeldOutRows

    held = HeldOutRows(names, data)
    model, params, tokenizer = averaged(names, weights or [1.0] * count, held.score, slerp=slerp)
    held.score("the average", model, params, tokenizer)
    rows = {"Averaged from": ", ".join(names), "Average": how} | held.rows_of("the average")
    try:
        checked = write_average(model, params, tokenizer, out, rows=rows, verify=verify)
    except RuntimeError as error:
        say(f"error: the export was rolled back: {error}")
        return EXIT_FAILED
    say(checked)
    if held.scores:
        print(held.table())
    print(out)
    return 0
