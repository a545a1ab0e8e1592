"""CP-factorized layers for PyTorch: forward and backward in closed form on the factors."""

from polyadic import finetune, functional, init, nn, reference
from polyadic.compression import Report, compress
from polyadic.fitting import (
    DecomposeInterrupted,
    Decomposition,
    decompose,
    second_moments,
)
from polyadic.formats import ConvFormat, LinearFormat, SpectralFormat, padded_shape, tensorize
from polyadic.interop.neuralop import accelerate_neuralop
from polyadic.interop.tltorch import accelerate_tltorch
from polyadic.measure.calibration import calibrate
from polyadic.measure.tuning import TunedLayer, TuneReport, tune, untune
from polyadic.nn.freezing import freeze, unfreeze
from polyadic.planner.explanation import explain
from polyadic.planner.model import ModelExplanation
from polyadic.planner.ranks import rank_for
from polyadic.planner.report import Explanation
from polyadic.plans import (
    ConvPlan,
    ConvRoute,
    LinearPlan,
    LinearRoute,
    SpectralPlan,
    SpectralRoute,
)
from polyadic.pretrained import from_pretrained, merge, register_transformers, save_pretrained
from polyadic.tensor import CPSlice, CPTensor
from polyadic.training import FactorizeReport, factor_rates, factorize, param_groups

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
    "FactorizeReport",
    "LinearFormat",
    "LinearPlan",
    "LinearRoute",
    "ModelExplanation",
    "Report",
    "SpectralFormat",
    "SpectralPlan",
    "SpectralRoute",
    "TuneReport",
    "TunedLayer",
    "accelerate_neuralop",
    "accelerate_tltorch",
    "calibrate",
    "compress",
    "decompose",
    "explain",
    "factor_rates",
    "factorize",
    "finetune",
    "freeze",
    "from_pretrained",
    "functional",
    "init",
    "merge",
    "nn",
    "padded_shape",
    "param_groups",
    "rank_for",
    "reference",
    "register_transformers",
    "save_pretrained",
    "second_moments",
    "tensorize",
    "tune",
    "unfreeze",
    "untune",
]
