"""What recovery asks of models: how to call them, what to train, what to leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyadic._torch import is_spread
from polyadic.batches import call, keeping_modes, misfit
from polyadic.kernels.backend import is_computed
from polyadic.tensor import CPTensor

Forward = Callable[[nn.Module, Any], Tensor]
Trainable = Literal["cp", "cp+norms", "all"] | Callable[[str, nn.Parameter], bool]

TRAINABLE = ("cp", "cp+norms", "all")
_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "InstanceNorm")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; the CPU for a model without parameters."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def output_tensor(model: nn.Module, batch: Any) -> Tensor:
    """Call a model and return its output, which has to be one floating tensor.

    Raises:
        ValueError: the output holds no floating tensor, or several, or the model does not take
            such a batch.
    """
    try:
        output = call(model, batch)
    except TypeError as error:
        raise misfit(model, batch, "a batch", error) from error
    if isinstance(output, Tensor):
        return output
    parts: dict[Any, Any] = {}
    if isinstance(output, Mapping):
        parts = dict(output)
    elif isinstance(output, (tuple, list)):
        parts = dict(enumerate(output))
    tensors = {k: v for k, v in parts.items() if isinstance(v, Tensor) and is_computed(v.dtype)}
    if len(tensors) == 1:
        (single,) = tensors.values()
        return single
    found = ", ".join(map(str, tensors)) or "none"
    raise ValueError(
        f"the output of {type(model).__name__} is a {type(output).__name__} whose floating tensors "
        f"are: {found}; give forward=lambda model, batch: ... that returns the one to match"
    )


def select(model: nn.Module, trainable: Any) -> dict[str, nn.Parameter]:
    """Select the parameters to train, by name.

    Raises:
        TypeError: ``trainable`` is neither a known word nor callable.
        ValueError: the word is unknown, or nothing is selected.
        RuntimeError: a layer is frozen for inference.
    """
    for name, module in model.named_modules():
        if getattr(module, "frozen", None) is not None:
            raise RuntimeError(
                f"layer {name!r} is frozen for inference; call polyadic.unfreeze(model) first"
            )
    if callable(trainable):
        chosen = {n: p for n, p in model.named_parameters() if trainable(n, p)}
    elif not isinstance(trainable, str):
        raise TypeError(
            f"trainable must be one of {', '.join(map(repr, TRAINABLE))} or a function of a "
            f"parameter's name and the parameter, got {type(trainable).__name__}"
        )
    elif trainable not in TRAINABLE:
        raise ValueError(
            f"trainable must be one of {', '.join(map(repr, TRAINABLE))} or a function of a "
            f"parameter's name and the parameter, got {trainable!r}"
        )
    else:
        wanted = _ids(model, trainable)
        chosen = {n: p for n, p in model.named_parameters() if id(p) in wanted}
    if not chosen:
        raise ValueError(
            f"trainable={trainable!r} selects no parameter of {type(model).__name__}; convert it "
            f"first (it holds no CP layer), or give trainable='all'"
        )
    return chosen


def _ids(model: nn.Module, trainable: str) -> set[int]:
    if trainable == "all":
        return {id(parameter) for parameter in model.parameters()}
    found = set()
    for module in model.modules():
        if isinstance(module, CPTensor):
            found |= {id(parameter) for parameter in module.parameters()}
        elif is_cp_layer(module) or (trainable == "cp+norms" and _is_norm(module)):
            found |= {id(parameter) for parameter in module.parameters(recurse=False)}
    return found


def is_cp_layer(module: nn.Module) -> bool:
    """Whether a module computes with a CP weight."""
    return isinstance(module._modules.get("cp"), CPTensor)


def _is_norm(module: nn.Module) -> bool:
    return any(norm in type(module).__name__ for norm in _NORMS)


def is_sharded(model: nn.Module) -> bool:
    """Whether a call of the model needs all processes that hold a part of it."""
    return any(is_spread(parameter) for parameter in model.parameters())


def _place(parameter: Any) -> int:
    """Where a parameter lies in memory; of a DTensor, what this process holds."""
    local = parameter.to_local() if is_spread(parameter) else parameter
    return int(local.untyped_storage().data_ptr())


def refuse_shared(trained: Mapping[str, nn.Parameter], teacher: nn.Module) -> None:
    """Raise a ValueError where training would change the teacher."""
    held = {_place(p): name for name, p in teacher.named_parameters()}
    held.pop(0, None)
    for name, parameter in trained.items():
        other = held.get(_place(parameter))
        if other is not None:
            raise ValueError(
                f"the teacher shares the memory of its {other!r} with the student's {name!r}, "
                f"which is to be trained; keep a copy.deepcopy of the original as the teacher"
            )


@contextmanager
def prepared(
    student: nn.Module, teacher: nn.Module, trained: Mapping[str, nn.Parameter], train_mode: bool
) -> Iterator[None]:
    """Within it only ``trained`` require gradients, and the teacher is in evaluation mode."""
    flags = [(p, p.requires_grad) for p in student.parameters()]
    wanted = {id(parameter) for parameter in trained.values()}
    try:
        with keeping_modes(student, teacher):
            student.train(train_mode)
            teacher.eval()
            for parameter, _ in flags:
                parameter.requires_grad_(id(parameter) in wanted)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
