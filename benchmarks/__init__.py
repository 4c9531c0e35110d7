"""What is measured, and against whom: `python -m benchmarks.NAME`, each a table on stderr and JSON on stdout.

Two sides are timed in turn in one process, so that a busy machine slows both; figures are medians of rounds.
"""
