"""Draw loss.png: the losses of a run over its steps."""

import logging
import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from smollm_jax.runs.records import evaluations, read_metrics, scores_in
from smollm_jax.runtime.errors import one_line, say
from smollm_jax.runtime.files import written_aside


def draw(run_dir: Path, picture: Path, tell: Callable[[str], None] = say) -> bool:
    """Draw the losses of a run as `picture`. Returns whether it is there. Passes a failure to `tell` as a line."""
    try:
        return plot(run_dir, picture)
    except Exception as error:  # of matplotlib, its fonts or its settings: any
        tell(f"{picture} could not be drawn: {one_line(error)}")
        return False


def plot(run_dir: Path, picture: Path) -> bool:
    """Draw training loss, its running mean and the held-out loss. Returns False if there is no loss yet."""
    given = os.environ.pop("MPLBACKEND", None)  # a notebook's setting may name what is not installed here
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of caches that it cannot keep
    from matplotlib.figure import Figure

    if given is not None:
        os.environ["MPLBACKEND"] = given

    lines = read_metrics(run_dir)
    train = [(x["step"], x["loss"]) for x in lines if x.get("loss") is not None]
    held_out, unit = evaluations(lines), "a pair" if any("pairs" in x for x in lines) else "nats a token"
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
            f"{last['eval_loss']:.3f} {unit}\n{last['eval_bits_per_byte']:.3f} bits a byte", points[-1],
            xytext=(-6, 14), textcoords="offset points", ha="right", va="bottom", fontsize=9, color=orange,
        )  # fmt: skip
    averaged = [(x["step"], x["eval_ema_loss"]) for x in held_out if x.get("eval_ema_loss") is not None]
    if averaged:
        axes.plot(
            *zip(*averaged, strict=True), "--", color="#c8502d", linewidth=1.0, label="held out, moving average"
        )
    curves = [*axes.get_legend_handles_labels()[0], *_plot_scores(axes, lines)]
    axes.set(xlabel="step", ylabel=f"loss ({unit})")
    axes.set_title(run_dir.resolve().name, parse_math=False)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=curves, frameon=False)
    figure.tight_layout()
    with written_aside(picture) as part:
        figure.savefig(part, format="png")
    return True


def _plot_scores(axes: Any, lines: list[dict[str, Any]]) -> list[Any]:
    """Plot the scores on tasks, one for each task, on an axis of their own at the right. Returns the curves."""
    points = [(line["step"], name, value) for line in lines for name, value in scores_in(line).items()]
    names = {name for _, name, _ in points if not name.endswith("_stderr")}
    # of several figures, acc_norm says most: it does not depend on the length of an answer
    chosen = {name.partition("/")[0]: name for name in sorted(names, key=lambda name: ("acc_norm" in name, name))}
    if not chosen:
        return []
    right, curves = axes.twinx(), []
    for i, name in enumerate(chosen.values()):
        own = sorted((step, value) for step, other, value in points if other == name)
        curves += right.plot(*zip(*own, strict=True), "--", marker=".", linewidth=1, color=f"C{i + 2}", label=name)
    right.set_ylabel("score on tasks")
    right.spines["top"].set_visible(False)
    return curves


def _running_mean(values: tuple[float, ...]) -> list[float]:
    """Return an exponential mean with bias correction over about a twentieth of the curve."""
    keep = 1 - 1 / max(len(values) / 20, 1)
    sums, weights = (accumulate(x, lambda old, new: keep * old + new) for x in (values, [1.0] * len(values)))
    return [total / weight for total, weight in zip(sums, weights, strict=True)]
