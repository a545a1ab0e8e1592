"""``polyadic.accelerate_tltorch``: run existing tltorch layers in CP format on this arithmetic.

tltorch 0.5 reaches its arithmetic through the ``forward`` of three classes. Its convolution looks
up its function when it is made and keeps it, so ``forward`` is the only place that also reaches
layers that exist already. Those three methods are replaced while an acceleration is on, and
nothing else is.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from polyadic.interop.tltorch_layers import ConvRule, EmbeddingRule, LayerRule, LinearRule


def accelerate_tltorch() -> Acceleration:
    """Run tltorch's CP layers on polyadic's arithmetic until undone.

    Runs ``FactorizedLinear``, ``FactorizedConv`` (1-D to 3-D, every implementation) and
    ``FactorizedEmbedding`` whose weight is a CP tensor, real or complex, layers of a joint weight
    included, as they are: with their own parameters, equal results up to rounding, and equal
    dtypes. All else runs in tltorch untouched: other factorizations, weights with active hooks
    (tensor dropout, lasso), and calls that polyadic would refuse, whose error is then tltorch's
    own. Less is kept for the backward than by tltorch.

    Three methods of tltorch's classes are replaced, so it holds for the whole process, in every
    thread. Calls may be nested and undone in any order; the methods are tltorch's own again once
    the last is undone. Turn it on before ``torch.compile`` sees the model; convolutions break its
    graph, as they do in tltorch.

    Returns:
        An ``Acceleration``. Its ``undo()`` ends it, and so does leaving it as a context; its
        ``reasons(model)`` says which layers of a model polyadic runs, and why it leaves others.

    Raises:
        ImportError: tltorch, or something it needs, is not installed.

    Examples:
        >>> with polyadic.accelerate_tltorch() as acceleration:  # doctest: +SKIP
        ...     model(x).sum().backward()
        ...     print(acceleration.reasons(model))
    """
    rules = _rules()
    global _patch
    with _lock:
        if _patch is None:
            _patch = _Patch(rules)
        _patch.users += 1
        return Acceleration(_patch)


class Acceleration:
    """An acceleration that is on; made by ``accelerate_tltorch``.

    Attributes:
        active: whether it has not been undone.
    """

    def __init__(self, patch: _Patch) -> None:
        self.active = True
        self._patch = patch

    def reasons(self, model: nn.Module) -> dict[str, str | None]:
        """Say of each tltorch layer in a model who runs it.

        Args:
            model: any module.

        Returns:
            By the layer's name, None if polyadic runs it, else why it is left to tltorch. A call
            with an unsuitable input (its dtype, device or shape) goes to tltorch in either case.

        Raises:
            TypeError: ``model`` is not a module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        found: dict[str, str | None] = {}
        for name, layer in model.named_modules():
            for cls, rule in self._patch.rules.items():
                if isinstance(layer, cls):
                    found[name] = rule.why_not(layer)
        return found

    def undo(self) -> None:
        """End it. A second call does nothing."""
        global _patch
        with _lock:
            if self.active:
                self.active = False
                self._patch.users -= 1
                if self._patch.users == 0:
                    self._patch.remove()
                    _patch = None

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


class _Patch:
    """The replaced methods, in place from the first acceleration to the last.

    Attributes:
        users: number of accelerations that are on.
    """

    def __init__(self, rules: dict[type[nn.Module], LayerRule]) -> None:
        self.rules, self.users = rules, 0
        self._on = True
        self._theirs = {cls: cls.__dict__["forward"] for cls in rules}
        self._ours = {cls: self._forward(self._theirs[cls], rule) for cls, rule in rules.items()}
        for cls, forward in self._ours.items():
            cls.forward = forward

    def remove(self) -> None:
        """Put tltorch's methods back.

        If someone has wrapped our method in the meantime, the wrapper stays, and our method under
        it passes every call on to tltorch.
        """
        self._on = False
        for cls, forward in self._theirs.items():
            if cls.__dict__["forward"] is self._ours[cls]:
                cls.forward = forward

    def _forward(self, theirs: Callable[..., Tensor], rule: LayerRule) -> Callable[..., Tensor]:
        @functools.wraps(theirs)
        def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            y = rule.run(layer, *args, **kwargs) if self._on else None
            return theirs(layer, *args, **kwargs) if y is None else y

        return forward


def _rules() -> dict[type[nn.Module], LayerRule]:
    try:
        import tltorch
        from tltorch.factorized_tensors import ComplexCPTensor, ComplexCPTensorized
        from tltorch.functional.convolution import convolve, cp_conv, cp_conv_mobilenet
        from tltorch.tensor_hooks._tensor_dropout import TensorDropout
    except ImportError as error:
        raise ImportError(
            'accelerate_tltorch needs tltorch and what it needs: pip install "polyadic[interop]" '
            f"({error})"
        ) from error
    functions = (convolve, cp_conv, cp_conv_mobilenet)
    return {
        tltorch.FactorizedLinear: LinearRule(
            (tltorch.CPTensorized, ComplexCPTensorized), TensorDropout
        ),
        tltorch.FactorizedConv: ConvRule(
            (tltorch.CPTensor, ComplexCPTensor), TensorDropout, functions
        ),
        tltorch.FactorizedEmbedding: EmbeddingRule((tltorch.CPTensorized,), TensorDropout),
    }


_lock = threading.Lock()
_patch: _Patch | None = None
