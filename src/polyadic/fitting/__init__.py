"""Fit a trained weight: its best CP tensor in the Frobenius norm or in the metric of its inputs."""

from polyadic.fitting.fit import decompose
from polyadic.fitting.moments import second_moments
from polyadic.fitting.result import DecomposeInterrupted, Decomposition

__all__ = ["DecomposeInterrupted", "Decomposition", "decompose", "second_moments"]
