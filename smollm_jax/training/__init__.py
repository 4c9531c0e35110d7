"""Train a run: the step, the loop, evaluation, restart."""
