"""CP-factorized layers for PyTorch whose forward and backward stay factorized."""

from polyadic import finetune, functional, init, nn, reference
from polyadic._explanation import Explanation
from polyadic._format import ConvFormat, LinearFormat, padded_shape, tensorize
from polyadic._plan import ConvPlan, ConvRoute, LinearPlan, LinearRoute
from polyadic.calibrate import calibrate
from polyadic.compress import Report, compress
from polyadic.decompose import (
    DecomposeInterrupted,
    Decomposition,
    decompose,
    second_moments,
)
from polyadic.explain import explain
from polyadic.freeze import freeze, unfreeze
from polyadic.pretrained import from_pretrained, merge, register_transformers, save_pretrained
from polyadic.tensor import CPSlice, CPTensor
from polyadic.tltorch import accelerate_tltorch

__version__ = "0.1.0"

__all__ = [
    "CPSlice",
    "CPTensor",
    "ConvFormat",
    "ConvPlan",
    "ConvRoute",
    "DecomposeInterrupted",
    "Decomposition",
    "Explanation",
    "LinearFormat",
    "LinearPlan",
    "LinearRoute",
    "Report",
    "accelerate_tltorch",
    "calibrate",
    "compress",
    "decompose",
    "explain",
    "finetune",
    "freeze",
    "from_pretrained",
    "functional",
    "init",
    "merge",
    "nn",
    "padded_shape",
    "reference",
    "register_transformers",
    "save_pretrained",
    "second_moments",
    "tensorize",
    "unfreeze",
]
