"""Benchmarks: both sides in one run, medians, ratios, each figure with its target. `./run bench [name] [--json]`."""
