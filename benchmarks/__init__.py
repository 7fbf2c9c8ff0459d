"""Measurements behind the numbers in docs/; run as `python -m benchmarks.NAME` from the root."""
