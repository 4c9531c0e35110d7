"""Draw a run's losses beside n-gram models of the same tokens: `python -m benchmarks.picture runs/quickstart`.

All curves are bits per byte. The held-out points and the n-grams have the same targets. The training loss is
converted with the bytes per token of the held-out text, so its level is approximate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from matplotlib.figure import Figure

from benchmarks.harness.tables import Row, as_command, finish
from benchmarks.ngram import score
from smollm_jax.runs.load import read_run
from smollm_jax.runs.records import evaluations, read_metrics
from smollm_jax.runtime.errors import require
from smollm_jax.runtime.files import written_aside
from smollm_jax.tokenizer.load import load_tokenizer

NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}
ORANGE, BLUE, GREY = "#c8502d", "#1f4e8c", "#6b6b6b"


def picture(
    run: Annotated[str, tyro.conf.Positional],
    *,
    out: Path = Path("docs/images/quickstart.png"),
    orders: tuple[int, ...] = (1, 2, 4),
) -> int:
    """Draw a run's losses beside n-gram models of the same tokens.

    Args:
        run: Run folder that has evaluations.
        out: PNG to write.
        orders: Lengths of n-grams.
    """
    folder = Path(run)
    config = read_run(folder)
    lines = read_metrics(folder)
    held_out = evaluations(lines)
    require(bool(held_out), f"{run} has no evaluation; train with --eval-every")
    bits_per_nat = held_out[-1]["eval_bits_per_byte"] / held_out[-1]["eval_loss"]
    training = [(x["step"], x["loss"] * bits_per_nat) for x in lines if x.get("loss") is not None]
    grams, _ = score(config.data, load_tokenizer(str(folder / "tokenizer")), orders)
    points = [(x["step"], x["eval_bits_per_byte"]) for x in held_out]
    draw(out, training, points, dict(zip(orders, grams, strict=True)))
    rows: list[Row] = [{"model": row["model"], "bits per byte": row["bits per byte"]} for row in grams]
    rows += [{"model": f"step {step:,}", "bits per byte": bits} for step, bits in points]
    finish(f"held-out text of {folder.resolve().name}", rows, picture=str(out))
    return 0


def draw(
    out: Path, training: list[tuple[int, float]], points: list[tuple[int, float]], grams: dict[int, Row]
) -> None:
    """Draw the losses of the run as curves, the n-grams as lines across."""
    figure = Figure(figsize=(8, 3.8), dpi=150)
    axes = figure.subplots()
    last, own = points[-1]
    for order, row in grams.items():
        bits = row["bits per byte"]
        axes.axhline(bits, color=GREY, linewidth=0.9, linestyle="--")
        axes.annotate(
            f"{NAMES.get(order, f'{order}-gram')} {bits:.2f}", (last, bits), xytext=(6, _apart(bits, own)),
            textcoords="offset points", va="center", fontsize=9, color=GREY, annotation_clip=False,
        )  # fmt: skip
    axes.plot(*zip(*training, strict=True), color=BLUE, linewidth=1.2, alpha=0.6, label="training")
    axes.plot(
        *zip(*points, strict=True),
        "o-",
        color=ORANGE,
        linewidth=1.6,
        markersize=5,
        clip_on=False,
        label="held out",
    )
    axes.annotate(
        f"this model {own:.2f}", points[-1], xytext=(6, -2), textcoords="offset points", va="center",
        fontsize=9, fontweight="bold", color=ORANGE, annotation_clip=False,
    )  # fmt: skip
    axes.set(xlabel="step", ylabel="bits per byte", xlim=(0, last), ylim=(None, training[0][1]))
    axes.grid(alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.subplots_adjust(right=0.84)
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out) as part:
        figure.savefig(part, format="png", metadata={"Software": None})


def _apart(bits: float, own: float) -> int:
    """Return how far, in points, a label moves from the line at `bits` so as not to cover the model's own."""
    near = abs(bits - own) < 0.15
    return (8 if bits >= own else -10) if near else 0


if __name__ == "__main__":
    as_command(picture, "picture")
