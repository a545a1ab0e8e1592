"""What calibration batches tell: the calls of layers, their metrics, and the model's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyadic import progress
from polyadic.batches import Forward, call, evaluating, misfit
from polyadic.compression.arguments import Callback
from polyadic.compression.costs import Call, Calls
from polyadic.compression.targets import Target
from polyadic.durable import interrupts
from polyadic.fitting import second_moments
from polyadic.fitting.moments import check_weights
from polyadic.fitting.problem import wide
from polyadic.nn.kinds import family_of

Weights = Callable[[Any], Tensor]

# Rows that a linear layer or an embedding is taken to be called with, without calibration.
ROWS = 32
# Batches on which the effect of a single layer is measured.
EFFECT_BATCHES = 4


class _CalledByUser(nn.Module):
    """A model whose forward is a function of the user's, for ``second_moments``."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self.function = model, forward

    def forward(self, batch: Any) -> Any:
        """Apply the user's function to the model and a batch."""
        return self.function(self.model, batch)


@dataclass(frozen=True)
class Evidence:
    """What is known of the layers before ranks are chosen.

    Attributes:
        calls: by layer, its calls in one batch; a layer is left out where they are not known.
        metrics: by target, the second moment of its input; empty without calibration.
        calibration: the model with its batches, or None.
    """

    calls: Calls
    metrics: Mapping[str, Tensor]
    calibration: Calibration | None


def gather(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Sequence[Any] | None,
    forward: Forward | None,
    weights: Weights | None,
    tell: Callback,
) -> Evidence:
    """Run the calibration batches, if there are any, and record what they tell.

    Without batches a linear layer or an embedding is taken to be called once with ``ROWS`` rows,
    and the calls of convolutions are not known.
    """
    layers = {n: layer for t in targets for n, layer in zip(t.names, t.layers, strict=True)}
    if batches is None:
        known = [n for n, each in layers.items() if family_of(each) in ("linear", "embedding")]
        return Evidence({n: [Call(ROWS)] for n in known}, {}, None)
    calibration = Calibration(model, batches, forward, weights)
    tell("calibration", 0, 2, "outputs")
    calibration.watch(layers)
    tell("calibration", 1, 2, "second moments")
    metrics = calibration.moments([target.name for target in targets])
    tell("calibration", 2, 2, "")
    return Evidence(calibration.calls, metrics, calibration)


class Calibration:
    """A model with batches to run through it.

    Args:
        model: the model; it is in evaluation mode while it is run.
        batches: at least one batch.
        forward: how to call the model, and which of its outputs counts.
        weights: how much each position counts, as ``polyadic.second_moments`` takes them.

    Attributes:
        calls: by the name of a layer, its calls in the first batch; filled by ``watch``.
        outputs: the floating-point outputs of the unchanged model, by batch; filled by ``watch``.
        seconds: how long ``watch`` ran the model.
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
        self.seconds = 0.0
        self._leading: dict[str, tuple[int, ...]] = {}

    def watch(self, layers: Mapping[str, nn.Module]) -> None:
        """Run all batches once and record the outputs, and each layer's calls in the first batch.

        Raises:
            ValueError: the model does not run on a batch, or puts out no floating-point tensor, or
                NaN or infinity.
        """
        hooks = [
            layer.register_forward_pre_hook(self._recorder(name), with_kwargs=True)
            for name, layer in layers.items()
        ]
        began = progress.now()
        try:
            with evaluating(self.model):
                for i, batch in enumerate(self.batches):
                    interrupts.check()
                    self.outputs.append(_floating(self._checked_forward(i, batch)))
                    if i == 0:
                        for hook in hooks:
                            hook.remove()
        finally:
            for hook in hooks:
                hook.remove()
        self.seconds = progress.now() - began
        if not any(self.outputs):
            raise ValueError(
                f"{type(self.model).__name__} puts out no floating-point tensor, so that nothing "
                f"can be compared; give forward=lambda model, batch: ... that returns one"
            )
        finite = all(bool(y.isfinite().all()) for batch in self.outputs for y in batch)
        if not finite:
            raise ValueError("the model puts out NaN or infinity for the calibration batches")

    def _checked_forward(self, number: int, batch: Any) -> Any:
        """Call the model; an error says that the batch may not fit it, and how to mend that."""
        try:
            return self.forward(self.model, batch)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError) as error:
            where = f"batch {number} of calibration"
            raise misfit(self.model, batch, where, error) from error

    def _recorder(self, name: str) -> Callable[..., None]:
        def record(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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

        return record

    def moments(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Gather the metrics of the layers that were called.

        Positions are weighted in layers whose input has the leading dimensions of the weights.

        Args:
            names: names of layers; those that were not called are left out.

        Returns:
            By name, the metric as ``polyadic.second_moments`` gives it.

        Raises:
            ValueError: the weights have the leading dimensions of no layer's input.
        """
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
                model = _CalledByUser(self.model, self.forward)
                batches = _Wrapped(self.batches)
                of_wrapped = None if weights is None else _unwrapped(weights)
                gathered = second_moments(model, batches, names, weights=of_wrapped)
                found.update({n.removeprefix("model."): m for n, m in gathered.items()})
        return found

    def changed(self, model: nn.Module, most: int | None = None) -> float:
        """Squared relative change of a model's outputs against the recorded ones.

        It is added up over the batches, relative to the output's own power, and then averaged over
        the outputs of the model.

        Args:
            model: the changed model.
            most: how many batches are run, spread evenly over all; None for all.
        """
        step = 1 if most is None else max(1, len(self.batches) // most)
        chosen = list(zip(self.batches, self.outputs, strict=True))[::step][:most]
        lost: dict[int, float] = {}
        size: dict[int, float] = {}
        with evaluating(model):
            for batch, before in chosen:
                interrupts.check()
                after = _floating(self.forward(model, batch))
                for i, (old, new) in enumerate(zip(before, after, strict=True)):
                    lost[i] = lost.get(i, 0.0) + _power(wide(new) - wide(old))
                    size[i] = size.get(i, 0.0) + _power(wide(old))
        shares = [lost[i] / size[i] for i in lost if size[i] > 0]
        return sum(shares) / len(shares) if shares else 0.0

    def seconds_of(self, most: int) -> float:
        """Predict the seconds of a run of so many batches, or of all if there are fewer."""
        return self.seconds * min(1.0, most / len(self.batches))

    def effect(self, layer: nn.Module, weight: Tensor) -> float:
        """``changed`` of the model with another weight in one layer, which is put back after.

        A few batches tell it: how much a layer counts varies less between batches than between
        layers, and the model is run on them once for each layer.
        """
        own = layer._parameters["weight"]
        assert own is not None
        kept = own.detach().clone()
        try:
            _overwrite(own, weight)
            return self.changed(self.model, EFFECT_BATCHES)
        finally:
            _overwrite(own, kept)


class _Wrapped:
    """Batches, each as a tuple; between two of them Ctrl-C may end the work."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[tuple[Any]]:
        for batch in self._batches:
            interrupts.check()
            yield (batch,)


def _overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Overwrite a parameter's values; a caller's autocast may hold a cast copy of the old ones."""
    parameter.data.copy_(value)
    torch.clear_autocast_cache()


def _unwrapped(weights: Weights) -> Weights:
    """Return the weights of a batch that is wrapped in a tuple."""
    return lambda batch: weights(batch[0])


def _power(values: Tensor) -> float:
    """The sum of the squares of all entries, of complex ones of their moduli."""
    parts = torch.view_as_real(values) if values.is_complex() else values
    return float(parts.square().sum())


def _floating(output: Any) -> list[Tensor]:
    """All floating-point and complex tensors of an output, in order."""
    if isinstance(output, Tensor):
        numbers = output.is_floating_point() or output.is_complex()
        return [output.detach().clone()] if numbers else []
    parts: Sequence[Any] = ()
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, (tuple, list)):
        parts = output
    return [tensor for part in parts for tensor in _floating(part)]
