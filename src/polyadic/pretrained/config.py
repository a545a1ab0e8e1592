"""The configuration file: its content, and the checks of a file that is read.

A file that is read is not trusted: every value is checked for its type and range before anything
is made of it, and classes are looked up in a fixed table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from polyadic.nn.kinds import BY_NAME
from polyadic.plans import MEMORY
from polyadic.pretrained.layers import DTYPES, LayerConfig

FORMAT_VERSION = 1
LARGEST = 2**31 - 1
MOST_MODES = 64
MOST_BYTES = 2**26
_KEYS = {"format_version", "layers", "ties", "dtype", "quant_method", "saved"}


@dataclass(frozen=True)
class ModelConfig:
    """The description of a model with CP layers that is saved.

    Attributes:
        layers: its CP layers by name.
        ties: by the name of a parameter that is shared, the name under which it is stored.
        dtype: the dtype of the model as a whole, if it has one.
        saved: the mark of the save it was written by, if it has one.
    """

    layers: dict[str, LayerConfig]
    ties: dict[str, str] = field(default_factory=dict)
    dtype: str | None = None
    saved: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "layers": {name: _layer_to_dict(layer) for name, layer in self.layers.items()},
        }
        if self.ties:
            content["ties"] = self.ties
        if self.dtype is not None:
            content["dtype"] = self.dtype
        return content

    @classmethod
    def from_dict(cls, content: Any) -> ModelConfig:
        """Check plain data and make a configuration of it.

        Raises:
            ValueError: something is missing, unknown, of another type or out of range.
        """
        if not isinstance(content, dict) or not isinstance(content.get("layers"), dict):
            raise ValueError("it describes no CP layers: it must be an object with 'layers'")
        version: Any = content.get("format_version")
        if not _is_int(version) or version < 1:
            raise ValueError(f"format_version must be a positive integer, got {version!r:.80}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"it has format_version {version}, and this polyadic reads up to "
                f"{FORMAT_VERSION}; install a newer one"
            )
        if unknown := sorted(set(content) - _KEYS):
            raise ValueError(f"it has unknown entries: {', '.join(unknown):.200}")
        layers = {name: _layer_from(name, entry) for name, entry in content["layers"].items()}
        for name, layer in layers.items():
            owner = None if layer.tied_to is None else layers.get(layer.tied_to)
            if layer.tied_to is not None and (owner is None or owner.tied_to is not None):
                raise ValueError(
                    f"layer {name!r:.80} is tied to {layer.tied_to!r:.80}, which is no layer with "
                    f"a tensor of its own"
                )
            if layer.family == "head" and (owner is None or owner.family != "embedding"):
                raise ValueError(f"layer {name!r:.80} must be tied to a CPEmbedding")
        ties = content.get("ties", {})
        if not isinstance(ties, dict) or not all(isinstance(value, str) for value in ties.values()):
            raise ValueError(f"ties must be names by names, got {ties!r:.80}")
        dtype = content.get("dtype")
        if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r:.80}")
        saved = content.get("saved")
        if saved is not None and not isinstance(saved, str):
            raise ValueError(f"saved must be the mark of a save, got {saved!r:.80}")
        return cls(layers, ties, dtype, saved)


def dumps(config: ModelConfig, mark: str) -> str:
    """Write a configuration with the mark of a save as JSON, a line for each layer."""
    content = {**config.to_dict(), "saved": mark}
    layers = [f"{json.dumps(n)}: {json.dumps(entry)}" for n, entry in content.pop("layers").items()]
    head = json.dumps(content, indent=1).removesuffix("\n}")
    return head + ',\n "layers": {\n  ' + ",\n  ".join(layers) + "\n }\n}\n"


def loads(text: str | bytes) -> Any:
    """Read strict JSON: without NaN, and without an entry given twice.

    Raises:
        ValueError: the text is not strict JSON, is too long or is nested too deeply.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has {len(text)} bytes, more than the {MOST_BYTES} that are read")
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has an entry twice")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _layer_to_dict(layer: LayerConfig) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "class": layer.kind,
        "arguments": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in layer.arguments.items()
        },
        "dtype": str(layer.dtype).split(".")[1],
    }
    if layer.weights:
        entry["weights"] = True
    if layer.joint is not None:
        entry["joint"] = {"layers": list(layer.joint[0]), "index": list(layer.joint[1])}
    if layer.tied_to is not None:
        entry["tied_to"] = layer.tied_to
    return entry


def _layer_from(name: str, entry: Any) -> LayerConfig:
    try:
        return _checked_layer(entry)
    except ValueError as error:
        raise ValueError(f"layer {name!r:.80}: {error}") from None


def _checked_layer(entry: Any) -> LayerConfig:
    known = {"class", "arguments", "dtype", "weights", "joint", "tied_to"}
    if not isinstance(entry, dict) or not {"class", "arguments", "dtype"} <= set(entry) <= known:
        raise ValueError(f"must be an object with class, arguments and dtype, got {entry!r:.80}")
    kind, dtype, tied_to = entry["class"], entry["dtype"], entry.get("tied_to")
    if not isinstance(kind, str) or kind not in BY_NAME:
        raise ValueError(f"class must be one of {', '.join(BY_NAME)}, got {kind!r:.80}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r:.80}")
    if not isinstance(entry.get("weights", False), bool):
        raise ValueError(f"weights must be true or false, got {entry['weights']!r:.80}")
    if tied_to is not None and not isinstance(tied_to, str):
        raise ValueError(f"tied_to must be the name of a layer, got {tied_to!r:.80}")
    return LayerConfig(
        kind,
        _arguments(entry["arguments"], BY_NAME[kind].arguments),
        DTYPES[dtype],
        entry.get("weights", False),
        None if entry.get("joint") is None else _joint(entry["joint"]),
        tied_to,
    )


def _arguments(given: Any, kinds: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(given, dict) or set(given) != set(kinds):
        raise ValueError(f"arguments must be exactly {', '.join(kinds)}, got {given!r:.200}")
    checked = {}
    for key, kind in kinds.items():
        value = given[key]
        if isinstance(value, list):
            value = tuple(value)
        if not _CHECKS[kind](value):
            raise ValueError(f"{key} is out of range or of the wrong type, got {given[key]!r:.80}")
        checked[key] = value
    if checked.get("memory", MEMORY[0]) not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {given['memory']!r:.80}")
    return checked


def _joint(given: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(given, dict) and set(given) == {"layers", "index"}:
        layers, index = given["layers"], given["index"]
        if isinstance(layers, list) and isinstance(index, list) and len(layers) == len(index):
            pairs = list(zip(layers, index, strict=True))
            if 0 < len(pairs) <= MOST_MODES and all(
                _is_size(size) and _is_int(row) and 0 <= row < size for size, row in pairs
            ):
                return tuple(layers), tuple(index)
    raise ValueError(f"joint must have layers and an index into them, got {given!r:.80}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_int(value) and 1 <= value <= LARGEST


def _are_sizes(value: Any) -> bool:
    """Whether a value has one to three sizes; 0 is allowed, as padding may be 0."""
    return (
        isinstance(value, tuple)
        and 1 <= len(value) <= 3
        and all(_is_int(size) and 0 <= size <= LARGEST for size in value)
    )


def _are_modes(value: Any) -> bool:
    return isinstance(value, tuple) and 1 <= len(value) <= MOST_MODES and all(map(_is_size, value))


def _are_numbers(value: Any) -> bool:
    """Whether a value is None or one to three numbers."""
    return value is None or (
        isinstance(value, tuple)
        and 1 <= len(value) <= 3
        and all(_is_int(number) or isinstance(number, float) for number in value)
    )


def _is_padding(value: Any) -> bool:
    return value in ("same", "valid") if isinstance(value, str) else _are_sizes(value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "size": _is_size,
    "sizes": _are_sizes,
    "modes": _are_modes,
    "modes or none": lambda value: value == () or _are_modes(value),
    "numbers": _are_numbers,
    "padding": _is_padding,
    "index": lambda value: value is None or (_is_int(value) and 0 <= value <= LARGEST),
    "flag": lambda value: isinstance(value, bool),
    "text": lambda value: isinstance(value, str) and len(value) <= 20,
}
