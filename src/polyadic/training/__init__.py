"""Training of models with CP layers: learning rates under which the dense recipe holds."""

from polyadic.training.rates import factor_rates, param_groups

__all__ = ["factor_rates", "param_groups"]
