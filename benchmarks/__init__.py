"""What is measured, and against whom: `python -m benchmarks.NAME`, each tables on stderr and JSON on stdout.

The sides of a comparison are processes of their own that take turns (sides.py); figures are medians of rounds.
"""
