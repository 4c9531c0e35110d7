"""The benchmarks: `python -m benchmarks.NAME` prints tables to stderr and one line of JSON to stdout.

The sides of a comparison run in processes of their own and take turns (harness/sides.py); figures are medians.
"""
