"""What calibration batches tell: the calls of layers, their metrics, and the model's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyadic.batches import Forward, call, evaluating
from polyadic.compression.costs import Call
from polyadic.fitting import second_moments
from polyadic.fitting.moments import check_weights
from polyadic.nn.kinds import family_of

Weights = Callable[[Any], Tensor]


class _Called(nn.Module):
    """A model that is called by a function of the user's, for ``second_moments``."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self.by = model, forward

    def forward(self, batch: Any) -> Any:
        """The user's function of the model and a batch."""
        return self.by(self.model, batch)


class Calibration:
    """A model with batches to run through it.

    Args:
        model: in evaluation mode while it is run.
        batches: at least one.
        forward: how to call the model, and which of its outputs counts.
        weights: of positions, as ``polyadic.second_moments`` takes them.

    Attributes:
        outputs: floating-point outputs by batch, as the model gave them first.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        forward: Forward | None,
        weights: Weights | None,
    ) -> None:
        self.model, self.batches, self.weights = model, batches, weights
        self.forward = forward or call
        self.calls: dict[str, list[Call]] = {}
        self.outputs: list[list[Tensor]] = []
        self._leading: dict[str, tuple[int, ...]] = {}

    def watch(self, layers: Mapping[str, nn.Module]) -> None:
        """Run all batches once: note the outputs, and of the first batch each layer's calls."""
        hooks = [
            layer.register_forward_pre_hook(self._noting(name), with_kwargs=True)
            for name, layer in layers.items()
        ]
        try:
            with evaluating(self.model):
                for i, batch in enumerate(self.batches):
                    self.outputs.append(_floating(self._first(i, batch)))
                    if i == 0:
                        for hook in hooks:
                            hook.remove()
        finally:
            for hook in hooks:
                hook.remove()
        if not any(self.outputs):
            raise ValueError(
                f"{type(self.model).__name__} puts out no floating-point tensor, so that nothing "
                f"can be compared; give forward=lambda model, batch: ... that returns one"
            )
        finite = all(bool(y.isfinite().all()) for batch in self.outputs for y in batch)
        if not finite:
            raise ValueError("the model puts out NaN or infinity for the calibration batches")

    def _first(self, number: int, batch: Any) -> Any:
        """What a batch gives, which nobody knows to fit the model yet."""
        try:
            return self.forward(self.model, batch)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{type(self.model).__name__} does not run on batch {number} of calibration, a "
                f"{type(batch).__name__}: {error}; a tuple or list is given as model(*batch), a "
                f"mapping as model(**batch), all else as model(batch): leave out labels, or say "
                f"how to run it by forward=lambda model, batch: ..."
            ) from error

    def _noting(self, name: str) -> Callable[..., None]:
        def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            family = family_of(layer)
            if family in ("conv", "conv_transpose"):
                dims = len(layer.kernel_size)
                images = x.shape[0] if x.dim() == dims + 2 else 1
                call = Call(images, tuple(x.shape[-dims:]))
                self._leading[name] = (images,)
            else:
                leading = x.shape if family == "embedding" else x.shape[:-1]
                call = Call(math.prod(leading))
                self._leading[name] = tuple(leading)
            self.calls.setdefault(name, []).append(call)

        return note

    def moments(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The metrics of layers that were called; positions weighted where the layer has them."""
        called = [name for name in names if name in self.calls]
        shape = None
        if self.weights is not None:
            counts = self.weights(self.batches[0])
            check_weights(counts)
            shape = tuple(counts.shape)
        weighted = [n for n in called if shape is not None and self._leading[n] == shape]
        if shape is not None and called and not weighted:
            known = ", ".join(map(str, dict.fromkeys(self._leading[n] for n in called)))
            raise ValueError(
                f"weights must have the leading dimensions of the input of a layer, got {shape} "
                f"for the first batch, where layers have {known}"
            )
        found: dict[str, Tensor] = {}
        for group, weights in ((weighted, self.weights), (called, None)):
            names = [f"model.{name}" for name in group if name not in found]
            if names:
                model = _Called(self.model, self.forward)
                batches = [(batch,) for batch in self.batches]
                of_wrapped = None if weights is None else _unwrapped(weights)
                gathered = second_moments(model, batches, names, weights=of_wrapped)
                found.update({n.removeprefix("model."): m for n, m in gathered.items()})
        return found

    def changed(self, model: nn.Module) -> float:
        """Squared relative change of a model's outputs against those noted, mean over outputs."""
        lost: dict[int, float] = {}
        size: dict[int, float] = {}
        with evaluating(model):
            for batch, before in zip(self.batches, self.outputs, strict=True):
                after = _floating(self.forward(model, batch))
                for i, (old, new) in enumerate(zip(before, after, strict=True)):
                    lost[i] = lost.get(i, 0.0) + float((new.double() - old.double()).square().sum())
                    size[i] = size.get(i, 0.0) + float(old.double().square().sum())
        shares = [lost[i] / size[i] for i in lost if size[i] > 0]
        return sum(shares) / len(shares) if shares else 0.0

    def effect(self, layer: nn.Module, weight: Tensor) -> float:
        """The change of the outputs where a layer had another weight, which it has for a moment."""
        own = layer._parameters["weight"]
        assert own is not None
        kept = own.detach().clone()
        try:
            _set(own, weight)
            return self.changed(self.model)
        finally:
            _set(own, kept)


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter other values, and make a caller's autocast forget those it has cast."""
    parameter.data.copy_(value)
    torch.clear_autocast_cache()


def _unwrapped(weights: Weights) -> Weights:
    """The same for batches that stand in a tuple."""
    return lambda batch: weights(batch[0])


def _floating(output: Any) -> list[Tensor]:
    """All floating-point tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output.detach().clone()] if output.is_floating_point() else []
    parts: Sequence[Any] = ()
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, (tuple, list)):
        parts = output
    return [tensor for part in parts for tensor in _floating(part)]
