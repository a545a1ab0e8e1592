"""``polyadic.accelerate_tltorch``: run existing tltorch layers in CP format on this arithmetic.

tltorch 0.5 reaches its arithmetic through the ``forward`` of three classes. Its convolution looks
up its function when it is made and keeps it, so that of all places only ``forward`` reaches layers
that exist already; and there alone it is known which layer asks. Those three methods are replaced
while an acceleration is on, and nothing else is.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from polyadic.interop.tltorch_layers import Convolutions, Embeddings, Linears, Taker


def accelerate_tltorch() -> Acceleration:
    """Run tltorch's CP layers on polyadic's arithmetic until undone.

    Takes ``FactorizedLinear``, ``FactorizedConv`` (1-D to 3-D, every implementation) and
    ``FactorizedEmbedding`` whose weight is a real CP tensor, layers of a joint weight included, as
    they are: same parameters, same results to rounding, same dtypes. All else runs in tltorch
    untouched: other factorizations, complex factors, weights with active hooks (tensor dropout,
    lasso), and calls that polyadic would refuse, whose error is then tltorch's own. Less is kept
    for the backward than by tltorch.

    What is replaced are three methods of tltorch's classes, so it holds for the whole process, in
    every thread. Calls may be nested and undone in any order; the methods are tltorch's own again
    once the last is undone. Turn it on before ``torch.compile`` sees the model; convolutions
    break its graph, as they do without.

    Returns:
        An ``Acceleration``: ``undo()`` ends it, so does leaving it as a context, and its ``str``
        says which layers were taken and why others were not.

    Raises:
        ImportError: tltorch, or something it needs, is not installed.

    Examples:
        >>> with polyadic.accelerate_tltorch() as taken:  # doctest: +SKIP
        ...     model(x).sum().backward()
        >>> print(taken)  # doctest: +SKIP
    """
    classes = _tltorch_classes()
    global _patch
    with _lock:
        if _patch is None:
            _patch = _Patch(classes)
        handle = Acceleration(_patch)
        _patch.handles = (*_patch.handles, handle)
    return handle


@dataclass
class TltorchLayer:
    """What became of one tltorch layer.

    Attributes:
        label: its class, the shape and the rank of its weight.
        name: in the model given to ``Acceleration.include``, "" if in none.
        unfit: why the layer as it stood when first seen is not taken, or None if it is.
        taken: number of calls that ran on polyadic.
        left: number of calls that ran on tltorch, by reason.
    """

    label: str
    name: str = ""
    unfit: str | None = None
    taken: int = 0
    left: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        title = f"{self.name}: {self.label}" if self.name else self.label
        counts = [f"{self.taken} on polyadic"] if self.taken else []
        counts += [f"{n} on tltorch ({why})" for why, n in self.left.items()]
        if not counts:
            counts = ["not called" if self.unfit is None else f"not called ({self.unfit})"]
        return f"{title}: {', '.join(counts)}"


class Acceleration:
    """An acceleration that is on, and what it did; made by ``accelerate_tltorch``.

    Attributes:
        layers: a ``TltorchLayer`` for each layer that was called or included, in that order.
    """

    def __init__(self, patch: _Patch) -> None:
        self.layers: list[TltorchLayer] = []
        self._patch = patch
        self._known: WeakKeyDictionary[nn.Module, TltorchLayer] = WeakKeyDictionary()

    @property
    def active(self) -> bool:
        """Whether it has not been undone."""
        return any(handle is self for handle in self._patch.handles)

    @property
    def taken(self) -> list[TltorchLayer]:
        """Layers polyadic takes: it ran them, or would if they were called."""
        return [one for one in self.layers if one.taken or not (one.left or one.unfit)]

    def include(self, model: nn.Module) -> Acceleration:
        """Put all tltorch layers of a model into the report by name, called or not.

        Calls inside a compiled graph are not counted; this lists their layers all the same.

        Args:
            model: any module.

        Returns:
            This object, for ``print(taken.include(model))``.

        Raises:
            TypeError: ``model`` is not a module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, layer in model.named_modules():
            taker = self._patch.taker(layer)
            if taker is not None:
                with _lock:
                    self._of(layer, taker).name = name
        return self

    def undo(self) -> None:
        """End it. A second time it does nothing."""
        global _patch
        with _lock:
            patch = self._patch
            patch.handles = tuple(handle for handle in patch.handles if handle is not self)
            if not patch.handles and _patch is patch:
                patch.remove()
                _patch = None

    def _of(self, layer: nn.Module, taker: Taker) -> TltorchLayer:
        one = self._known.get(layer)
        if one is None:
            one = self._known[layer] = TltorchLayer(_label(layer), unfit=taker.unfit(layer))
            self.layers.append(one)
        return one

    def _count(self, layer: nn.Module, taker: Taker, reason: str | None) -> None:
        with _lock:
            one = self._of(layer, taker)
            if reason is None:
                one.taken += 1
            else:
                one.left[reason] = one.left.get(reason, 0) + 1

    def __enter__(self) -> Acceleration:
        if not self.active:
            raise RuntimeError("this acceleration is undone; call accelerate_tltorch() again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        state = "on" if self.active else "undone"
        head = f"polyadic took {len(self.taken)} of {len(self.layers)} tltorch layers ({state})"
        return "\n  ".join([head, *map(str, self.layers)])


def _label(layer: Any) -> str:
    weight = layer.weight
    shape = tuple(int(size) for size in weight.shape)
    return f"{type(layer).__name__}({type(weight).__name__} {shape}, rank {weight.rank})"


class _Patch:
    """The replaced methods, and who wants them so; holds from the first handle to the last."""

    def __init__(self, classes: dict[type[nn.Module], Taker]) -> None:
        self.handles: tuple[Acceleration, ...] = ()
        self.classes = classes
        self.theirs = {cls: cls.__dict__["forward"] for cls in classes}
        self.ours = {cls: self._hook(cls) for cls in classes}
        for cls, forward in self.ours.items():
            cls.forward = forward

    def remove(self) -> None:
        """Put tltorch's methods back, except where someone else has wrapped ours since.

        There ours stays in place and passes every call on.
        """
        for cls, forward in self.theirs.items():
            if cls.__dict__["forward"] is self.ours[cls]:
                cls.forward = forward

    def taker(self, layer: nn.Module) -> Taker | None:
        return next((t for cls, t in self.classes.items() if isinstance(layer, cls)), None)

    def _hook(self, cls: type[nn.Module]) -> Callable[..., Tensor]:
        theirs, taker = self.theirs[cls], self.classes[cls]

        @functools.wraps(theirs)
        def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            if not self.handles:
                return theirs(layer, *args, **kwargs)  # type: ignore[no-any-return]
            y = taker.run(layer, *args, **kwargs)
            reason = y if isinstance(y, str) else None
            if not torch.compiler.is_compiling():
                for handle in self.handles:
                    handle._count(layer, taker, reason)
            return theirs(layer, *args, **kwargs) if isinstance(y, str) else y

        return forward


def _tltorch_classes() -> dict[type[nn.Module], Taker]:
    try:
        import tltorch
        from tltorch.functional.convolution import convolve, cp_conv, cp_conv_mobilenet
        from tltorch.tensor_hooks._tensor_dropout import TensorDropout
    except ImportError as error:
        raise ImportError(
            'accelerate_tltorch needs tltorch and what it needs: pip install "polyadic[interop]" '
            f"({error})"
        ) from error
    functions = (convolve, cp_conv, cp_conv_mobilenet)
    return {
        tltorch.FactorizedLinear: Linears(tltorch.CPTensorized, TensorDropout),
        tltorch.FactorizedConv: Convolutions(tltorch.CPTensor, TensorDropout, functions),
        tltorch.FactorizedEmbedding: Embeddings(tltorch.CPTensorized, TensorDropout),
    }


_lock = threading.Lock()
_patch: _Patch | None = None
