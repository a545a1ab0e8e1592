"""Conversion of a trained model within one budget: ranks, formats, fits, and a report."""

from polyadic.compress.layers import LayerReport
from polyadic.compress.report import Report
from polyadic.compress.run import compress

__all__ = ["LayerReport", "Report", "compress"]
