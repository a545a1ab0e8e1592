"""Which torch layers a CP layer can take the place of, without losing anything of theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from polyadic.kernels.backend import is_computed

# For a hook that computes a weight, by its name, the call that makes a parameter of the result.
_BAKE = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(layer)",
}
_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def weight_of(module: Any, kind: type[nn.Module], method: str) -> Tensor:
    """Return the weight of a torch layer, after checks that a CP layer can stand in for it.

    Args:
        module: what the user gave.
        kind: the class it has to be, exactly: a subclass may compute something else.
        method: the function's name, for messages.

    Raises:
        TypeError: it is of another class, or its weight is no plain floating-point or complex
            parameter.
        ValueError: its weight is computed or has no values, or something attached to the layer
            would be lost.
    """
    expected = f"{method} expects a torch.nn.{kind.__name__}"
    if not isinstance(module, nn.Module):
        raise TypeError(f"{expected}, got {type(module).__name__}")
    if parametrize.is_parametrized(module):
        parametrized = module.get_submodule("parametrizations").named_children()
        names = ", ".join(name for name, _ in parametrized)
        raise ValueError(
            f"{expected} with a weight of its own, but {names} of this layer is parametrized; bake "
            f"it in: torch.nn.utils.parametrize.remove_parametrizations(layer, name)"
        )
    _exact(module, kind, expected)
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"{expected} with a weight of its own, but it is computed: {_bake(module)}"
        )
    found = attached(module) or _extra_part(module)
    if found is not None:
        raise ValueError(
            f"{expected} with nothing attached, but this one has {found}, which the CP layer "
            f"would not have; remove it, convert, and put it on the CP layer"
        )
    if type(weight) is not nn.Parameter or weight.layout != torch.strided:
        raise TypeError(
            f"{expected} with a plain dense weight, got a {type(weight).__name__} of layout "
            f"{weight.layout}; convert it to a dense torch.nn.Parameter"
        )
    if weight.is_meta:
        raise ValueError(
            f"{expected} with values, but its weight is on the meta device; load it first"
        )
    if not is_computed(weight.dtype) or weight.dtype.itemsize < 2:
        raise TypeError(
            f"{expected} in a floating-point dtype of 16 bits or more, complex64 or complex128, "
            f"got {weight.dtype}"
        )
    if weight.numel() == 0:
        raise ValueError(f"{expected} with a weight, but its shape is {tuple(weight.shape)}")
    return weight.detach()


def _exact(module: nn.Module, kind: type[nn.Module], expected: str) -> None:
    """Raise a TypeError that says why a module is not exactly of a class."""
    name = type(module).__name__
    if type(module) is kind:
        return
    if isinstance(module, LazyModuleMixin):
        raise TypeError(f"{expected}, got {name}, which has no weight yet; run it on an input once")
    if "quantized" in type(module).__module__:
        raise TypeError(
            f"{expected}, got {type(module).__module__}.{name}; a CP weight is fitted to the "
            f"floating-point layer, so convert it before it is quantized"
        )
    if isinstance(module, kind):
        raise TypeError(
            f"{expected} itself, got its subclass {name}, which may compute something else; if it "
            f"does not, make a torch.nn.{kind.__name__} with its weight"
        )
    raise TypeError(f"{expected}, got {name}")


def _bake(module: nn.Module) -> str:
    """Say how to make a parameter of a weight that a hook computes."""
    names = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    for name in names:
        if name in _BAKE:
            return f"by {name}; bake it in: {_BAKE[name]}"
    if "weight_orig" in module._parameters:
        pruning = names[0] if names else "pruning"
        return f"by {pruning}; bake it in: torch.nn.utils.prune.remove(layer, 'weight')"
    return "make it a torch.nn.Parameter"


def attached(layer: nn.Module) -> str | None:
    """Name what is attached to a layer and would be lost if another took its place, or None."""
    for attribute, kind in _HOOKS.items():
        for hook in (getattr(layer, attribute, None) or {}).values():
            return f"the {kind} {getattr(hook, '__name__', type(hook).__name__)}"
    return "a forward of its own" if "forward" in vars(layer) else None


def _extra_part(layer: nn.Module) -> str | None:
    """Name a parameter, buffer or module of a layer that its class does not have, or None."""
    parts = {**layer._modules, **layer._buffers, **layer._parameters}
    extra = [name for name in parts if name not in ("weight", "bias")]
    return f"the part {extra[0]}" if extra else None
