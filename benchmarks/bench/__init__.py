"""Layers timed side by side: cases, contestants, measuring, records and their report.

``run`` times what ``contestants`` build for the ``cases``, writes JSON lines, and ``report`` turns
stored lines, and nothing else, into tables and figures.
"""

from benchmarks.bench.run import Options, run_bench

__all__ = ["Options", "run_bench"]
