"""What a function that changes a model asks of it: to be a module whose parameters are its own."""

from __future__ import annotations

from torch import nn

from polyadic.checks import check_module


def check_unwrapped(model: nn.Module, function: str, argument: str = "model") -> None:
    """Refuse anything but a model, and a model whose parameters a wrapper or shards hold.

    DistributedDataParallel and FSDP look up the parameters once, when they wrap a module.
    Parameters that take their places later are never synchronised, and the models of the processes
    drift apart without an error. DataParallel and sharded parameters have no place for a whole
    factor.

    Args:
        model: the model.
        function: what would change the model, for the message.
        argument: the model's name among its arguments, for the message.

    Raises:
        TypeError: it is no module.
        ValueError: a part of the model is wrapped, or has sharded parameters (DTensors).
    """
    check_module(model, argument)
    for name, module in model.named_modules():
        place = f"{argument}.{name}" if name else argument
        wrapper = next((base.__name__ for base in type(module).__mro__ if _wraps(base)), None)
        if wrapper is not None:
            raise ValueError(
                f"{function} expects {argument} without a wrapper around its layers, but {place} "
                f"is in {wrapper}, which holds the parameters it found when it was made and not "
                f"those that are changed now; call {function} on the plain model, in every process "
                f"with the same arguments, and wrap it afterwards"
            )
        for key, parameter in module._parameters.items():
            if hasattr(parameter, "placements"):
                raise ValueError(
                    f"{function} expects {argument} with whole parameters, but {place}.{key} is a "
                    f"DTensor, of which each process holds a part; call {function} on the plain "
                    f"model, in every process with the same arguments, and shard it afterwards"
                )


def _wraps(base: type) -> bool:
    """Whether a class keeps parameters of layers; FSDP's classes are told without importing it."""
    if issubclass(base, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return True
    names = ("FullyShardedDataParallel", "FSDPModule", "DDP")
    return base.__name__ in names and base.__module__.startswith("torch.distributed.")
