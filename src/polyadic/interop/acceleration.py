"""What accelerations of other libraries share: to be on, nested, counted and undone."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from torch import nn

from polyadic.checks import check_module


class Patch:
    """What is replaced in another library, in place from the first acceleration to the last."""

    def reasons(self, model: nn.Module) -> dict[str, str | None]:
        """Say of each layer of that library in a model who runs it."""
        raise NotImplementedError

    def remove(self) -> None:
        """Put back what the library has there."""
        raise NotImplementedError


def reasons_by_class(
    model: nn.Module, why_not: Mapping[type[nn.Module], Callable[[Any], str | None]]
) -> dict[str, str | None]:
    """Say of each layer of some classes why it is left as it is, or None where it is not left."""
    found: dict[str, str | None] = {}
    for name, layer in model.named_modules():
        for cls, ask in why_not.items():
            if isinstance(layer, cls):
                found[name] = ask(layer)
    return found


class Switch:
    """Holds the one patch of a library while accelerations are on; they may be nested.

    Args:
        name: of the function that turns it on, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._patch: Patch | None = None
        self._users = 0

    def on(self, make: Callable[[], Patch]) -> Acceleration:
        """Make the patch unless it is in place, and return one more acceleration by it."""
        with self._lock:
            if self._patch is None:
                self._patch = make()
            self._users += 1
            return Acceleration(self._patch, self)

    def off(self) -> None:
        """Count one acceleration less; the last one removes the patch."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._patch is not None:
                self._patch.remove()
                self._patch = None


class Acceleration:
    """An acceleration that is on; made by ``accelerate_tltorch`` or ``accelerate_neuralop``.

    Attributes:
        active: whether it has not been undone.
    """

    def __init__(self, patch: Patch, switch: Switch) -> None:
        self.active = True
        self._patch, self._switch = patch, switch
        self._undoing = threading.Lock()

    def reasons(self, model: nn.Module) -> dict[str, str | None]:
        """Say of each layer of the accelerated library in a model who runs it.

        Args:
            model: any module.

        Returns:
            By the layer's name, None if polyadic runs it, else why it is left to its library. A
            call with an unsuitable input (its dtype, device or shape) is left in either case.

        Raises:
            TypeError: ``model`` is not a module.
        """
        check_module(model)
        return self._patch.reasons(model)

    def undo(self) -> None:
        """End it. A second call does nothing."""
        with self._undoing:
            if self.active:
                self.active = False
                self._switch.off()

    def __enter__(self) -> Acceleration:
        if not self.active:
            raise RuntimeError(f"this acceleration is undone; call {self._switch.name}() again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


class PatchedForward:
    """Methods ``forward`` of classes, each of which first asks whether the call runs here.

    Args:
        runs: by class a function of the layer and its arguments, whose result is the output, or
            None to leave the call to the library.
    """

    def __init__(self, runs: dict[type[nn.Module], Callable[..., object]]) -> None:
        self._on = True
        self._theirs = {cls: cls.__dict__["forward"] for cls in runs}
        self._ours = {cls: self._forward(self._theirs[cls], run) for cls, run in runs.items()}
        for cls, forward in self._ours.items():
            cls.forward = forward

    def remove(self) -> None:
        """Put the library's methods back.

        If someone has wrapped our method in the meantime, the wrapper stays, and our method under
        it passes every call on to the library.
        """
        self._on = False
        for cls, forward in self._theirs.items():
            if cls.__dict__["forward"] is self._ours[cls]:
                cls.forward = forward

    def _forward(
        self, theirs: Callable[..., object], run: Callable[..., object]
    ) -> Callable[..., object]:
        @functools.wraps(theirs)
        def forward(layer: nn.Module, *args: object, **kwargs: object) -> object:
            y = run(layer, *args, **kwargs) if self._on else None
            return theirs(layer, *args, **kwargs) if y is None else y

        return forward
