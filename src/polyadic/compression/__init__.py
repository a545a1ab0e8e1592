"""Conversion of a trained model within one budget: ranks, formats, fits, and a report."""

from polyadic.compression.layer_report import LayerReport
from polyadic.compression.report import Report
from polyadic.compression.run import compress

__all__ = ["LayerReport", "Report", "compress"]
