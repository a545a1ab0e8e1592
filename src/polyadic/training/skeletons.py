"""``polyadic.factorize``: fresh CP layers in the place of an untrained model's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

from torch import nn

from polyadic import surgery
from polyadic.checks import check_function
from polyadic.formats import Rank, Shape, positive_int
from polyadic.nn.convert import Exchangeable, shaped
from polyadic.nn.kinds import BY_DENSE, family_of
from polyadic.nn.wrapped import check_unwrapped
from polyadic.planner.search import NoRankError
from polyadic.pretrained import attach

Model = TypeVar("Model", bound=nn.Module)
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Exchanged:
    """One layer that became a CP layer.

    Attributes:
        name: name of the layer in the model.
        kind: class of the CP layer.
        modes: its tensorized shape.
        rank: R.
        dense_parameters: entries of the weight it had; 0 for one that shares another's.
        parameters: entries of its factors; 0 for one that shares another's.
    """

    name: str
    kind: str
    modes: tuple[Shape, ...]
    rank: int
    dense_parameters: int
    parameters: int


@dataclass(frozen=True)
class FactorizeReport:
    """What ``polyadic.factorize`` did, and did not, so that every parameter is accounted for.

    Attributes:
        layers: those that became CP layers.
        left: by name, why a layer with a weight stays as it is.
        dense_parameters: parameters of the model before.
        parameters: parameters of the model now.
    """

    layers: tuple[Exchanged, ...]
    left: dict[str, str]
    dense_parameters: int
    parameters: int

    @property
    def untouched_parameters(self) -> int:
        """Parameters that are neither an exchanged weight nor a factor, as biases are."""
        return self.parameters - sum(layer.parameters for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {**asdict(self), "untouched_parameters": self.untouched_parameters}

    def __str__(self) -> str:
        before = sum(layer.dense_parameters for layer in self.layers)
        after = sum(layer.parameters for layer in self.layers)
        lines = [
            f"{len(self.layers)} layers in CP format: {before:,} parameters became {after:,}; "
            f"{self.untouched_parameters:,} others stay; the model has {self.parameters:,} of "
            f"{self.dense_parameters:,}"
        ]
        lines += [
            f"  {layer.name}: {layer.kind} {_modes(layer.modes)}, rank {layer.rank}, "
            + (
                f"{layer.dense_parameters:,} -> {layer.parameters:,}"
                if layer.parameters
                else "shares the factors of another"
            )
            for layer in self.layers
        ]
        lines += [f"  {name}: left, it {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def _modes(groups: Sequence[Shape]) -> str:
    return " -> ".join("x".join(map(str, group)) for group in groups)


def factorize(
    model: Model,
    *,
    rank: Rank,
    order: int | None = None,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, Rank] | None = None,
    order_pattern: Mapping[str, int] | None = None,
    callback: Callable[[str, int, int], object] | None = None,
) -> tuple[Model, FactorizeReport]:
    """Put fresh CP layers in the place of an untrained model's layers, in place.

    Weights are drawn anew, with the variance of torch's own layers, on the device and in the dtype
    of the layer replaced; with the same ``torch.manual_seed`` they are the same. A model on the
    meta device stays there. Layers tied by one weight stay tied, by one CP tensor. For a trained
    model see ``polyadic.compress``, which fits what was learned; for learning rates
    ``polyadic.param_groups``.

    Args:
        model: any module, changed in place.
        rank: R of every layer: an int, a fraction of the dense parameters, ``"break-even"`` or
            ``"faster"``, which leaves a layer that no rank makes faster.
        order: modes per side; None for the layers' own default.
        target_modules: a regular expression for whole names, or names or last parts of names, as in
            PEFT; ``"all-linear"`` for every ``nn.Linear`` but the output head; all layers by
            default.
        exclude_modules: layers to leave alone, in the form of ``target_modules``.
        rank_pattern: other ranks, by regular expressions for names or their last parts.
        order_pattern: other orders, in the form of ``rank_pattern``.
        callback: called as ``callback(name, done, total)`` after each layer.

    Returns:
        The model, and a report of what was exchanged and of what was left and why. A layer whose CP
        weight would have at least as many parameters as its dense one is left, unless
        ``rank_pattern`` names it.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a pattern matches nothing, no layer can be exchanged, a rank or order does not
            fit, or the model is wrapped (DistributedDataParallel, DataParallel, FSDP) or sharded.
    """
    check_unwrapped(model, "factorize")
    if order is not None:
        positive_int(order, "order")
    check_function(callback, "callback")
    if isinstance(target_modules, str) and target_modules == ALL_LINEAR:
        target_modules = _all_linear(model)
    found = surgery.find(model, target_modules=target_modules, exclude_modules=exclude_modules)
    ranks = surgery.by_pattern(rank_pattern, found.layers, "rank_pattern")
    orders = surgery.by_pattern(order_pattern, found.layers, "order_pattern")
    left = dict(found.skipped)
    made: list[tuple[tuple[str, ...], Any]] = []
    for names, reason in surgery.together(found):
        first = found.layers[names[0]]
        own_order = orders.get(names[0], order)
        options = {} if own_order is None else {"order": own_order}
        if reason is None:
            cls = cast(type[Exchangeable], BY_DENSE[type(first)].cp)
            try:
                layer = shaped(cls, first, ranks.get(names[0], rank), **options)
                reason = None if names[0] in ranks else _pays(first, layer)
            except NoRankError as error:
                reason = f"would not be faster: {error}"
        if reason is not None:
            left.update(dict.fromkeys(names, reason))
        else:
            made.append((names, layer))
    if not made:
        raise ValueError(f"{type(model).__name__} has no layer to put into CP format: {left}")
    before = _count(model)
    exchanged: list[Exchanged] = []
    for names, layer in made:
        exchanged += _exchange(model, names, [found.layers[n] for n in names], layer)
        if callback is not None:
            callback(names[0], len(exchanged), sum(len(group) for group, _ in made))
    attach(model)
    return model, FactorizeReport(tuple(exchanged), left, before, _count(model))


def _all_linear(model: nn.Module) -> list[str]:
    """Return the names of all linear layers but the output head, which PEFT's word means."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = [
        name
        for name, module in model.named_modules()
        if family_of(module) == "linear" and module is not head and name
    ]
    if not names:
        raise ValueError(f"{type(model).__name__} has no nn.Linear for target_modules='all-linear'")
    return names


def _pays(dense: Any, layer: Any) -> str | None:
    """Return the reason why a layer is better left dense, or None."""
    own = sum(factor.numel() for factor in layer.cp.factors)
    if own < dense.weight.numel():
        return None
    return (
        f"has {dense.weight.numel():,} weights, no more than the {own:,} of a CP weight of rank "
        f"{layer.rank}"
    )


def _exchange(
    model: nn.Module, names: Sequence[str], dense: Sequence[Any], layer: Any
) -> list[Exchanged]:
    """Give a layer its values and put it, and those tied to it, into the model."""
    first = dense[0]
    if not first.weight.is_meta:
        layer.to_empty(device=first.weight.device)
        layer.reset_parameters()
    parameters = sum(factor.numel() for factor in layer.cp.factors)
    exchanged = []
    for name, own in zip(names, dense, strict=True):
        new: Any = layer
        if own is not first:
            if surgery.is_head(first, own):
                new = layer.as_linear(False if own.bias is None else own.bias)
            else:
                shapes = {"in_shape": layer.in_shape, "out_shape": layer.out_shape}
                new = shaped(type(layer), own, layer.rank, **shapes)
                if new.bias is not None:
                    new.bias = own.bias
                new.cp = layer.cp
        for parameter in new.cp.parameters():
            parameter.requires_grad_(own.weight.requires_grad)
        bias = getattr(own, "bias", None)
        if bias is not None:
            new.bias.requires_grad_(bias.requires_grad)
        surgery.replace(model, name, new)
        exchanged.append(
            Exchanged(
                name,
                type(new).__name__,
                layer.cp.tensorized_shape,
                layer.rank,
                first.weight.numel() if own is first else 0,
                parameters if own is first else 0,
            )
        )
    return exchanged


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
