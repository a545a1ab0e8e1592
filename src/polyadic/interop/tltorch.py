"""``polyadic.accelerate_tltorch``: run existing tltorch layers in CP format on this arithmetic.

tltorch 0.5 reaches its arithmetic through the ``forward`` of three classes. Its convolution looks
up its function when it is made and keeps it, so ``forward`` is the only place that also reaches
layers that exist already. Those three methods are replaced while an acceleration is on, and
nothing else is.
"""

from __future__ import annotations

from torch import nn

from polyadic.interop.acceleration import (
    Acceleration,
    Patch,
    PatchedForward,
    Switch,
    reasons_by_class,
)
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
    return _switch.on(_Patch)


class _Patch(Patch):
    """The replaced methods of tltorch's classes."""

    def __init__(self) -> None:
        self._rules = _rules()
        self._methods = PatchedForward({cls: rule.run for cls, rule in self._rules.items()})

    def reasons(self, model: nn.Module) -> dict[str, str | None]:
        """Say of each tltorch layer in a model who runs it."""
        return reasons_by_class(model, {cls: rule.why_not for cls, rule in self._rules.items()})

    def remove(self) -> None:
        """Put tltorch's methods back."""
        self._methods.remove()


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


_switch = Switch("accelerate_tltorch")
