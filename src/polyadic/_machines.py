"""Which machine description holds for a device and dtype: a calibrated one, else built-in."""

from __future__ import annotations

import torch

from polyadic._cost import Machine, built_in


def machine_for(device_type: str, dtype: torch.dtype) -> Machine:
    """The description of this machine at the thread count now set."""
    return built_in(device_type, dtype, torch.get_num_threads() if device_type == "cpu" else 1)
