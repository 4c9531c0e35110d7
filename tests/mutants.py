"""Plant faults in the code, one at a time, and report which test finds each: `python -m tests.mutants [NAME ...]`.

A mutant replaces one piece of source text by a faulty one, in a copy of the checkout, and runs the fast tests that
should mind it. A mutant that survives is a hole in the tests. `tests/test_mutants.py` holds that the text of every
mutant is still there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

COPIED = ("smollm_jax", "tests", "benchmarks", "serve.py", "train_jax.py", "pyproject.toml", "README.md")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` stands exactly once in `file` of the package; with `new` a test of `tests` should fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


EVALUATION, PROGRESS = "tests/training/test_evaluation.py", "tests/training/test_progress.py"
TREE, OF_RUNS = "tests/evaluation/test_prefix_tree.py", "tests/evaluation/test_tasks_of_runs.py"
LOADER, STEP = "tests/data/test_loader.py", "tests/training/test_step.py"
PREFERENCE = "tests/training/test_preference.py"
ADAPTERS = "tests/training/test_adapters.py"

# The first nineteen survived all tests of 2026-11-27, before there was an oracle for the figures that people read.
MUTANTS: tuple[Mutant, ...] = (
    Mutant("held-out loss over bytes", "training/evaluation.py", "self.nats / max(self.tokens, 1)",
           "self.nats / max(self.bytes, 1)", EVALUATION),
    Mutant("held-out loss a constant", "training/evaluation.py",
           "return self.nats / max(self.tokens, 1)", "return 1.0", EVALUATION),
    Mutant("bits per byte in nats", "training/evaluation.py", "self.nats / math.log(2) /",
           "self.nats /", EVALUATION),
    Mutant("bits per byte a constant", "training/evaluation.py",
           "return self.nats / math.log(2) / max(self.bytes, 1)", "return 1.0", EVALUATION),
    Mutant("padding and document starts scored", "data/packing.py",
           "(np.abs(before) == after) & (after > 0)", "after == after", EVALUATION),
    Mutant("perplexity a power of two", "training/evaluation.py", "math.exp(min(self.loss, 700.0))",
           "2 ** min(self.loss, 700.0)", EVALUATION),
    Mutant("--max-batches ignored", "training/evaluation.py", "batch_size), max_batches)",
           "batch_size), None)", EVALUATION),
    Mutant("evaluation shrinks with --grad-accum", "training/reference.py",
           "eval_batches * run.config.compute.grad_accum", "eval_batches", EVALUATION),
    Mutant("answers see each other", "model/attention.py", "< end_BT[:, None, seen]",
           "< end_BT[:, None, seen] + 999", TREE),
    Mutant("positions in the row, not in the text", "evaluation/prefix_tree.py",
           "ids[shared:], np.arange(shared, len(ids))", "ids[shared:], new", TREE),
    Mutant("the token before scored", "evaluation/prefix_tree.py",
           "self._path[len(ids) - len(request.targets) :]", "self._path[len(ids) - len(request.targets) - 1 : -1]",
           TREE),
    Mutant("greedy if one token is", "evaluation/scorer.py", "are_argmax[here].all()", "are_argmax[here].any()",
           TREE),
    Mutant("--limit ignored", "evaluation/tasks.py", "task_dict=tasks, limit=limit", "task_dict=tasks, limit=None",
           "tests/evaluation/test_harness.py -k prints_a_table"),
    Mutant("the card has another step's scores", "runs/about.py", 'if x["step"] == step for name, score',
           "for name, score", OF_RUNS),
    Mutant("published beside a share, not percent", "evaluation/published.py", 'f"{100 * score:.1f}"',
           'f"{score:.1f}"', "tests/evaluation/test_smollm2.py"),
    Mutant("mixture by documents", "data/shuffle.py", 'state["tokens"] += len(',
           'state["tokens"] += 1 + 0 * len(', LOADER + " -k mixture"),
    Mutant("tokens counts steps", "training/progress.py", 'run.progress.tokens += int(values["targets"])',
           "run.progress.tokens += 1", PROGRESS),
    Mutant("tokens/s of positions", "training/progress.py", "interval.targets / seconds",
           "interval.slots / seconds", PROGRESS),
    Mutant("tokens/s a constant", "training/progress.py", "interval.targets / seconds", "1.0", PROGRESS),
    Mutant("MFU of one device", "training/progress.py", "(peak * run.mesh.size)", "peak", PROGRESS),
    Mutant("checkpoint among bad steps", "training/run.py",
           "and not run.progress.bad_steps_in_a_row", "", PROGRESS),
    Mutant("no checkpoint after a bad step", "training/run.py",
           "not run.progress.bad_steps_in_a_row", "not run.progress.bad_steps", PROGRESS),
    Mutant("held-out documents source by source", "data/heldout.py", "(i + 0.5) / weight", "0.5 / weight",
           LOADER + " -k held_out"),
    Mutant("heads divided unevenly", "kernels/shard.py", "% mesh.shape[heads] == 0",
           "% mesh.shape[heads] >= 0", "tests/kernels/test_shard.py"),
    Mutant("shards shuffled alike", "data/shuffle.py", "[*seed, shard.index]", "seed",
           LOADER + " -k own_order"),
    Mutant("skipped documents not reported", "training/progress.py",
           'int(pending.cursor.get(kind, 0)) if pending.cursor', "0 if pending.cursor", PROGRESS),
    Mutant("documents see each other", "model/attention.py", "[None, None] >= start_BT[..., None]",
           "[None, None] >= 0 * start_BT[..., None]", "tests/model/test_transformer.py"),
    Mutant("RoPE of neighbours", "model/ops.py", "second * cos + first * sin",
           "second * cos - first * sin", "tests/model/test_transformer.py"),
    Mutant("first update at rate zero", "training/optimizer.py",
           "linear_schedule(peak / warmup, peak", "linear_schedule(0.0, peak", "tests/training"),
    Mutant("warm-up one step late", "training/optimizer.py", "[rise, after], [warmup])",
           "[rise, after], [warmup + 1])", "tests/training"),
    Mutant("1-sqrt falls slowly", "training/optimizer.py", "1 - jnp.sqrt(share)", "1 - share**2",
           "tests/training"),
    Mutant("a branch reads its data anew", "training/branch.py", 'if record["data"] == "afresh":', "if True:",
           "tests/training/test_branch.py"),
    Mutant("no clip", "training/optimizer.py", "jnp.minimum(1.0, max_norm / norm)", "1.0",
           "tests/training"),
    Mutant("norms decay", "training/optimizer.py", '("scale", "_m")', '("nothing",)', "tests/training"),
    Mutant("targets across documents", "model/loss.py", "(jnp.abs(before) == after) & (after > 0)",
           "after > 0", "tests/model tests/training/test_step.py"),
    Mutant("the last micro-batch alone", "training/step.py", "jax.tree.map(jnp.add, total, found), None",
           "found, None", STEP),
    Mutant("a bad step updates", "training/step.py", "counts=finite & counts", "counts=counts", STEP),
    Mutant("Muon without Nesterov", "training/muon.py", "ahead = momentum * kept + (1 - momentum) * grad",
           "ahead = kept", "tests/training/test_muon.py -k torch"),
    Mutant("half of the z-loss's gradient", "model/loss.py", "1 + 2 * z_loss * log_z", "1 + z_loss * log_z",
           "tests/model/test_loss.py"),
    Mutant("an average one update late", "training/optimizer.py", 'parts["ema"], params)',
           'parts["ema"], parts["params"])', STEP),
    Mutant("adapters without their scale", "config/adapters.py", "scale * A, B, m, constant)",
           "A, B, m, constant)", ADAPTERS),
    Mutant("DoRA's norm has a gradient", "config/adapters.py", "constant(lengths(", "(lengths(", ADAPTERS),
    Mutant("the base is saved too", "training/step.py", 'if name != "base"}', 'if name != "nothing"}', ADAPTERS),
    Mutant("adapters A and B swapped", "hf/adapters.py", '"A": ".lora_A.weight", "B": ".lora_B.weight"',
           '"A": ".lora_B.weight", "B": ".lora_A.weight"', "tests/hf/test_adapter_folders.py"),
    Mutant("loss over positions", "training/step.py",
           '1.0 / jnp.maximum(pairs.get("pairs", targets), 1)', "1.0 / tokens.size", STEP),
    Mutant("no end of text", "data/shuffle.py", "np.append(ids, np.int32(end))", "ids",
           "tests/data"),
    Mutant("rows without their overlap", "data/packing.py", "self._offset -= 1", "self._offset -= 0",
           "tests/data"),
    Mutant("held-out documents trained on", "data/shuffle.py",
           "excluded.get(text_hash(document.text), len(document.text))", "len(document.text)",
           "tests/data"),
    Mutant("a resume forgets the offset", "data/loader.py", "self.packer.add(*drawn, *left)",
           "self.packer.add(*drawn)", "tests/data"),
    Mutant("batch hash without segments", "data/batch_hash.py", "xp.uint32(OF_SEGMENT)",
           "xp.uint32(0)", "tests/data/test_batch_hash.py"),
    Mutant("top-p one token short", "generation/sampling.py", ">= wanted_B", "> wanted_B + 0.2",
           "tests/generation/test_sampling.py"),
    Mutant("seed ignored", "generation/sampling.py", "jax.random.key)(seed_B)",
           "jax.random.key)(0 * seed_B)", "tests/generation"),
    Mutant("stop string shown in part", "serving/text.py", "for n in range(len(stop)) if text.endswith",
           "for n in range(len(stop) - 1) if text.endswith", "tests/serving/test_completion.py"),
    Mutant("sign of the margin", "model/preference.py", "settings.label_smoothing, beta * margin_BP",
           "settings.label_smoothing, -beta * margin_BP", PREFERENCE),
    Mutant("beta dropped", "model/preference.py", "settings.label_smoothing, beta * margin_BP",
           "settings.label_smoothing, margin_BP", PREFERENCE),
    Mutant("reference ignored", "model/preference.py", "logprobs_BP2 - reference_BP2", "logprobs_BP2", PREFERENCE),
    Mutant("chosen and rejected swapped", "model/preference.py",
           "chosen_BP, rejected_BP = ratio_BP2[..., 0], ratio_BP2[..., 1]",
           "rejected_BP, chosen_BP = ratio_BP2[..., 0], ratio_BP2[..., 1]", PREFERENCE),
    Mutant("label smoothing of one side", "model/preference.py", " - smoothing * jax.nn.log_sigmoid(-z_BP)", "",
           PREFERENCE),
    Mutant("loss of pairs by their tokens", "training/step.py", 'pairs.get("pairs", targets)', "targets",
           PREFERENCE),
    Mutant("equal answers trained on", "data/chat.py", "np.array_equal(sides[0], sides[1]) or", "",
           "tests/data/test_pairs.py"),
    Mutant("pairs known by tokens alone", "training/reference.py", " + kind.astype(np.int8).tobytes()", "",
           "tests/end_to_end/test_dpo.py -k known"),
)  # fmt: skip


def killer(mutant: Mutant, checkout: Path) -> str | None:
    """The first test that fails with the mutant in `checkout`; None if it survives."""
    path = checkout / "smollm_jax" / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: its text stands {source.count(mutant.old)} times in {mutant.file}, not once"
        )
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]
        env = os.environ | {"PYTHONPATH": str(checkout)}
        done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)
    finally:
        path.write_text(source)
    if done.returncode == 0:
        return None
    found = FAILED.search(done.stdout)
    if done.returncode != 1 or found is None:
        raise RuntimeError(f"{mutant.name}: pytest itself failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these mutants")
    names = parser.parse_args().names
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        checkout = Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, checkout / name)
        for mutant in MUTANTS:
            if names and mutant.name not in names:
                continue
            began = time.monotonic()
            test = killer(mutant, checkout)
            survivors += test is None
            seconds = time.monotonic() - began
            print(
                f"{mutant.name:<44} {'SURVIVES' if test is None else 'killed by ' + test}  ({seconds:.0f} s)",
                flush=True,
            )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
