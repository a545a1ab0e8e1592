"""The dense weight of a CP layer as a tensor to read: built when it is used, never written to.

A layer has no dense weight, and what reads one seldom needs its entries: ``layer.weight.dtype``,
``.device`` and ``.shape`` are asked for at every forward of some models. ``layer.weight`` is
therefore a ``DenseWeight``, a tensor without memory that knows its shape, dtype and device. Any
other operation builds the dense tensor from the factors and goes on with that.

Nothing that is written to the built tensor would reach the factors. Three nets catch a write:

1. operations that write by their name (``add_``, ``w[0] = …``, setting ``.data``) are refused
   before anything is built;
2. others are seen by the version counter of the built tensor, which each write increases
   (``out=``, ``inplace=True``, ``torch._foreach_add_``);
3. a result that shares memory with the built tensor (``w.t()``, ``w[0]``, ``w.data``) is a
   ``DenseWeight`` itself, so that writing to a view is refused like writing to the whole.

Two kinds of readers need the built tensor itself: those that make a graph of what they see
(``polyadic.nn.traced_weight``), and transforms of torch.func (``TransformedWeight``).

Gradients take either of two ways. An operation on a ``DenseWeight`` is recorded by autograd as an
operation on the built tensor. An ``autograd.Function`` that is given one never asks for its
entries in a way that autograd sees; for it the tensor is the output of ``_Built``, whose backward
builds the weight anew and sends the gradient on to the factors.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from polyadic._torch import (
    TensorMeta,
    as_plain_tensor,
    in_transform,
    innermost,
    no_autocast,
    shares_memory,
    tree_leaves,
    typed_storage,
    without_memory,
)
from polyadic.nn.parameters import NamedParameters, refuse_parameter
from polyadic.nn.traced_weight import TracedWeight, refuse_write
from polyadic.tensor import CPTensor

T = TypeVar("T")


class Source:
    """What a ``DenseWeight`` is built from.

    Args:
        build: makes the dense tensor, differentiably.
        inputs: the tensors it depends on that autograd knows.
        owner: what the weight belongs to, for messages.
        like: a tensor of its dtype and on its device.
        shape: of the dense tensor.
        strides: of the dense tensor.

    Attributes:
        trained: whether an input requires a gradient.
    """

    __slots__ = ("build", "inputs", "like", "owner", "shape", "strides", "trained")

    def __init__(
        self,
        build: Callable[[], Tensor],
        inputs: Sequence[Tensor],
        owner: str,
        like: Tensor,
        shape: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        self.build, self.inputs, self.owner, self.like = build, inputs, owner, like
        self.shape, self.strides = shape, strides
        self.trained = any(tensor.requires_grad for tensor in inputs)

    @classmethod
    def of_view(cls, view: Tensor, owner: str) -> Source:
        """Return the source of a view of a tensor that was built."""
        return cls(lambda: view, (view,), owner, view, view.shape, view.stride())

    def detached(self) -> Source:
        """Return a source of the same values, without a gradient."""
        build = self.build

        def constant() -> Tensor:
            with torch.no_grad():
                return build().detach()

        return Source(constant, (), self.owner, self.like, self.shape, self.strides)


class _ComparedWithParameters(TensorMeta):
    """The type of ``DenseWeight``; to ask whether a parameter is one of it is answered with yes.

    torch.testing.assert_close compares what is related: one operand has to be an instance of the
    other's type. The weights of a CP layer and of a torch layer are compared in every other test.
    """

    def __instancecheck__(self, instance: object) -> bool:
        return type(instance) in (self, nn.Parameter)


def _is_dense_weight(value: object) -> TypeGuard[DenseWeight]:
    return type(value) is DenseWeight


class DenseWeight(Tensor, metaclass=_ComparedWithParameters):
    """A tensor that reads as the dense weight of a CP layer and refuses to be written to.

    It follows the factors: what it reads as is what they stand for at that moment, as the weight of
    a torch layer does. ``clone()`` makes a plain tensor, which keeps the values and can be written.
    """

    # With slots of its own, as torch.utils.swap_tensors asks of the other tensor too.
    __slots__ = ("_is_hf_initialized", "_source")
    _source: Source
    _is_hf_initialized: bool

    @staticmethod
    def of(source: Source) -> DenseWeight:
        """The tensor that is built from a source when it is used."""
        # What records a graph sees each operation on the built tensor, and has no use for another.
        if source.trained and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            made: DenseWeight = _Built.apply(source, *source.inputs)
            return made
        return DenseWeight._empty(source)

    @staticmethod
    def _empty(source: Source) -> DenseWeight:
        made: DenseWeight = without_memory(DenseWeight, source.like, source.shape, source.strides)
        made._source = source
        # transformers marks the parameters it has loaded, and then leaves them as they are where
        # it draws the missing ones; some models ask that of layer.weight.
        made._is_hf_initialized = bool(source.inputs) and all(
            getattr(tensor, "_is_hf_initialized", False) for tensor in source.inputs
        )
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Answer questions about shape and dtype, refuse writes, and build for all else."""
        kwargs = kwargs or {}
        if func in _KNOWN_WITHOUT_VALUES:
            with as_plain_tensor():
                return func(*args, **kwargs)
        first: Any = args[0] if args else next(iter(kwargs.values()), None)
        if func in _ANSWERS:
            return _ANSWERS[func](first)
        written = _written(func)
        if written and (held := _weights_in(first)):
            refuse_write(held[0]._source.owner, written)
        built: list[_Use] = []
        dense_args, dense_kwargs = _dense(args, built), _dense(kwargs, built)
        result = func(*dense_args, **dense_kwargs)
        for weight, dense, version in built:
            if _version(dense) != version:
                refuse_write(weight._source.owner, _writes_of(func))
        if func in _ARRAYS:
            result.flags.writeable = False
        return _views_guarded(result, built)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares no class method
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> NoReturn:
        """Refuse what passes ``__torch_function__`` by."""
        (weight, *_) = _weights_in([args, kwargs])
        raise TypeError(
            f"{func} cannot see the weight of a {weight._source.owner}, which is built from the CP "
            f"factors when it is used; give it a copy: layer.weight.clone()"
        )


class TransformedWeight(Tensor):
    """The dense weight inside a transform of torch.func, which refuses to be written to.

    Transforms wrap tensors in tensors of their own, so that it has to be the built tensor itself.
    """

    owner: str

    @staticmethod
    def of(dense: Tensor, owner: str) -> TransformedWeight:
        """A weight that was built, or a view of one."""
        made = dense.as_subclass(TransformedWeight)
        made.owner = owner
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Refuse a write, and guard the views."""
        kwargs = kwargs or {}
        weights = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, cls)]
        written = _written(func)
        if written and any(leaf is weights[0] for leaf in tree_leaves(args[:1])):
            refuse_write(weights[0].owner, written)
        with as_plain_tensor():
            inside = [innermost(weight) for weight in weights]
            versions = [_version(dense) for dense in inside]
            result = func(*args, **kwargs)
            for weight, dense, version in zip(weights, inside, versions, strict=True):
                if _version(dense) != version:
                    refuse_write(weight.owner, _writes_of(func))

            def change(given: Tensor) -> Tensor:
                if any(shares_memory(innermost(given), dense) for dense in inside):
                    return cls.of(given, weights[0].owner)
                return given

            return _mapped(result, change)


class _Built(torch.autograd.Function):
    """Receives the gradient of a ``DenseWeight`` that no recorded operation has used."""

    @staticmethod
    def forward(ctx: Any, source: Source, *inputs: Tensor) -> DenseWeight:
        ctx.source = source
        ctx.save_for_backward(*inputs)
        return DenseWeight._empty(source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        asked = [t for t, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.source.build(), asked, grad))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


def _written(func: Any) -> str:
    """How an operation that writes to its first argument is called, or nothing."""
    name: str = getattr(func, "__name__", "")
    if name in ("__set__", "__delete__"):
        return f"setting .{getattr(func.__self__, '__name__', 'an attribute')}"
    if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
        return f"{name}()"
    return ""


def _writes_of(func: Any) -> str:
    return f"what {getattr(func, '__name__', func)} writes to it"


def _weights_in(tree: Any) -> list[DenseWeight]:
    if _is_dense_weight(tree):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [weight for part in tree for weight in _weights_in(part)]


def _mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return the lists, tuples and dicts with every tensor in them changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)([_mapped(part, change) for part in tree])
    if type(tree) is dict:
        return {key: _mapped(part, change) for key, part in tree.items()}
    return tree


# A weight among arguments, the tensor built for it, and the number of writes that one has seen.
_Use = tuple[DenseWeight, Tensor, int | None]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _build(source: Source) -> Tensor:
    """Build a weight; in inference mode too as a tensor that counts writes."""
    if not torch.is_inference_mode_enabled():
        return source.build()
    with torch.inference_mode(False), torch.no_grad():
        return source.build()


def _dense(tree: T, built: list[_Use]) -> T:
    """Arguments with a built tensor for each ``DenseWeight`` among them."""

    def change(given: Tensor) -> Tensor:
        if not _is_dense_weight(given):
            return given
        for weight, dense, _ in built:
            if weight is given:
                return dense
        dense = _build(given._source)
        built.append((given, dense, _version(dense)))
        return dense

    changed: T = _mapped(tree, change)
    return changed


def _views_guarded(result: Any, built: Sequence[_Use]) -> Any:
    """A result with a ``DenseWeight`` for each tensor in it that is a view of what was built."""

    def change(given: Tensor) -> Tensor:
        for weight, dense, _ in built:
            base = dense if dense._base is None else dense._base
            if given is dense or given._base is base:
                return DenseWeight.of(Source.of_view(given, weight._source.owner))
        return given

    return _mapped(result, change)


def _no_memory(weight: DenseWeight) -> NoReturn:
    raise TypeError(
        f"the weight of a {weight._source.owner} is computed from its CP factors and has no memory "
        f"of its own; layer.weight.clone() has"
    )


def _no_hook(weight: DenseWeight) -> NoReturn:
    raise TypeError(
        f"the weight of a {weight._source.owner} is computed from its CP factors anew each time, "
        f"so that a hook or a kept gradient would be lost; use the factors (layer.cp.factors)"
    )


def _get(name: str) -> Any:
    return getattr(Tensor, name).__get__


_WRITES = frozenset(
    f"__{name}__" for name in (
        "setitem", "iadd", "iand", "idiv", "ifloordiv", "ilshift", "imod", "imul", "ior", "ipow",
        "irshift", "isub", "itruediv", "ixor",
    )
)  # fmt: skip
_KNOWN_WITHOUT_VALUES = frozenset(
    [_get(name) for name in (
        "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "is_cuda", "is_cpu",
        "is_meta", "is_mps", "is_mkldnn", "is_nested", "is_quantized", "is_sparse",
        "is_sparse_csr", "is_xla", "is_xpu", "name", "output_nr", "grad_fn",
    )]
    + [getattr(Tensor, name) for name in (
        "size", "stride", "dim", "numel", "nelement", "ndimension", "element_size", "get_device",
        "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_inference",
        "storage_offset", "__len__", "__hash__",
    )]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)  # fmt: skip
_ARRAYS = (Tensor.numpy, Tensor.__array__)
_ANSWERS: dict[Any, Callable[[DenseWeight], Any]] = {
    _get("requires_grad"): lambda weight: weight._source.trained,
    # A leaf is what an optimizer may change.
    _get("is_leaf"): lambda weight: False,
    _get("grad"): lambda weight: None,
    _get("data"): lambda weight: DenseWeight.of(weight._source.detached()),
    Tensor.detach: lambda weight: DenseWeight.of(weight._source.detached()),
    torch.detach: lambda weight: DenseWeight.of(weight._source.detached()),
    Tensor.__iter__: lambda weight: iter(weight.unbind()),
    Tensor.data_ptr: _no_memory,
    Tensor.untyped_storage: _no_memory,
    Tensor.storage: _no_memory,
    typed_storage: _no_memory,
    Tensor.__dlpack__: _no_memory,
    Tensor.register_hook: _no_hook,
    Tensor.register_post_accumulate_grad_hook: _no_hook,
    Tensor.retain_grad: _no_hook,
}


class Weighted(nn.Module):
    """A layer with a dense weight to read; subclasses say its shape and how it is built."""

    cp: CPTensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parameters = NamedParameters(type(self).__name__)

    @property
    def weight(self) -> Tensor:
        """The dense weight in torch's layout, a ``DenseWeight``, which is read-only.

        It is built when an operation uses it; asking for shape, dtype or device builds nothing.
        Writing to it is refused with a RuntimeError and setting the attribute with a TypeError, for
        the values would be lost. Where a graph is made of it, and in a transform of torch.func, it
        is the built tensor, which refuses to be written to as well.
        """
        if torch.compiler.is_dynamo_compiling():
            return TracedWeight.of(self._built_weight(), type(self).__name__)
        if in_transform():
            return TransformedWeight.of(self._built_weight(), type(self).__name__)
        shape = self._weight_shape()
        strides = [*itertools.accumulate(shape[:0:-1], operator.mul, initial=1)][::-1]
        inputs = list(self.cp.parameters())
        source = Source(self._built_weight, inputs, type(self).__name__, inputs[0], shape, strides)
        return DenseWeight.of(source)

    @weight.setter
    def weight(self, value: object) -> NoReturn:
        refuse_parameter(type(self).__name__, "weight")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter, as every module does; but none in the place of the weight.

        Raises:
            TypeError: its name is that of the weight, or one under which torch.nn.utils keeps what
                a weight is computed from.
        """
        if name.startswith("weight"):
            refuse_parameter(type(self).__name__, name)
        super().register_parameter(name, param)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks of each module first: there is no such form."""
        raise RuntimeError(
            f"a {type(self).__name__} does not support torch.jit.script, which torch has "
            f"deprecated; use torch.export or torch.compile"
        )

    def _weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _built_weight(self) -> Tensor:
        """The dense weight in the dtype of the factors, under autocast too."""
        with no_autocast(next(self.cp.parameters())):
            return self._dense_weight()

    def _dense_weight(self) -> Tensor:
        """Build the dense weight in torch's layout, differentiably, as a plain tensor."""
        raise NotImplementedError
