"""A model of transformers whose table is in CP format gets another number of tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from polyadic.formats import positive_int
from polyadic.nn.kinds import is_of_family
from polyadic.tensor import CPSlice


def resize(model: Any, new_num_tokens: int) -> nn.Module:
    """``polyadic.pretrained.resize_token_embeddings`` for a model of transformers."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not is_of_family(table, "embedding"):
        resized: nn.Module = model.resize_token_embeddings(new_num_tokens)
        return resized
    tokens = positive_int(new_num_tokens, "new_num_tokens")
    _check(model, table, head, tokens)
    tied = [
        layer
        for layer in model.modules()
        if is_of_family(layer, "embedding", "head") and layer.cp is table.cp
    ]
    for layer in tied:
        if is_of_family(layer, "embedding"):
            layer.resize(tokens)
        else:
            layer.out_features = tokens
            _replace(model, layer.bias, tokens, 0.0)
    if type(head) is nn.Linear:
        _replace(model, head.weight, tokens, None)
        _replace(model, head.bias, tokens, 0.0)
        head.out_features = tokens
    if head is not None:
        _tell_of_bias(model, head)
    model.config.get_text_config().vocab_size = tokens
    model.vocab_size = tokens
    return cast(nn.Module, table)


def _check(model: nn.Module, table: Any, head: Any, tokens: int) -> None:
    """Refuse what cannot be resized, before anything is changed."""
    if table.padding_idx is not None and table.padding_idx >= tokens:
        raise ValueError(
            f"new_num_tokens must be above the padding index {table.padding_idx}, got {tokens}"
        )
    if isinstance(table.cp, CPSlice):
        raise ValueError("the table is a layer of a joint tensor, and cannot be resized alone")
    tied = head is not None and is_of_family(head, "head") and head.cp is table.cp
    if head is not None and not tied and type(head) is not nn.Linear:
        raise ValueError(
            f"the output head is a {type(head).__name__} with a weight of its own, whose modes "
            f"make up {head.out_features} tokens and no other number; put a torch.nn.Linear in "
            f"its place first, such as head.to_linear()"
        )


def _tell_of_bias(model: Any, head: Any) -> None:
    """Let a model that keeps the bias of its head in a second place resize it there too.

    If it was a parameter of its own there, as in models without ties, it becomes one again.
    """
    bias = head.bias
    before = {(id(module), key) for module, key in _places(model, bias)}
    model.set_output_embeddings(head)
    for module, key in _places(model, bias):
        if (id(module), key) not in before:
            own = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
            module._parameters[key] = own


def _places(model: nn.Module, wanted: Tensor | None) -> list[tuple[nn.Module, str]]:
    """Return the modules in which a parameter is registered, with its names there."""
    return [
        (module, key)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is wanted is not None
    ]


def _replace(model: nn.Module, old: Tensor | None, rows: int, fill: float | None) -> None:
    """Replace a parameter, wherever it is registered, by one with another number of rows.

    Args:
        model: the model whose modules hold it.
        old: the parameter (V, ...); None if there is nothing to do.
        rows: V from now on.
        fill: value of new rows; None for the mean of the old rows.
    """
    if old is None or len(old) == rows:
        return
    with torch.no_grad():
        more = old.mean(0, keepdim=True) if fill is None else torch.full_like(old[:1], fill)
        values = torch.cat([old[:rows], more.expand(max(0, rows - len(old)), *old.shape[1:])])
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    for module, key in _places(model, old):
        module._parameters[key] = new
