"""What is converted together (a layer, or layers tied by one weight), and to which formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from polyadic.formats import ConvFormat, LinearFormat, Rank, Shape
from polyadic.nn.convert import Exchangeable, shaped
from polyadic.nn.kinds import BY_DENSE
from polyadic.nn.layer import CPLayer
from polyadic.nn.source import weight_of
from polyadic.surgery import Found, is_head, together
from polyadic.tensor import CPTensor


@dataclass(frozen=True)
class Candidate:
    """A format that a target could have, whose rank is still free.

    Attributes:
        order: modes per side.
        probe: the CP layer at rank 1, without values.
    """

    order: int
    probe: CPLayer

    @property
    def modes(self) -> tuple[Shape, ...]:
        """The tensorized shape."""
        return self.probe.cp.tensorized_shape

    @property
    def per_rank(self) -> int:
        """Number of parameters of one component."""
        return self.at(1).parameters

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a plain low-rank matrix, with one mode per side; its best fit is known."""
        sides = {True: 0, False: 0}
        for i, group in enumerate(self.modes):
            sides[i in self.probe._metric_groups] += sum(mode > 1 for mode in group)
        return max(sides.values()) <= 1

    @property
    def in_words(self) -> str:
        """The format in words."""
        return "plain low rank" if self.is_low_rank else f"order {self.order}"

    def at(self, rank: int) -> LinearFormat | ConvFormat:
        """Return the format at a rank."""
        return cast(LinearFormat | ConvFormat, dataclasses.replace(self.probe.format, rank=rank))


@dataclass(frozen=True)
class Target:
    """A layer to be converted, or several that are tied by one weight.

    Attributes:
        names: names of the layers; the CP weight is fitted for the first.
        layers: the torch layers.
        candidates: formats it could have.
    """

    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    candidates: tuple[Candidate, ...]

    @property
    def name(self) -> str:
        """Name of the first layer."""
        return self.names[0]

    @property
    def layer(self) -> Any:
        """The first layer."""
        return self.layers[0]

    @property
    def weight(self) -> Tensor:
        """The dense weight, in torch's layout."""
        found: Tensor = self.layer.weight.detach()
        return found

    def asked(self, ranks: Mapping[str, Rank]) -> Rank | None:
        """Return the rank that is asked for by the name of one of the layers, or None."""
        return next((ranks[name] for name in self.names if name in ranks), None)

    @property
    def dense_parameters(self) -> int:
        """Number of entries of the weight."""
        return self.weight.numel()

    def weight_to_fit(self, candidate: Candidate) -> Tensor:
        """Return the weight in the layout in which a CP tensor of a format is fitted to it."""
        return candidate.probe._fit_target(self.weight)

    def converted(self, cp: CPTensor) -> dict[str, nn.Module]:
        """Make the layers in CP format with a fitted weight, by name; tied ones share factors."""
        kind = BY_DENSE[type(self.layer)]
        first = kind.make(self.layer, cp=cp)
        found: dict[str, nn.Module] = {self.name: first}
        for name, layer in zip(self.names[1:], self.layers[1:], strict=True):
            if is_head(self.layer, layer):
                found[name] = first.as_linear(False if layer.bias is None else layer.bias)
                continue
            other = kind.make(layer, cp=cp)
            other.cp = first.cp
            found[name] = other
        return found


def find_targets(
    found: Found, orders: Sequence[int] | None, shapes: dict[str, list[tuple[Shape, Shape]]]
) -> tuple[list[Target], dict[str, str]]:
    """Arrange the layers of a model into targets; layers of one weight make one target.

    Args:
        found: what can be exchanged.
        orders: modes per side to be weighed; None for 1 to 3, and for convolutions 1 and 2.
        shapes: by name, the (in, out) modes to be weighed in place of those of the orders.

    Returns:
        The targets, and by name why a layer cannot be one.

    Raises:
        ValueError: shapes do not fit their layer, or are given for another of tied layers than the
            one whose weight is fitted.
    """
    targets, refused = [], dict(found.skipped)
    for names, reason in together(found):
        layers = tuple(found.layers[n] for n in names)
        candidates: tuple[Candidate, ...] = ()
        if reason is None:
            try:
                weights = [weight_of(layer, type(layer), "compress") for layer in layers]
                candidates = _candidates(layers[0], orders, [])
            except (TypeError, ValueError) as error:
                reason = str(error)
            else:
                if not weights[0].isfinite().all():
                    reason = "has NaN or infinity in its weight"
        if reason is None and (asked := _shapes_of(names, shapes)):
            try:
                candidates = _candidates(layers[0], orders, asked)
            except ValueError as error:
                raise ValueError(f"shapes: those of {names[0]} do not fit: {error}") from error
        if reason is not None:
            refused.update(dict.fromkeys(names, reason))
        else:
            targets.append(Target(names, layers, candidates))
    return targets, refused


def _shapes_of(
    names: Sequence[str], shapes: dict[str, list[tuple[Shape, Shape]]]
) -> list[tuple[Shape, Shape]]:
    """Return the shapes asked for; for tied layers, those given for the first."""
    first = shapes.get(names[0], [])
    for name in names[1:]:
        if shapes.get(name, first) != first:
            raise ValueError(
                f"shapes: {name} has the weight of {names[0]}, in whose modes both are fitted; "
                f"give the shapes of {names[0]} alone"
            )
    return first


def _candidates(
    layer: nn.Module, orders: Sequence[int] | None, shapes: Sequence[tuple[Shape, Shape]]
) -> tuple[Candidate, ...]:
    """The formats to be weighed, without repetition."""
    kind = BY_DENSE[type(layer)]
    weighed: list[tuple[int, dict[str, Any]]] = [
        (max(len(ins), len(outs)), {"in_shape": ins, "out_shape": outs}) for ins, outs in shapes
    ]
    if not shapes:
        weighed += [(order, {"order": order}) for order in orders or kind.orders]
    made: dict[tuple[Shape, ...], Candidate] = {}
    for order, how in weighed:
        candidate = Candidate(order, shaped(cast(type[Exchangeable], kind.cp), layer, **how))
        # Modes of size 1 change nothing but the number of parameters.
        key = tuple(tuple(mode for mode in group if mode > 1) for group in candidate.modes)
        made.setdefault(key, candidate)
    return tuple(made.values())
