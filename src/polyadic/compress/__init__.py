"""Conversion of a trained model within one budget: ranks, formats, fits, and a report."""

from polyadic.compress.report import LayerReport, Report
from polyadic.compress.run import compress

__all__ = ["LayerReport", "Report", "compress"]
