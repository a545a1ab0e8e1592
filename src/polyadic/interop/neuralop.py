"""``polyadic.accelerate_neuralop``: run existing CP spectral convolutions on this arithmetic.

The method ``forward`` of the main class is replaced by one that runs the whole layer here where its
configuration allows it, and calls neuraloperator's method elsewhere.

Of what is left to their ``forward``, and in their legacy class, the product alone is ours. A layer
stores the function that contracts its kept modes with its weight as an attribute of its own,
``_contract``, when it is made. A data descriptor of that name on the class goes before the
attribute of the layer, so it reaches layers that exist already, and new ones too; the layer's dict,
and so its copies and pickles, stays what it was. Deleting the descriptor undoes it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyadic.checks import check_flag
from polyadic.functional.spectral import NORMS, cp_spectral_conv, cp_spectral_product
from polyadic.interop.acceleration import (
    Acceleration,
    Patch,
    PatchedForward,
    Switch,
    reasons_by_class,
)
from polyadic.plans import Transforms

# Where classes of spectral convolutions stand in neuraloperator, and their functions.
_MAIN = "neuralop.layers.spectral_convolution"
_MODULES = (_MAIN, "neuralop.layers.legacy_spectral_convolution")
# Their functions for CP weights, and for weights they rebuild from any format.
_FUNCTIONS = ("_contract_cp", "_contract_dense", "_contract_dense_separable")


def accelerate_neuralop(*, transforms: bool = False) -> Acceleration:
    """Run neuraloperator's CP spectral convolutions on polyadic's arithmetic until undone.

    Runs each ``SpectralConv`` of neuraloperator, alone or in an FNO or TFNO, whose weight is in CP
    format (``factorization="CP"`` or ``"ComplexCP"``, either implementation, separable or not):
    with its own parameters and modes, those that ``n_modes`` narrows in training among them, and
    equal results up to rounding. Of real data of 1 to 3 dimensions in single precision, whose grid
    stays and has even sizes before the last, it runs the whole layer: one dimension is transformed
    after the other, and each is cut to the kept modes, of which alone the backward keeps
    something. Of complex data, of 4 dimensions, with a scaled resolution or an ``output_shape``,
    on odd sizes (which version 2.0.0 shifts) and in the legacy class it runs the product of the
    kept modes with the weight. Everything else runs in neuraloperator untouched: other
    factorizations, half and mixed precision, weights with hooks, layers given a contraction of
    someone's own, and calls that polyadic would refuse, whose error is then neuraloperator's own.

    The attribute ``_contract`` of two classes of neuraloperator, and ``forward`` of one of them,
    are replaced, so it holds for the whole process, in every thread. Calls may be nested and undone
    in any order. Turn it on before ``torch.compile`` sees the model, which then compiles to one
    graph.

    Args:
        transforms: where the whole layer is run, let the planner take products with truncated
            Fourier matrices in the place of torch's fast transforms for any number of positions.
            They round up to three times as coarsely at 1024 positions. Without it they are taken
            into the spectrum of at most 32 positions and out of at most 32 kept modes, up to which
            they round like fast transforms.

    Returns:
        An ``Acceleration``. Its ``undo()`` ends it, and so does leaving it as a context; its
        ``reasons(model)`` says which layers of a model polyadic runs, and why it leaves others.

    Raises:
        TypeError: ``transforms`` is not a bool.
        ImportError: neuraloperator, or something it needs, is not installed.

    Examples:
        >>> with polyadic.accelerate_neuralop() as acceleration:  # doctest: +SKIP
        ...     model(x).sum().backward()
        ...     print(acceleration.reasons(model))
    """
    if check_flag(transforms, "transforms"):
        return _any_transforms.on(_TransformsPatch)
    return _layers.on(_LayersPatch)


def _spectral_classes() -> dict[Any, tuple[Any, ...]]:
    """Return the classes that contract, with the functions each may have chosen for a CP weight."""
    try:
        modules = [importlib.import_module(name) for name in _MODULES]
    except ImportError as error:
        raise ImportError(
            f'accelerate_neuralop needs neuraloperator: pip install "polyadic[neuralop]" ({error})'
        ) from error
    return {
        module.SpectralConv: tuple(
            getattr(module, name) for name in _FUNCTIONS if hasattr(module, name)
        )
        for module in modules
    }


def _cp_classes() -> tuple[type[Any], ...]:
    tltorch = importlib.import_module("tltorch")
    return tltorch.CPTensor, tltorch.ComplexCPTensor


class _Contraction:
    """A data descriptor in the place of a layer's ``_contract``.

    Args:
        cp: tltorch's classes of CP tensors.
        functions: neuraloperator's functions for which ours stands in.
    """

    def __init__(self, cp: tuple[type[Any], ...], functions: tuple[Any, ...]) -> None:
        self._cp, self._functions, self._on = cp, functions, True

    def __get__(self, layer: Any, cls: type[Any] | None = None) -> Any:
        if layer is None:
            return self
        try:
            theirs = layer.__dict__["_contract"]
        except KeyError:
            raise AttributeError(f"{type(layer).__name__} has no attribute '_contract'") from None
        if not self._on or self.why_not(layer) is not None:
            return theirs
        return self._ours(theirs)

    def __set__(self, layer: Any, value: Any) -> None:
        layer.__dict__["_contract"] = value

    def __delete__(self, layer: Any) -> None:
        try:
            del layer.__dict__["_contract"]
        except KeyError:
            raise AttributeError(f"{type(layer).__name__} has no attribute '_contract'") from None

    def switch_off(self) -> None:
        """Have layers use what is theirs, should the descriptor still be in place somewhere."""
        self._on = False

    def why_not(self, layer: Any) -> str | None:
        """Return why a layer stays with neuraloperator whatever it is called with, or None."""
        theirs, weight = layer.__dict__.get("_contract"), layer.weight
        # A legacy layer of several weights that no one of them stands for has a list of them.
        weights: list[Any] = list(weight) if isinstance(weight, nn.ModuleList) else [weight]
        for each in weights:
            if type(each) not in self._cp:
                return f"its weight is a {type(each).__name__}, not a CPTensor or ComplexCPTensor"
            if each.weights is None or not each.weights.is_complex():
                return "its weight has no complex λ"
            for hook in (*each._forward_pre_hooks.values(), *each._forward_hooks.values()):
                return f"its weight has the hook {type(hook).__name__}"
        if theirs not in self._functions:
            return f"its _contract is {getattr(theirs, '__name__', theirs)}"
        return None

    def _ours(self, theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def contract(x: Tensor, weight: Any, separable: bool = False, **options: Any) -> Tensor:
            if options or type(weight) not in self._cp or not _fits(x, weight, separable):
                return theirs(x, weight, separable=separable, **options)
            first, *rest = weight.factors
            out = [] if separable else [rest.pop(0)]
            # Their transform keeps a map beside which Z is small, so that nothing is saved by
            # computing it again.
            lam = weight.weights
            return cp_spectral_product(x, [first], out, rest, weights=lam, memory="fast")

        return contract


def _fits(x: Any, weight: Any, separable: bool) -> bool:
    """Whether x (b, i, *k) can be contracted with a weight (i, o, *k), or (i, *k)."""
    scale = weight.weights
    if not isinstance(x, Tensor) or x.dtype != scale.dtype or x.device != scale.device:
        return False
    modes = tuple(factor.shape[0] for factor in weight.factors)
    channels = 1 if separable else 2
    if len(modes) != x.dim() - 2 + channels or len(modes) == channels:
        return False
    return (modes[0], *modes[channels:]) == tuple(x.shape[1:])


class _LayersPatch(Patch):
    """The descriptors on neuraloperator's classes, and the method ``forward`` of the main one.

    Attributes:
        transforms: by which transforms layers are run.
    """

    def __init__(self) -> None:
        self.transforms: Transforms = "close"
        cp = _cp_classes() if (classes := _spectral_classes()) else ()
        self._replaced = {cls: _Contraction(cp, functions) for cls, functions in classes.items()}
        for cls, contraction in self._replaced.items():
            cls._contract = contraction
        main = importlib.import_module(_MAIN).SpectralConv
        self._why_not = self._replaced[main].why_not
        self._methods = PatchedForward({main: self._run})

    def reasons(self, model: nn.Module) -> dict[str, str | None]:
        """Say of each spectral convolution in a model who runs it."""
        return reasons_by_class(model, {cls: made.why_not for cls, made in self._replaced.items()})

    def remove(self) -> None:
        """Put the method back and take the descriptors away; layers' attributes come to light."""
        self._methods.remove()
        for cls, contraction in self._replaced.items():
            contraction.switch_off()
            if cls.__dict__.get("_contract") is contraction:
                del cls._contract

    def _run(self, layer: Any, x: Any, output_shape: Any = None) -> Tensor | None:
        """Return the output of the whole layer, or None to leave the call to neuraloperator."""
        if output_shape is not None or self._why_not(layer) is not None:
            return None
        if layer.complex_data or layer.resolution_scaling_factor is not None:
            return None
        if layer.fft_norm not in NORMS:
            return None
        scale, bias = layer.weight.weights, layer.bias
        plain = scale.dtype == torch.complex64 and layer.fno_block_precision == "full"
        if not plain or not isinstance(x, Tensor) or x.dtype != torch.float32:
            return None
        if x.device != scale.device or (bias is not None and bias.dtype != torch.float32):
            return None
        factors = _kept_factors(layer, x)
        if factors is None:
            return None
        first, *rest = factors
        out = [] if layer.separable else [rest.pop(0)]
        if bias is not None:
            if bias.shape != ((out or [first])[0].shape[0], *[1] * layer.order):
                return None
            bias = bias.flatten()
        options: Any = {"fft_norm": layer.fft_norm, "transforms": self.transforms}
        return cp_spectral_conv(x, [first], out, rest, bias, weights=scale, **options)


class _TransformsPatch(Patch):
    """The patch of the layers, told to take any transforms."""

    def __init__(self) -> None:
        self._acceleration = _layers.on(_LayersPatch)
        self._patch = cast(_LayersPatch, self._acceleration._patch)
        self._patch.transforms = "any"

    def reasons(self, model: nn.Module) -> dict[str, str | None]:
        """Say of each spectral convolution in a model who runs it."""
        return self._patch.reasons(model)

    def remove(self) -> None:
        """Have the layers take transforms that round like torch's, should they still be run."""
        self._patch.transforms = "close"
        self._acceleration.undo()


def _kept_factors(layer: Any, x: Tensor) -> list[Tensor] | None:
    """Return the factors cut to the modes that the layer keeps of x; None if the call is not ours.

    The layer cuts equally many rows off both ends of a factor, and one more off the end where their
    number is odd. Of the last factor, whose modes begin at 0, it cuts only the end.
    """
    order, channels = layer.order, 1 if layer.separable else 2
    factors = list(layer.weight.factors)
    if not 1 <= order <= 3 or len(factors) != order + channels or x.dim() != order + 2:
        return None
    *leading, last = x.shape[2:]
    if x.shape[1] != factors[0].shape[0] or 0 in x.shape or any(n % 2 for n in leading):
        return None
    sizes = [*leading, last // 2 + 1]
    for d, (n, kept, most) in enumerate(zip(sizes, layer.n_modes, layer.max_n_modes, strict=True)):
        factor, few = factors[channels + d], min(n, kept)
        if not 0 < few <= most == factor.shape[0]:
            return None
        start = 0 if d == order - 1 else (most - few) // 2
        factors[channels + d] = factor if few == most else factor.narrow(0, start, few)
    return factors


_layers, _any_transforms = Switch("accelerate_neuralop"), Switch("accelerate_neuralop")
