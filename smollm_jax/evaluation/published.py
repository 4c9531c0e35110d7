"""Print scores beside the published ones of SmolLM2.

From the model cards of HuggingFaceTB/SmolLM2-*, in percent: lighteval, zero-shot, GSM8K five-shot. The instruct
models were scored through their chat template.
"""

MODELS = ("135M", "360M", "1.7B", "135M-Instruct", "360M-Instruct", "1.7B-Instruct")
# a task of the suite, its figure, and the figure of each of the models
PUBLISHED: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "smollm2_hellaswag": ("acc_norm", (42.1, 54.5, 68.7, 40.9, 52.1, 66.1)),
    "smollm2_arc": ("acc_norm", (43.9, 53.0, 60.5, 37.3, 43.7, 51.7)),
    "smollm2_piqa": ("acc_norm", (68.4, 71.7, 77.6, 66.3, 70.8, 74.4)),
    "smollm2_mmlu": ("acc_norm", (31.5, 35.8, None, 29.3, 32.8, None)),
    "smollm2_commonsense_qa": ("acc_norm", (33.9, 38.0, 43.6, None, None, None)),
    "smollm2_trivia_qa": ("exact_match", (4.1, 16.9, 36.7, None, None, None)),
    "smollm2_winogrande": ("acc_norm", (51.3, 52.5, 59.4, None, None, None)),
    "smollm2_openbookqa": ("acc_norm", (34.6, 37.4, 42.2, None, None, None)),
    "smollm2_gsm8k": ("exact_match", (1.4, 3.2, 31.0, 1.4, 7.43, 48.2)),
}


def beside_published(scores: dict[str, float]) -> str:
    """Return a Markdown table of the suite's scores in percent, empty if there are none of the suite."""
    rows = []
    for task, (metric, published) in PUBLISHED.items():
        score = scores.get(f"{task}/{metric}")
        if score is None:
            continue
        error = scores.get(f"{task}/{metric}_stderr")
        own = f"{100 * score:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
        theirs = ("" if figure is None else f"{figure:.1f}" for figure in published)
        rows.append([task.removeprefix("smollm2_"), own, *theirs])
    head = ["%", "this model", *(f"SmolLM2-{name}" for name in MODELS)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""
