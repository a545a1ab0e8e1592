"""The description of a CP layer that is saved, and the layer that is made from it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyadic.formats import Shape
from polyadic.nn.kinds import BY_CP, BY_NAME, Family, Kind, family_of, is_cp
from polyadic.tensor import CPSlice, CPTensor

DTYPES = {
    str(d).split(".")[1]: d
    for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
}


@dataclass(frozen=True)
class LayerConfig:
    """A CP layer without its values.

    Attributes:
        kind: name of its class, a key of ``nn.kinds.BY_NAME``.
        arguments: arguments of its constructor, except device and dtype.
        dtype: dtype of its factors.
        weights: whether its tensor owns a λ.
        joint: for one of several layers that share a tensor, how many there are and which of them
            it is, with an int for each layer mode.
        tied_to: name of the layer whose tensor it shares; None if it owns its tensor.
    """

    kind: str
    arguments: dict[str, Any]
    dtype: torch.dtype
    weights: bool = False
    joint: tuple[Shape, Shape] | None = None
    tied_to: str | None = None

    @property
    def row(self) -> Kind:
        """The row of the table of kinds."""
        return BY_NAME[self.kind]

    @property
    def family(self) -> Family:
        """The family of its kind."""
        return self.row.family


def describe(model: nn.Module) -> dict[str, LayerConfig]:
    """Describe every CP layer of a model, by name; a layer in several places has its first name.

    Raises:
        ValueError: a layer cannot be made again from what is written down.
    """
    layers = {n: m for n, m in model.named_modules() if is_cp(m)}
    for name, layer in layers.items():
        if type(layer) not in BY_CP:
            raise ValueError(
                f"{name or 'the model'} is {type(layer).__name__}, a class of its own; CP layers "
                f"that can be saved are polyadic's {', '.join(BY_NAME)}"
            )
    owners = _owners(layers)
    configs = {name: _describe(name, layer, owners) for name, layer in layers.items()}
    for name, config in configs.items():
        if config.family == "head":
            _check_head(name, config, configs)
    return configs


def _tensor(layer: Any) -> CPTensor:
    """The tensor that owns a layer's parameters."""
    cp: CPTensor = layer.cp
    return cp.joint if isinstance(cp, CPSlice) else cp


def _owners(layers: Mapping[str, nn.Module]) -> dict[int, str]:
    """Name for each tensor the layer that is made first: an embedding, if one has the tensor."""
    owners: dict[int, str] = {}
    embeddings_first = sorted(layers.items(), key=lambda item: family_of(item[1]) != "embedding")
    for name, layer in embeddings_first:
        # A head is made from its embedding, and so owns no tensor.
        if family_of(layer) != "head":
            owners.setdefault(id(_tensor(layer)), name)
    return owners


def _describe(name: str, layer: Any, owners: Mapping[int, str]) -> LayerConfig:
    kind = BY_CP[type(layer)]
    tensor = _tensor(layer)
    arguments = {key: _plain(getattr(layer, key)) for key in kind.arguments if key != "bias"}
    if "bias" in kind.arguments:
        arguments["bias"] = layer.bias is not None
    owner = owners.get(id(tensor))
    dtypes = {factor.dtype for factor in tensor.factors}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES.values()):
        raise ValueError(
            f"the factors of {name or 'the model'} must have one dtype of {', '.join(DTYPES)}, got "
            f"{', '.join(sorted(map(str, dtypes)))}"
        )
    joint = None
    if isinstance(layer.cp, CPSlice):
        modes = tensor.tensorized_shape[: tensor.layer_modes]
        joint = tuple(mode for (mode,) in modes), layer.cp.index
    return LayerConfig(
        kind.name,
        arguments,
        dtypes.pop(),
        tensor.weights is not None,
        joint,
        None if owner == name else owner,
    )


def _check_head(name: str, head: LayerConfig, configs: Mapping[str, LayerConfig]) -> None:
    """Check that the model has an embedding of the head's size with the head's tensor."""
    owner = None if head.tied_to is None else configs[head.tied_to]
    if (
        owner is None
        or owner.family != "embedding"
        or _head_sizes(owner) != {key: head.arguments[key] for key in _head_sizes(owner)}
    ):
        raise ValueError(
            f"{name or 'the model'} shares the factors of a CPEmbedding that is not in the model; "
            f"save a model that holds both"
        )


def _head_sizes(embedding: LayerConfig) -> dict[str, int]:
    """Return the sizes of the output head of an embedding."""
    of = embedding.arguments
    return {"in_features": of["embedding_dim"], "out_features": of["num_embeddings"]}


def head_of(embedding: LayerConfig, name: str, bias: bool) -> LayerConfig:
    """Describe the output head that is tied to an embedding of that name."""
    return LayerConfig(
        "CPTiedLinear",
        {**_head_sizes(embedding), "bias": bias},
        embedding.dtype,
        embedding.weights,
        embedding.joint,
        embedding.tied_to or name,
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (tuple, list)) else value


def build(
    configs: Mapping[str, LayerConfig], present: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Make the layers on the meta device; layers that shared a tensor share one again.

    Args:
        configs: layers by name.
        present: those of them that are there already and stay.

    Raises:
        ValueError: a layer cannot be made of what is written down.
    """
    made = dict(present)
    # Layers that own a tensor are made before those that share it.
    for name, config in sorted(configs.items(), key=lambda item: item[1].tied_to is not None):
        if name not in made:
            owner = None if config.tied_to is None else made[config.tied_to]
            made[name] = _made(name, config, owner)
    return {name: made[name] for name in configs if name not in present}


def _made(name: str, config: LayerConfig, owner: nn.Module | None) -> nn.Module:
    try:
        return _build(config, owner)
    # torch raises a RuntimeError for sizes that overflow.
    except (TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
        raise ValueError(f"layer {name!r:.80} cannot be made: {error}") from error


def _build(config: LayerConfig, owner: Any) -> nn.Module:
    cls: Any = config.row.cp
    if config.family == "head":
        head: nn.Module = cls(owner, config.arguments["bias"])
        sizes = {key: getattr(head, key) for key in ("in_features", "out_features")}
        if any(config.arguments[key] != size for key, size in sizes.items()):
            raise ValueError(f"the embedding it is tied to makes it a layer of {sizes}")
        if config.joint is not None:
            head.cp = _tensor(owner).layer(*config.joint[1])
        return head
    # A spectral convolution is told the dtype of its maps, which are real.
    dtype = config.dtype.to_real() if config.family == "spectral" else config.dtype
    layer: Any = cls(**config.arguments, device="meta", dtype=dtype)
    modes = () if config.joint is None else config.joint[0]
    shape: list[int | Shape] = [*modes, *layer.cp.tensorized_shape]
    tensor = CPTensor(shape, layer.rank, weights=config.weights, device="meta", dtype=config.dtype)
    if owner is not None:
        shared = _tensor(owner)
        has, wants = _sizes(shared), _sizes(tensor)
        if has != wants:
            raise ValueError(
                f"it needs a tensor of {wants}, and {config.tied_to!r} has one of {has}"
            )
        tensor = shared
    layer.cp = tensor if config.joint is None else tensor.layer(*config.joint[1])
    made: nn.Module = layer
    return made


def _sizes(tensor: CPTensor) -> dict[str, Any]:
    return {
        "tensorized_shape": tensor.tensorized_shape,
        "layer_modes": tensor.layer_modes,
        "rank": tensor.rank,
        "weights": tensor.weights is not None,
        "dtype": tensor.factors[0].dtype,
    }


def differences(config: LayerConfig, module: nn.Module, own: LayerConfig | None) -> list[str]:
    """List how a module of a skeleton differs from the layer that shall take its place.

    A torch layer must have equal sizes and options; a CP layer must have equal shapes of factors
    too, but may be computed differently (``memory``), which is kept.

    Args:
        config: the description of the layer.
        module: the module in its place.
        own: the description of that module, if it is a CP layer.
    """
    if own is not None:
        wants, has = _facts(config), _facts(own)
    elif type(module) is config.row.dense:
        wants, has = _arguments_of_both(config, module)
    else:
        fitting = [kind.__name__ for kind in (config.row.dense, config.row.cp) if kind is not None]
        return [f"it is {type(module).__name__}, not {' or '.join(fitting)}"]
    return [
        f"{key} is {has.get(key)!r}, not {value!r}"
        for key, value in wants.items()
        if has.get(key) != value
    ]


def of_another_size(config: LayerConfig, module: nn.Module) -> bool:
    """Whether a torch layer differs from what was saved only in numbers of features or rows."""
    if type(module) is not config.row.dense:
        return False
    wants, has = _arguments_of_both(config, module)
    differing = {key for key, value in wants.items() if has.get(key) != value}
    sizes = {key for key, kind in config.row.shared.items() if kind == "size"}
    return bool(differing) and differing <= sizes - {"groups"}


def _arguments_of_both(
    config: LayerConfig, module: nn.Module
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constructor's arguments that a layer needs, and those of the torch layer there."""
    wants = {key: config.arguments[key] for key in config.row.shared} | {**config.row.required}
    has = {key: _plain(getattr(module, key)) for key in wants if key != "bias"}
    if "bias" in wants:
        has["bias"] = module.bias is not None
    return wants, has


def _facts(config: LayerConfig) -> dict[str, Any]:
    arguments = {key: value for key, value in config.arguments.items() if key != "memory"}
    facts = {key: getattr(config, key) for key in ("kind", "dtype", "weights", "joint", "tied_to")}
    return facts | arguments
