"""How a model is called on a batch, and the state in which it is called, restored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a tuple or list as ``*batch``, a mapping as ``**batch``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def require_batches(batches: Any, name: str, *, once: bool = False) -> None:
    """Raise a TypeError for what cannot be walked; or not again, unless once is enough.

    A single tensor is refused too: its entries would be taken for batches.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must be an iterable of batches such as a list or a DataLoader, got "
            f"{type(batches).__name__}; for one batch give a list of one"
        )
    if isinstance(batches, Iterator) and not once:
        raise TypeError(
            f"{name} must be an iterable that can be walked again, got the iterator "
            f"{type(batches).__name__}; give a list, a DataLoader or an object with __iter__"
        )


def misfit(model: nn.Module, batch: Any, where: str, error: Exception) -> ValueError:
    """Say that a model does not run on a batch, how batches are given to it, and how to mend it."""
    return ValueError(
        f"{type(model).__name__} does not run on {where}, a {type(batch).__name__}: {error}; a "
        f"tuple or list is given as model(*batch), a mapping as model(**batch), all else as "
        f"model(batch): leave out labels, or say how to run it by forward=lambda model, batch: ..."
    )


def moved(batch: Any, device: torch.device) -> Any:
    """Copy a batch with its tensors on a device; lists, tuples and mappings are searched."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(moved(value, device) for value in batch)
    return batch


@contextmanager
def keeping_modes(*models: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of every module of these models in the end."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Use evaluation mode without gradients; the modes of all modules are restored in the end."""
    with keeping_modes(model), torch.no_grad():
        model.eval()
        yield
