"""The weighted sum of adapters as one: its components are theirs side by side, or fewer, fitted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polyadic.adapters.config import CPConfig, exact_pattern, names_pattern
from polyadic.adapters.layer import AdaptedLayer, Groups, matrix
from polyadic.fitting import decompose
from polyadic.formats import Shape
from polyadic.tensor import CPTensor

# Factors in the order of a CPTensor, and λ where layers share them.
Values = tuple[list[Tensor], Tensor | None]
Key = tuple[type[AdaptedLayer], tuple[Shape, ...]]


@torch.no_grad()
def combined(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    rank: int | None,
) -> tuple[CPConfig, dict[str, Values], dict[str, float]]:
    """The configuration of Σ w_i ΔW_i; the values of its factors and its error, by layers' names.

    Where every adapter shares its factors over layers, with one tensor for each kind and shape, so
    does the sum: its factors are theirs, and λ of a layer that one of them leaves out has zeros in
    its place. Otherwise, and where they are fitted, each layer gets factors of its own.

    Args:
        tuner: the ``CPModel``.
        adapters: names.
        weights: w_i, one for each.
        name: of the sum.
        rank: to fit the sum in each layer; None for the sum of ranks, which is exact.

    Raises:
        ValueError: see ``CPModel.add_weighted_adapter``.
    """
    _check(tuner, adapters, weights, name)
    layers = {
        key: module
        for key, module in tuner.model.named_modules()
        if isinstance(module, AdaptedLayer) and any(a in module.polyadic_cp for a in adapters)
    }
    modes = {key: _modes(layer, adapters, key) for key, layer in layers.items()}
    shared = None if rank is not None else _shared(tuner, layers.values(), adapters)
    values = {
        key: _own(layer, adapters, weights)
        if shared is None
        else _of_shared(layer, shared[type(layer), modes[key]], adapters, weights)
        for key, layer in layers.items()
    }
    errors = dict.fromkeys(values, 0.0)
    if rank is not None:
        for key, (factors, _) in values.items():
            fit, errors[key] = _fitted(layers[key], factors, modes[key], rank)
            values[key] = fit, None
    ranks = {exact_pattern(key): factors[0].shape[1] for key, (factors, _) in values.items()}
    config: CPConfig = replace(
        tuner.peft_config[adapters[0]],
        r=max(ranks.values()),
        share="none" if shared is None else "layers",
        target_modules=names_pattern(layers),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        in_shape_pattern={
            exact_pattern(k): list(modes[k][layer.in_groups[0]]) for k, layer in layers.items()
        },
        out_shape_pattern={
            exact_pattern(k): list(modes[k][layer.out_group]) for k, layer in layers.items()
        },
        init_weights=True,
    )
    return config, values, errors


def _check(tuner: Any, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    if name in tuner.peft_config:
        raise ValueError(f"there is an adapter {name!r} already; delete it or choose another name")
    if not adapters or len(weights) != len(adapters):
        raise ValueError(
            f"give one weight for each adapter, got {len(weights)} for {len(adapters)} adapters"
        )
    for adapter in adapters:
        if adapter not in tuner.peft_config:
            raise ValueError(f"Adapter {adapter} does not exist")
        config = tuner.peft_config[adapter]
        for option, off in (("modules_to_save", None), ("bias", "none")):
            if getattr(config, option) != off:
                raise ValueError(
                    f"adapters with {option} cannot be added up, as whole modules or biases have "
                    f"no sum of components; {adapter!r} has {option}={getattr(config, option)!r}"
                )


def _modes(layer: AdaptedLayer, adapters: Sequence[str], name: str) -> tuple[Shape, ...]:
    found = {layer.cp(a).tensorized_shape for a in adapters if a in layer.polyadic_cp}
    if len(found) > 1:
        raise ValueError(
            f"adapters can be added up where their factors have the same modes, but those of "
            f"{name} have {' and '.join(map(str, sorted(found)))}"
        )
    (modes,) = found
    return tuple(modes)


def _shared(
    tuner: Any, layers: Iterable[AdaptedLayer], adapters: Sequence[str]
) -> dict[Key, dict[str, CPTensor]] | None:
    """The shared factors of each kind and shape by adapter; None where they are not all shared."""
    if any(tuner.peft_config[adapter].share != "layers" for adapter in adapters):
        return None
    found: dict[Key, dict[str, CPTensor]] = {}
    for layer in layers:
        for adapter in adapters:
            if adapter in layer.polyadic_cp:
                cp = layer.cp(adapter)
                tensors = found.setdefault((type(layer), cp.tensorized_shape), {})
                if tensors.setdefault(adapter, cp) is not cp:
                    return None
    return found


def _own(layer: AdaptedLayer, adapters: Sequence[str], weights: Sequence[float]) -> Values:
    parts = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter in layer.polyadic_cp:
            groups, rows = layer.scaled_parts(adapter)
            first, *rest = [factor for group in groups for factor in group]
            parts.append([first * weight if rows is None else first * rows * weight, *rest])
    return [torch.cat(factors, 1) for factors in zip(*parts, strict=True)], None


def _fitted(
    layer: AdaptedLayer, factors: Sequence[Tensor], modes: tuple[Shape, ...], rank: int
) -> tuple[list[Tensor], float]:
    """Fewer components for the sum of many, and ‖ΔW − ΔŴ‖ / ‖ΔW‖, which is 0 where ΔW = 0."""
    half = len(modes[0])
    weight = matrix(factors[:half], factors[half:], None)
    fit = decompose(weight.view([size for group in modes for size in group]), modes, rank)
    made = [factor.detach() for factor in fit.cp.factors]
    # A table has fewer rows than its modes, so that the fit's own error is of more than ΔW.
    wanted, found = (layer.dense(_grouped(each, modes), None) for each in (factors, made))
    size = torch.linalg.vector_norm(wanted).item()
    return made, torch.linalg.vector_norm(found - wanted).item() / size if size else 0.0


def _grouped(factors: Sequence[Tensor], modes: tuple[Shape, ...]) -> Groups:
    given = iter(factors)
    return tuple(tuple(itertools.islice(given, len(group))) for group in modes)


def _of_shared(
    layer: AdaptedLayer,
    tensors: dict[str, CPTensor],
    adapters: Sequence[str],
    weights: Sequence[float],
) -> Values:
    every, rows = [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        cp = tensors.get(adapter)
        if cp is None:
            continue
        every.append(list(cp.factors))
        own = layer.parts(adapter)[1] if adapter in layer.polyadic_cp else None
        rows.append(
            cp.factors[0].new_zeros(cp.rank)
            if own is None
            else own * (weight * layer.scaling[adapter])
        )
    return [torch.cat(factors, 1) for factors in zip(*every, strict=True)], torch.cat(rows)
