"""Training from scratch: fresh CP layers for a model, and the rates at which they learn."""

from polyadic.training.rates import factor_rates, param_groups
from polyadic.training.skeletons import FactorizeReport, factorize

__all__ = ["FactorizeReport", "factor_rates", "factorize", "param_groups"]
