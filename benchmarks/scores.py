"""Requests per second of lm-evaluation-harness with our engine and with its own class for transformers.

    python -m benchmarks.scores MODEL --data texts.jsonl

Both answer the same multiple-choice requests in float32, in one process, in turn: questions cut from the texts, of
the lengths of four public tasks. The class for transformers takes its best batch size. Needs the extras eval and
torch, and accelerate.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from smollm_jax.evaluation.harness import HarnessModel
from smollm_jax.evaluation.scorer import Scorer
from smollm_jax.generation.generator import Generator
from smollm_jax.runs.load import load_model
from smollm_jax.runtime.errors import say

# words of the question, words of an answer, and answers: about those of the public data sets
KINDS = {"hellaswag": (45, 18, 4), "arc": (20, 4, 4), "commonsense_qa": (13, 2, 5), "mmlu": (50, 7, 4)}


def requests_of(words: list[str], kind: str, questions: int) -> list[Any]:
    """Return requests of lm_eval: each answer after its question."""
    from lm_eval.api.instance import Instance

    rng, (question, answer, answers) = random.Random(kind), KINDS[kind]

    def some(count: int) -> str:
        start = rng.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    asked = [f"Question: {some(question)}\nAnswer:" for _ in range(questions)]
    pairs = [(one, f" {some(answer)}") for one in asked for _ in range(answers)]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def rounds(sides: dict[str, Any], requests: list[Any], count: int) -> Iterator[tuple[str, float, list[Any]]]:
    """Yield each side's name, requests per second and answers, in turn."""
    for model in sides.values():
        model.loglikelihood(requests[:8], disable_tqdm=True)  # compiles
    for _ in range(count):
        for name, model in sides.items():
            began = time.perf_counter()
            answers = model.loglikelihood(requests, disable_tqdm=True)
            yield name, len(requests) / (time.perf_counter() - began), answers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--data", required=True, help="JSON lines with a text each")
    parser.add_argument("--questions", type=int, default=24, help="of each kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="of the class for transformers"
    )
    given = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    lines = Path(given.data).read_text(encoding="utf-8").splitlines()
    words = [word for line in lines for word in json.loads(line)["text"].split()]
    config, params, tokenizer = load_model(given.model)
    scorer = Scorer(config, jnp.dtype("float32"))
    params = jax.tree.map(jnp.asarray, params)
    sides: dict[str, Any] = {
        "ours": HarnessModel(config, tokenizer, scorer=scorer, params=params, generator=not_used)
    }
    for size in given.batch_sizes:
        sides[f"HFLM, batch {size}"] = HFLM(given.model, device="cpu", dtype="float32", batch_size=size)
    results, rows = {}, ["| requests like | side | requests/s, each round | best |", "|---|---|---|---:|"]
    for kind in KINDS:
        requests, rates, found = requests_of(words, kind, given.questions), defaultdict[str, list[float]](list), {}
        for name, rate, answers in rounds(sides, requests, given.rounds):
            rates[name].append(rate)
            found[name] = answers
        for name, each in rates.items():
            rows.append(f"| {kind} | {name} | {', '.join(f'{rate:.2f}' for rate in each)} | {max(each):.2f} |")
        pairs = [pair for answers in found.values() for pair in zip(found["ours"], answers, strict=True)]
        best = max(max(each) for name, each in rates.items() if name != "ours")
        results[kind] = {
            "requests": len(requests),
            "requests_per_second": dict(rates),
            "times_the_best_of_hflm": max(rates["ours"]) / best,
            "largest_difference_nats": max(abs(a[0] - b[0]) for a, b in pairs),
            "greedy_flags_equal": all(a[1] == b[1] for a, b in pairs),
        }
        say(f"{kind}: ours {results[kind]['times_the_best_of_hflm']:.2f} times the best of HFLM")
    say("\n".join(rows))
    print(json.dumps(results))


def not_used() -> Generator:
    raise AssertionError("no text is generated here")


if __name__ == "__main__":
    main()
