"""In which dtypes layers compute, and which GPUs the Triton kernels serve; each is looked at once.

They serve NVIDIA GPUs from compute capability 8.0 on, if Triton is installed. The environment
variable ``POLYADIC_TRITON=0``, set before the first use, switches them off.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

from polyadic._torch import not_traced

SWITCH = "POLYADIC_TRITON"
LEAST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Kinds of maps that obey a route by "triton".
KINDS = ("linear", "convolution", "embedding")
_LOG = logging.getLogger("polyadic")


def is_computed(dtype: torch.dtype) -> bool:
    """Whether factors may be of a dtype: floating point of two bytes or more, or complex.

    torch has no products in complex32 on a CPU, and in eight bits of scaled operands alone.
    """
    if not isinstance(dtype, torch.dtype):
        return False
    wide = dtype.is_floating_point and dtype.itemsize >= 2
    return wide or dtype in (torch.complex64, torch.complex128)


@not_traced
def serves(kind: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether a map of a kind obeys a route by "triton" on a type of device."""
    return why_not(kind, device_type, dtype) is None


@not_traced
def why_not(kind: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return the reason why a map cannot obey a route by "triton", or None."""
    reason = never(kind, device_type, dtype)
    if reason is None and not triton_serves(None):
        reason = _why_not(None)
    return reason


def never(kind: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return the reason why no machine can obey a route by "triton" there, or None."""
    if kind not in KINDS:
        return f"there are no Triton kernels for a {kind} map"
    if device_type != "cuda":
        return f"Triton kernels run on CUDA devices, not on {device_type!r}"
    if dtype not in DTYPES:
        return f"Triton kernels compute in float32, float16 and bfloat16, not in {dtype}"
    return None


@not_traced
def triton_serves(index: int | None) -> bool:
    """Whether Triton kernels may run on a CUDA device; if not, the reason is logged once."""
    return _serves(index)


@functools.cache
def _serves(index: int | None) -> bool:
    reason = _why_not(index)
    if reason is not None:
        _LOG.info("polyadic computes with torch's own operations: %s", reason)
    return reason is None


@functools.cache
def has_warpgroups(index: int) -> bool:
    """Whether four warps make a tensor-core product together on a device, as on Hopper alone."""
    # A negative number is a CPU, on which kernels are interpreted.
    return index >= 0 and torch.cuda.get_device_capability(index)[0] == 9


def _why_not(index: int | None) -> str | None:
    """Return the reason why Triton kernels cannot run on a device, or None."""
    if os.environ.get(SWITCH, "1").lower() in ("0", "off", "false", "no"):
        return f"{SWITCH} switches its Triton kernels off"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "its Triton kernels are checked on NVIDIA's GPUs alone"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        return (
            f"its Triton kernels need compute capability 8.0, and device {index} has {capability}"
        )
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:
        # Triton builds its driver with a C compiler at the first use.
        return f"Triton cannot be started: {error}"
    return None
