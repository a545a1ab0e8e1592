"""Fit a trained weight: its best CP tensor in the Frobenius norm or in the metric of its inputs."""

from polyadic.decompose.fit import decompose
from polyadic.decompose.moments import second_moments
from polyadic.decompose.result import DecomposeInterrupted, Decomposition

__all__ = ["DecomposeInterrupted", "Decomposition", "decompose", "second_moments"]
