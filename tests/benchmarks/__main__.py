"""Run the capture benchmark and write its results file and the README's table."""

from __future__ import annotations

from tests.benchmarks.capture import main

main()
