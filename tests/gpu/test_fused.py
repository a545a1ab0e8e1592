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

from polyadic.formats import ConvFormat
from polyadic.kernels import fused
from polyadic.kernels.depthwise import Geometry, stages
from polyadic.kernels.fused import may_fuse
from polyadic.kernels.fused_conv import is_fused
from polyadic.plans import ConvPlan, ConvRoute


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
        (ConvRoute(), (3, 3), False, False),
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


@pytest.mark.parametrize(
    "route",
    [("channels_first",), ("channels_last", "separable"), ("channels_last", "merged", "dense")],
)
def test_routes_that_no_kernel_serves_are_refused(route: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="use by='torch'"):
        ConvRoute(*route, by="triton")


@pytest.mark.parametrize(("kernel", "transposed"), [((6, 5), False), ((3, 3), True)])
def test_convolutions_that_no_kernel_serves_are_refused(
    kernel: tuple[int, ...], transposed: bool
) -> None:
    route = ConvRoute(by="triton")
    fmt = ConvFormat((2,), (2,), kernel, 3, transposed=transposed)
    with pytest.raises(ValueError, match="use by='torch'"):
        ConvPlan(route, route).covering(fmt)
    fits = ConvFormat((2,), (2,), (3, 3), 3)
    assert ConvPlan(route, route).covering(fits).forward == route


@pytest.mark.parametrize("name", ["embedding", "conv", "depthwise", "decode", "outer", "sums"])
def test_no_grid_is_longer_than_a_gpu_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first axis of a grid has room for more than 65,535 programs."""
    pytest.importorskip("triton")
    from polyadic.kernels.triton.launch import Launcher

    grids = []

    def noted(launcher: Any, key: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        grids.append(grid)

    monkeypatch.setattr(Launcher, "__call__", noted)
    LAUNCHES[name]()
    assert grids
    assert all(0 < grid[0] < 2**31 and 0 < max(grid[1:]) <= 65_535 for grid in grids), grids


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _embedding() -> None:
    from polyadic.kernels.triton.embedding import lookup, rows, scatter

    indices = meta(10**7, dtype=torch.int64)
    ins, outs = [meta(64, 8)] * 3, [meta(64, 8)] * 2
    lookup(indices, ins, outs, None, 64**3, 8, keep=False)
    rows(indices, ins, outs, None, 8)
    scatter(meta(10**7, 8), indices, [meta(4096, 8)] * 2, None)


def _conv() -> None:
    from polyadic.kernels.triton.conv import depthwise_project

    size = (1, 512, 512)
    z1, taps, kc = meta(100 * 512 * 512, 16), meta(9, 8), meta(64, 8)
    depthwise_project(z1, taps, kc, None, stage(), size, size, 2, keep=False)


def _depthwise() -> None:
    from polyadic.kernels.triton.depthwise import depthwise_backward

    size = (1, 512, 512)
    z1, taps = meta(100 * 512 * 512, 16), meta(9, 8)
    depthwise_backward(z1, z1, taps, stage(), size, size, 2, wrt_taps=True, again=True)


def _decode() -> None:
    from polyadic.kernels.triton.decode import decode

    decode(meta(4, 2**14), [meta(16, 8), meta(1024, 8)], [meta(2**13, 8)] * 2, None)


def _outer() -> None:
    from polyadic.kernels.triton.outer import outer

    x, g = meta(10**7, 8), meta(10**7, 8)
    outer(x, g, x, g, biased=True)


def _sums() -> None:
    from polyadic.kernels.triton.sums import add_up

    add_up(meta(128, 3 * 4096, 64, dtype=torch.float32), (4096,) * 3, torch.bfloat16)


def stage() -> Any:
    from polyadic.kernels.triton.depthwise import Where

    return Where((1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1))


LAUNCHES = {
    "embedding": _embedding,
    "conv": _conv,
    "depthwise": _depthwise,
    "decode": _decode,
    "outer": _outer,
    "sums": _sums,
}
