"""The main job on real data: train dense and CP models on digits, and write a report."""

from __future__ import annotations

from examples.digits.run import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
