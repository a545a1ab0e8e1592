"""CP-factorized layers for PyTorch whose forward and backward stay factorized."""

from polyadic import functional, init, nn, reference
from polyadic._format import tensorize
from polyadic._plan import ConvPlan, ConvRoute, LinearPlan, LinearRoute
from polyadic.tensor import CPTensor

__version__ = "0.1.0"

__all__ = [
    "CPTensor",
    "ConvPlan",
    "ConvRoute",
    "LinearPlan",
    "LinearRoute",
    "functional",
    "init",
    "nn",
    "reference",
    "tensorize",
]
