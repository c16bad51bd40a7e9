"""Benchmarks: ratios against named peers taken in the same run. `make bench` runs them; no test asserts a speed."""
