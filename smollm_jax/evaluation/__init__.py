"""Score a model on the tasks of lm-evaluation-harness."""
