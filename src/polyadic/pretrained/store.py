"""Saving and loading of models that hold CP layers."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from polyadic.checks import check_module
from polyadic.nn.wrapped import check_unwrapped
from polyadic.pretrained import files
from polyadic.pretrained.config import ModelConfig
from polyadic.pretrained.dense import merge_layers
from polyadic.pretrained.exchange import Exchange, fill, prepare, refuse
from polyadic.pretrained.layers import describe
from polyadic.pretrained.vocabulary import resize

Model = TypeVar("Model", bound=nn.Module)


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Save a model with CP layers: their description as JSON, all tensors as safetensors.

    ``polyadic_config.json`` holds class, arguments, rank and dtype of every CP layer and which
    parameters are shared; ``model.safetensors`` holds every parameter and persistent buffer bit by
    bit, and shared ones once. Both are written to the end before they replace older files. A
    frozen layer is saved in the state before ``polyadic.freeze``. Code is not saved: to load the
    model again, its architecture is needed as a skeleton.

    A model of transformers is saved in the format of transformers, with the CP layers in
    ``config.json``: transformers loads it after ``polyadic.register_transformers``, and so does
    ``from_pretrained``.

    Args:
        model: a module that holds CP layers, or is one.
        directory: the directory to write to, which is made if it does not exist.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no CP layer, or state that cannot be saved: an extra state, tensors on
            the meta device, sharded, sparse or quantized tensors, a subclass of a CP layer.
    """
    check_module(model)
    layers = describe(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no CP layer; save it as any torch module")
    if _is_transformers(model):
        _bridge().attach(model)
        # Tensors get the present names of the modules: some models store those of old versions.
        save = functools.partial(cast(Any, model).save_pretrained, save_original_format=False)
        files.write_by(Path(directory), save)
        return
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in state.items():
        tensor = files.storable(name, value)
        source = first.setdefault(id(value), name)
        if source != name:
            ties[name] = source
            continue
        # Two tensors that share a storage are stored as two tensors.
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in storages else tensor
        storages.add(place)
    files.write(Path(directory), ModelConfig(layers, ties), tensors)


def from_pretrained(
    directory: str | os.PathLike[str],
    model: Model,
    *,
    device: torch.device | str | None = None,
) -> Model:
    """Load what ``save_pretrained`` wrote into a model of the same architecture, in place.

    The saved CP layers take the place of the torch layers of the same names, and every parameter
    and buffer becomes what was saved, with its dtype. Layers keep the training flag and
    ``requires_grad`` of those they replace. Nothing in the files is executed. All checks come
    first: after an error the model is as it was.

    Args:
        directory: a directory with ``polyadic_config.json`` and ``model.safetensors``, or one that
            transformers wrote, in shards too.
        model: the skeleton, dense or with equal CP layers already; it may be on the meta device,
            where it needs no memory.
        device: device for what the skeleton holds on the meta device; the CPU by default.

    Returns:
        The model that was given.

    Raises:
        TypeError: ``model`` is not a module.
        FileNotFoundError: there is no such directory.
        ValueError: a file is missing, damaged, of another kind or written by a newer polyadic, or
            what it holds does not fit the model: names, shapes, options, kinds of dtypes; or the
            model is wrapped (DistributedDataParallel, DataParallel, FSDP) or sharded.
    """
    check_unwrapped(model, "from_pretrained")
    folder = Path(directory)
    with files.opened(folder) as saved:
        config = saved.config
        exchange = prepare(model, config.layers)
        _no_lost_buffers(exchange)
        sources = _sources(exchange.state, saved.shapes, config.ties, folder)
        tensors = saved.load()
    _check_dtypes(exchange.state, config, {n: tensors[s].dtype for n, s in sources.items()}, folder)
    filled = fill(exchange, tensors, sources, device)
    exchange.apply()
    model.load_state_dict(filled, strict=True, assign=True)
    attach(model)
    return model


def _no_lost_buffers(exchange: Exchange) -> None:
    """Refuse buffers on the meta device that no state dict holds, as nothing could fill them."""
    lost = [
        f"{name} is on the meta device"
        for name, buffer in exchange.model.named_buffers()
        if buffer.is_meta and name not in exchange.state
    ]
    refuse("buffers that are not saved need values; build the skeleton on a device", lost)


def _check_dtypes(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    stored: Mapping[str, torch.dtype],
    folder: Path,
) -> None:
    """Check dtypes: factors have the one described; others may differ in precision, not in kind."""
    factors = {
        name: layer.dtype
        for prefix, layer in config.layers.items()
        for name in state
        if name.startswith(f"{prefix}.cp." if prefix else "cp.")
    }
    wrong = []
    for name, like in state.items():
        wanted, got = factors.get(name, like.dtype), stored[name]
        floating = wanted.is_floating_point and got.is_floating_point
        free = name not in factors and (floating or (wanted.is_complex and got.is_complex))
        if got != wanted and not free:
            wrong.append(f"{name} is {got}, not {wanted}")
    refuse(f"dtypes in {folder} do not fit", wrong)


def _sources(
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    ties: Mapping[str, str],
    folder: Path,
) -> dict[str, str]:
    """Find for every name in a state dict the stored tensor it takes.

    A name that is not stored takes the tensor it is tied to, by the configuration or in the model.
    """
    same: dict[int, str] = {}
    for name, value in state.items():
        if name in shapes:
            same.setdefault(id(value), name)
    sources, wrong = {}, []
    for name, value in state.items():
        source = name if name in shapes else ties.get(name) or same.get(id(value))
        if source is None or source not in shapes:
            wrong.append(f"{name} is missing")
        elif shapes[source] != tuple(value.shape):
            wrong.append(f"{name} has shape {shapes[source]}, not {tuple(value.shape)}")
        else:
            sources[name] = source
    wrong += [f"{name} is unexpected" for name in sorted(set(shapes) - set(state))]
    refuse(f"tensors in {folder} do not fit the model", wrong)
    return sources


def merge(model: nn.Module) -> nn.Module:
    """Turn every CP layer of a model back into the torch layer it stands for, in place.

    The dense weights are the products of the factors, so that the model's outputs are equal up to
    rounding; names in the state dict are those of the dense model again. Biases, dtypes, the
    training flag and ``requires_grad`` are kept; layers that share a CP tensor share the weight
    too, as a tied embedding and head do, except where an embedding has a zero row for padding
    and the head does not. A model of transformers is an ordinary one afterwards.

    Args:
        model: a module that holds CP layers.

    Returns:
        The model that was given; if it is a CP layer itself, the torch layer.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it holds no CP layer, one is of a subclass or a spectral convolution, has hooks
            that would be lost, or is kept in a plain list or another object too; it is wrapped
            (DistributedDataParallel, DataParallel, FSDP) or sharded.
    """
    check_unwrapped(model, "merge")
    merged = merge_layers(model)
    if any(map(_is_transformers, model.modules())):
        _bridge().detach(model)
    return merged


def register_transformers() -> None:
    """Teach transformers to load models with CP layers by its own ``from_pretrained``.

    It registers a quantizer under the name ``"polyadic"``, which ``config.json`` of a saved model
    asks for. Call it once in a process, before the first such model is loaded; a second call does
    nothing. Without it transformers refuses such a model, with an error that names this function.

    Raises:
        ImportError: transformers is not installed.
    """
    _bridge().register()


def resize_token_embeddings(model: nn.Module, new_num_tokens: int) -> nn.Module:
    """Give a model of transformers another number of tokens, where its table is in CP format.

    It replaces the model's method ``resize_token_embeddings``, which takes a dense table alone.
    Tokens that stay keep their vectors and logits. New tokens get the mean of others (see
    ``CPEmbedding.resize``), in a dense head the mean of its rows, and a bias of zero. Call it
    before an optimizer is made.

    Args:
        model: a model of transformers. If its table is dense, its own method is called.
        new_num_tokens: the new size of the vocabulary.

    Returns:
        The table, which is what the model's own method returns.

    Raises:
        TypeError: ``model`` is not a model of transformers, or the number is not an int.
        ValueError: the number is below 1 or not above the padding index, the table is a layer of a
            joint tensor, the head is in CP format and not tied to the table, or the model is
            wrapped (DistributedDataParallel, DataParallel, FSDP) or sharded.
    """
    if not isinstance(model, nn.Module) or not _is_transformers(model):
        raise TypeError(
            f"model must be a model of transformers, got {type(model).__name__}; a table alone has "
            f"CPEmbedding.resize"
        )
    check_unwrapped(model, "resize_token_embeddings")
    table = resize(model, new_num_tokens)
    attach(model)
    return table


def _bridge() -> ModuleType:
    try:
        from polyadic.pretrained import transformers
    except ImportError as error:
        raise ImportError(
            f'models of transformers need it: pip install "polyadic[transformers]" ({error})'
        ) from error
    return transformers


def attach(model: nn.Module) -> None:
    """Make transformers' own ``save_pretrained`` save the CP layers of a model, or of its parts.

    Code that puts CP layers into a model calls it; it does nothing for other models.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_module(model)
    if any(map(_is_transformers, model.modules())):
        _bridge().attach(model)


def _is_transformers(model: nn.Module) -> bool:
    """Whether a model is one of transformers, found out without importing transformers."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.partition(".")[0] == "transformers"
        for base in type(model).__mro__
    )
