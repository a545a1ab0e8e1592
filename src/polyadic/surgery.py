"""Which layers of a model can be exchanged, and how they are exchanged.

Names are matched by PEFT's rules: a string is a regular expression for a whole name, and a list
holds names or their last parts.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from polyadic.checks import check_module
from polyadic.nn.kinds import BY_DENSE, family_of
from polyadic.nn.source import attached

Value = TypeVar("Value")

EXCHANGEABLE = tuple(BY_DENSE)

# Values that are not searched for modules: a converted model needs a new optimizer anyway.
_PASSED_BY = (type, ModuleType, Optimizer)
# Attributes in which torch registers what belongs to a module; hooks are asked for separately.
_REGISTRIES = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Found:
    """Layers of a model that can be exchanged, and those that cannot.

    Attributes:
        layers: the layers by name, in the model's order; an instance in several places has the
            first of its names.
        ties: groups of names in ``layers`` whose weight is one parameter, such as an embedding and
            its output head: exchanged together or not at all.
        skipped: by name, why a layer that was selected is not in ``layers``.
    """

    layers: dict[str, nn.Module]
    ties: tuple[tuple[str, ...], ...]
    skipped: dict[str, str]

    def within(self, model: nn.Module) -> Found:
        """Return what was found in a model for a copy of it."""
        modules = dict(model.named_modules())
        return dataclasses.replace(self, layers={name: modules[name] for name in self.layers})


def find(
    model: nn.Module,
    *,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> Found:
    """Find the layers of a model that can be exchanged for CP layers.

    Layers are the modules with a matrix among their parameters, or a stack of matrices, as the
    experts of a mixture are. Exchangeable are the exact types Linear, ConvNd, ConvTransposeNd and
    Embedding of torch, since a subclass may compute something else. A layer is skipped, with the
    reason, if it is of another type, if its parent reads its weight and does not call it, if it is
    part of an adapter of PEFT, if a plain list or a function holds it too, if its weight is
    computed (weight norm, pruning), if it has hooks, or if its weight is also a parameter of
    something that stays.

    Args:
        model: any module.
        target_modules: a regular expression for whole names, or names or last parts of names; all
            layers by default.
        exclude_modules: layers to leave out, in the form of ``target_modules``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a regular expression is invalid, a target selects no layer that can be
            exchanged, or an exclusion matches no layer.
    """
    check_module(model)
    targets = _patterns(target_modules, "target_modules")
    exclusions = _patterns(exclude_modules, "exclude_modules")
    names = _names(model)
    present = {n: m for n, m in model.named_modules() if _is_layer(m)}

    def matched(pattern: re.Pattern[str]) -> list[str]:
        return [n for n, m in present.items() if any(pattern.fullmatch(a) for a in names[id(m)])]

    by_target = {written: matched(pattern) for written, pattern in targets.items()}
    by_exclusion = {written: matched(pattern) for written, pattern in exclusions.items()}
    excluded = {name for found in by_exclusion.values() for name in found}
    wanted = {name for found in by_target.values() for name in found}
    chosen = {n: m for n, m in present.items() if target_modules is None or n in wanted}
    chosen = {n: m for n, m in chosen.items() if n not in excluded}

    claimed, elsewhere = _claimed(model), kept_elsewhere(model)
    reasons = {
        n: claimed.get(id(m)) or _why_not(n, m) or elsewhere.get(id(m)) for n, m in chosen.items()
    }
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    layers = {n: m for n, m in chosen.items() if n not in skipped}
    ties = _untangle(model, layers, skipped)

    for written, found in by_target.items():
        if not any(name in layers for name in found):
            why = [f"{n} {skipped.get(n, 'is excluded')}" for n in found]
            _selects_nothing("target_modules", written, why, present)
    for written, found in by_exclusion.items():
        if not found:
            _selects_nothing("exclude_modules", written, [], present)
    return Found(layers, ties, skipped)


def together(found: Found) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Iterate over groups of layers that are exchanged together, since they share one weight.

    Yields:
        The names of a group, with an embedding before its head, which is made from it; and why
        these layers cannot have a CP weight in common, or None.
    """
    tied = {name: group for group in found.ties for name in group}
    done: set[str] = set()
    for name in found.layers:
        if name in done:
            continue
        group = sorted(
            tied.get(name, (name,)), key=lambda n: family_of(found.layers[n]) != "embedding"
        )
        done.update(group)
        yield tuple(group), _mixed([found.layers[n] for n in group])


def is_head(table: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer that shares a table's weight is its output head."""
    return family_of(table) == "embedding" and family_of(layer) == "linear"


def _mixed(layers: Sequence[nn.Module]) -> str | None:
    """Return the reason why tied layers cannot share factors, or None."""
    first = layers[0]
    for layer in layers[1:]:
        if type(layer) is not type(first) and not is_head(first, layer):
            kinds = " and ".join(dict.fromkeys(type(each).__name__ for each in layers))
            return f"shares its weight among {kinds}, which have no CP weight in common"
    return None


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where a layer stands, in every place that holds the same instance.

    The new module takes over the training flag. If the old layer's bias is a parameter of other
    modules too, they get the new layer's bias, so that it stays one parameter.

    Args:
        model: the model, changed in place.
        name: name of the layer, one of ``model.named_modules()``.
        module: the module to put there.

    Raises:
        ValueError: no module has this name, or it is the model itself.
    """
    places: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    old = places.get(name)
    if old is None:
        raise ValueError(f"{type(model).__name__} has no module named {name!r}")
    if old is model:
        raise ValueError("a model cannot be replaced within itself; put it into another module")
    module.train(old.training)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = module
    bias, new = old._parameters.get("bias"), module._parameters.get("bias")
    if bias is not None and new is not None and bias is not new:
        for owner in model.modules():
            for key, parameter in owner._parameters.items():
                if parameter is bias:
                    owner._parameters[key] = new


def by_pattern(
    patterns: Mapping[str, Value] | None, names: Iterable[str], what: str
) -> dict[str, Value]:
    """Look up a value for each name, by the rule of PEFT's ``rank_pattern``.

    A key is a regular expression for a whole name or its last parts; the first key that matches
    counts.

    Args:
        patterns: values by key; None for no values.
        names: names of layers.
        what: name of the argument, for messages.

    Returns:
        The value of each name that a key matches.

    Raises:
        TypeError: ``patterns`` is not a dict with strings for keys.
        ValueError: a key is an invalid regular expression or matches none of the names.
    """
    if patterns is None:
        return {}
    if not isinstance(patterns, Mapping) or not all(isinstance(key, str) for key in patterns):
        raise TypeError(f"{what} must be a dict with patterns of names for keys, got {patterns!r}")
    names = list(names)
    compiled = {key: _compile(rf"(?:.*\.)?(?:{key})", key, what) for key in patterns}
    for key, pattern in compiled.items():
        if not any(pattern.fullmatch(name) for name in names):
            _selects_nothing(what, key, [], names)
    found: dict[str, Value] = {}
    for name in names:
        matching = [key for key, pattern in compiled.items() if pattern.fullmatch(name)]
        if matching:
            found[name] = patterns[matching[0]]
    return found


def _patterns(value: Any, what: str) -> dict[str, re.Pattern[str]]:
    """Compile patterns for whole names; they are keyed by what the user wrote."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {value: _compile(value, value, what)}
    if not isinstance(value, (Sequence, set, frozenset)) or isinstance(value, (bytes, bytearray)):
        raise TypeError(f"{what} must be a string or a list of strings, got {value!r}")
    if not all(isinstance(one, str) for one in value):
        raise TypeError(f"{what} must hold strings alone, got {value!r}")
    if not value and what == "target_modules":
        raise ValueError("target_modules is empty, so that it selects no layer; None selects all")
    return {one: re.compile(rf"(?:.*\.)?{re.escape(one)}") for one in value}


def _compile(expression: str, written: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{what}: {written!r} is no regular expression: {error}") from error


def _selects_nothing(what: str, written: str, why: list[str], names: Iterable[str]) -> None:
    if why:
        raise ValueError(
            f"{what}: {written!r} selects no layer that can be exchanged: {'; '.join(why)}"
        )
    some = list(names)
    shown = ", ".join(some[:8]) + (", ..." if len(some) > 8 else "")
    raise ValueError(
        f"{what}: {written!r} matches none of the layers ({shown or 'there is none'}); a string is "
        f"a regular expression for a whole name, a list holds names or their last parts"
    )


def _names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return all names of every module instance."""
    names: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)] = (*names.get(id(module), ()), name)
    return names


def _is_layer(module: nn.Module) -> bool:
    """Whether a module counts as a layer, which is exchanged or skipped with a reason."""
    return isinstance(module, EXCHANGEABLE) or bool(matrices(module))


def matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's own weights of two or more modes, and stacks of matrices of any name.

    Parameters of two modes that are not called weights, such as tables of positions, are left out.
    """
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None
        and not is_lazy(parameter)
        and (("weight" in name and parameter.dim() >= 2) or is_stack(parameter))
    }


def is_stack(parameter: Tensor) -> bool:
    """Whether a parameter has three or more modes that are not 1."""
    return sum(size != 1 for size in parameter.shape) >= 3


def _claimed(model: nn.Module) -> dict[int, str]:
    """Find layers whose parent reads their weight and does not call them, and those of adapters."""
    found: dict[int, str] = {}
    for parent in model.modules():
        # PEFT's layers name the attributes in which they keep the layers of adapters.
        for held in getattr(parent, "adapter_layer_names", ()):
            if (parts := parent._modules.get(held)) is not None:
                reason = "is part of an adapter, which PEFT merges and saves as it is"
                found.update((id(layer), reason) for layer in parts.modules())
        if isinstance(parent, nn.MultiheadAttention):
            found[id(parent.out_proj)] = "is not called: nn.MultiheadAttention reads its weight"
        if isinstance(parent, nn.TransformerEncoderLayer):
            for layer in (parent.linear1, parent.linear2):
                found[id(layer)] = (
                    "is not called in evaluation: the fast path of nn.TransformerEncoderLayer "
                    "reads its weight"
                )
    return found


def _why_not(name: str, layer: nn.Module) -> str | None:
    """Return the reason why a layer cannot be exchanged, or None."""
    kind = type(layer)
    if kind not in EXCHANGEABLE:
        bases = [base.__name__ for base in EXCHANGEABLE if isinstance(layer, base)]
        of = f"a subclass of {bases[0]}" if bases else "not Linear, ConvNd or Embedding"
        stacks = [
            f"{key} {tuple(parameter.shape)}"
            for key, parameter in matrices(layer).items()
            if not bases and is_stack(parameter)
        ]
        if stacks:
            of += f"; stacks of matrices such as {' and '.join(stacks)} have no CP layer yet"
        return f"is {kind.__name__} of {kind.__module__}, {of}"
    if name == "":
        return "is the model itself, not a part of it"
    if layer._parameters.get("weight") is None:
        return "has no weight of its own: it is computed (weight norm, pruning)"
    return reason_to_keep(layer)


def kept_elsewhere(model: nn.Module) -> dict[int, str]:
    """Find modules that a part of a model keeps outside its registry of modules.

    If another module took the place of such a module, the old one would still be called. The
    attributes of all modules are searched: lists, tuples, sets and dicts, partial functions, bound
    methods, the variables that functions close over, and objects one level deep.

    Returns:
        By ``id`` of the module, the reason for which ``find`` skips it.
    """
    owners = {id(module): module for module in model.modules()}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), module)
    found: dict[int, str] = {}
    for name, parent in model.named_modules():
        attributes = {k: v for k, v in vars(parent).items() if k not in _REGISTRIES}
        for key, value in attributes.items():
            for kept in _reached(value, set(), 1):
                # What a module holds of itself, such as its bound method, is replaced with it.
                if (owner := owners.get(id(kept))) is not None and owner is not parent:
                    place = f"{name}.{key}" if name else key
                    found.setdefault(
                        id(owner),
                        f"is kept in {place} too, where a module put in its place would not be; "
                        f"keep it in a module's own attributes or an nn.ModuleList alone",
                    )
    return found


def _reached(value: Any, seen: set[int], objects: int) -> Iterator[Any]:
    """Iterate over modules and parameters that a value leads to, by containers and functions."""
    if isinstance(value, (nn.Module, nn.Parameter)):
        yield value
        return
    inner: Iterable[Any] = ()
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        inner = value
    elif isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, functools.partial):
        inner = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        inner = (value.__self__, value.__func__)
    elif isinstance(value, FunctionType):
        inner = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        inner = (*inner, *(value.__defaults__ or ()))
    elif objects and hasattr(value, "__dict__") and not isinstance(value, _PASSED_BY):
        inner, objects = vars(value).values(), objects - 1
    if id(value) in seen:
        return
    seen.add(id(value))
    for part in tuple(inner):
        if not isinstance(part, (str, bytes, int, float, bool, type(None))):
            yield from _reached(part, seen, objects)


def _is_filled(cell: CellType) -> bool:
    """Whether a variable that a function closes over has a value yet."""
    try:
        cell.cell_contents  # noqa: B018 - to see whether it raises
    except ValueError:
        return False
    return True


def reason_to_keep(layer: nn.Module) -> str | None:
    """Return what is attached to a layer and would be lost with it, as a reason, or None."""
    found = attached(layer)
    return None if found is None else f"has {found}, which would be lost"


def _untangle(
    model: nn.Module, layers: dict[str, nn.Module], skipped: dict[str, str]
) -> tuple[tuple[str, ...], ...]:
    """Group layers with one weight; move those tied to something that stays to ``skipped``."""
    owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, key, module))
    ties: list[tuple[str, ...]] = []
    for name, layer in list(layers.items()):
        group = owners[id(layer._parameters["weight"])]
        if len(group) == 1 or name not in layers:
            continue
        stays = [f"{n}.{key}" for n, key, _ in group if n not in layers or key != "weight"]
        if stays:
            for n, _, _ in group:
                if layers.pop(n, None) is not None:
                    skipped[n] = f"shares its weight with {', '.join(stays)}, which stays"
        elif (members := tuple(n for n, _, _ in group)) not in ties:
            ties.append(members)
    return tuple(ties)
