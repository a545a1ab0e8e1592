"""A model with CP layers of many kinds, and what must hold after an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadic.nn import CPConv1d, CPEmbedding, CPLinear
from polyadic.pretrained import from_pretrained


class Net(nn.Module):
    """A tied embedding, a layer in two places, a shared bias, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=2)
        self.mlp = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6, bias=False))
        self.again = self.mlp[0]
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2, padding_mode="circular")
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight
        self.shared = self.head.bias
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.mlp(x) + self.again(x)[..., :6] * self.scale
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(x) + self.shared


def compressed() -> Net:
    """The same with CP layers, trained for a step."""
    net = Net()
    net.embed = CPEmbedding(11, 6, padding_idx=2, rank=4)
    net.head = net.embed.as_linear(bias=True)
    net.shared = net.head.bias
    net.mlp[0] = net.again = CPLinear(6, 10, rank=3, order=2, memory="least")
    net.mlp[2] = CPLinear(10, 6, rank=2, bias=False, in_shape=(5, 2), out_shape=(6,))
    net.conv = CPConv1d(6, 6, 3, padding=1, groups=2, padding_mode="circular", rank=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.randint(11, (3, 5))).square().mean().backward()
    optimizer.step()
    return net


def same(a: nn.Module, b: nn.Module) -> None:
    """Equal bit by bit, dtypes and ties too."""
    first, second = a.state_dict(keep_vars=True), b.state_dict(keep_vars=True)
    assert list(first) == list(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name
        ties = [key for key in first if first[key] is value]
        assert ties == [key for key in second if second[key] is second[name]], name
    layers = {n: repr(m) for n, m in a.named_modules()}
    assert layers == {n: repr(m) for n, m in b.named_modules()}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def refused(folder: Path, model: Any, message: str, error: type[Exception] = ValueError) -> None:
    """Refused with a message, and the model is as it was: the same objects with the same values."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        from_pretrained(folder, model)
    assert message in str(caught.value)
    after = snapshot(model)
    assert len(before) == len(after)
    for (name, old, values), (name_after, new, values_after) in zip(before, after, strict=True):
        assert name == name_after
        assert old is new
        assert values is None or torch.equal(values, values_after)


def snapshot(model: Any) -> list[tuple[str, Any, Tensor | None]]:
    if not isinstance(model, nn.Module):
        return []
    found: list[tuple[str, Any, Tensor | None]] = [(n, m, None) for n, m in model.named_modules()]
    for name, value in model.state_dict(keep_vars=True).items():
        found.append((name, value, None if value.is_meta else value.detach().clone()))
    return found
