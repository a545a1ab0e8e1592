"""When the steps of a map are fused into one kernel, and when torch's operations are used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from polyadic.kernels import fused
from polyadic.kernels.depthwise import Geometry, stages
from polyadic.kernels.fused import may_fuse
from polyadic.kernels.fused_conv import is_fused
from polyadic.plans import ConvRoute


class Watching(TorchDispatchMode):
    """Sees each operation and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Other(Tensor):
    """A tensor with ideas of its own."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors that seem to be on a GPU which the kernels serve, with no gradients asked for."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(fused, "triton_serves", lambda index: True)
    with torch.no_grad():
        yield


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    return torch.zeros(3, dtype=dtype), [torch.zeros(2, 2, dtype=dtype)]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_alone_are_fused(dtype: torch.dtype) -> None:
    assert may_fuse(*given(dtype))


@pytest.mark.usefixtures("gpu")
def test_anything_else_is_not() -> None:
    x, factors = given()
    assert not may_fuse(*given(torch.float64))
    assert not may_fuse(x[:0], factors)
    assert not may_fuse(x.as_subclass(Other), factors)
    assert not may_fuse(x, [factors[0].as_subclass(Other)])
    with torch.enable_grad():
        assert not may_fuse(x, factors)
    with Watching():
        assert not may_fuse(x, factors)
    with forward_ad.dual_level():
        assert not may_fuse(x, factors)
    seen = []

    def function(t: Tensor) -> Tensor:
        seen.append(may_fuse(x, factors))
        return t

    torch.func.vmap(function)(x)
    assert seen == [False]
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.zeros(3))
    assert not may_fuse(fake, [fake])


def test_on_a_cpu_nothing_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "triton_serves", lambda index: True)
    with torch.no_grad():
        assert not may_fuse(*given())


@pytest.mark.usefixtures("gpu")
def test_no_kernel_is_taken_where_none_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "triton_serves", lambda index: False)
    assert not may_fuse(*given())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("route", "kernel", "transposed", "expected"),
    [
        (ConvRoute(by="triton"), (3, 3), False, True),
        (ConvRoute(by="triton"), (1, 1), False, True),
        (ConvRoute(by="triton"), (3, 3, 3), False, True),
        (ConvRoute("channels_first", by="triton"), (3, 3), False, False),
        (ConvRoute(depthwise="separable", by="triton"), (3, 3), False, False),
        (ConvRoute(depthwise="separable", by="triton"), (1, 3), False, True),
        (ConvRoute(kind="dense", by="triton"), (3, 3), False, False),
        (ConvRoute(by="triton"), (7, 7), False, False),
        (ConvRoute(by="triton"), (3, 3), True, False),
    ],
)
def test_convolutions(
    route: ConvRoute, kernel: tuple[int, ...], transposed: bool, expected: bool
) -> None:
    dims = len(kernel)
    padding = tuple([(k // 2, k // 2) for k in kernel])
    extra = (0,) * dims if transposed else ()
    geometry = Geometry(kernel, (1,) * dims, padding, (1,) * dims, transposed, extra)
    x, (factor,) = torch.zeros(1, 4, *[8] * dims), given()[1]
    plan = stages(geometry, route.depthwise, dims)
    assert is_fused(route, plan, x, [factor]) == expected
