"""Tiny runs, and what is compared of them."""

import json
import time

import numpy as np

from smollm_jax.checkpoint.manager import read_params
from smollm_jax.runs.load import read_run
from smollm_jax.training.verify_resume import TIMES

TINY = (
    "--vocab-size 300 --hidden-size 16 --num-layers 2 --num-heads 2 --num-kv-heads 1 --head-dim 8 "
    "--intermediate-size 24 --seq-len 32 --batch-size 4 --shuffle-window 16 "
    "--eval-documents 5 --eval-batches 2 --sample-tokens 0 --log-every 1 --warmup-steps 2 "
).split()


def ended(process, code=0, timeout=240):
    """stdout and stderr of a process that ends with `code`."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, err
    return out, err


def records(folder):
    """What must not depend on stops: every line of metrics without its times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same_run(one, other):
    assert records(one) == records(other)
    assert (one / "samples.txt").read_text() == (other / "samples.txt").read_text()
    averages = ("ema",) if read_run(one).optimizer.ema else ()
    for group in ("params", "opt_state", *averages):
        (found_a, a), (found_b, b) = (read_params(run / "checkpoints", group=group) for run in (one, other))
        assert found_a.meta["cursor"] == found_b.meta["cursor"]
        for x, y in zip(leaves(a), leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)


def leaves(tree):
    return [x for key in sorted(tree) for x in leaves(tree[key])] if isinstance(tree, dict) else [tree]


def wait_for_step(folder, step, process, timeout=120):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        try:
            if records(folder)[-1]["step"] >= step:
                return
        except (FileNotFoundError, IndexError, ValueError):
            pass
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")
