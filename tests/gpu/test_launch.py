"""When a kernel starts through its compiled form, and when in Triton's own way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from counted_calls import own_calls
from polyadic.functional.boundary import Call
from polyadic.kernels.linear import LinearMap
from polyadic.plans import LinearPlan, LinearRoute

pytest.importorskip("triton")
launch = pytest.importorskip("polyadic.kernels.triton.launch")
if launch.INTERPRETED.value:
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)


class Kernel:
    """Stands for what ``triton.jit`` makes, and for its compiled forms; records its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        def by_triton(*arguments: Any, num_warps: int, **options: Any) -> Form:
            self.calls.append(f"triton {num_warps}")
            return Form(self)

        return by_triton


class Form:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def compiled(*arguments: Any) -> None:
            self.kernel.calls.append("compiled")

        return compiled


def start(launcher: Any, tensor: Tensor, key: object = "key", warps: int = 4) -> None:
    launcher(key, (1, 1, 1), [tensor], (tensor,), warps=warps)


def test_the_first_start_of_a_form_is_tritons() -> None:
    kernel = Kernel()
    launcher = launch.Launcher(kernel)
    tensor = torch.zeros(64)
    for _ in range(3):
        start(launcher, tensor, warps=8)
    start(launcher, tensor, key="another")
    assert kernel.calls == ["triton 8", "compiled", "compiled", "triton 4"]


def test_tensors_that_start_elsewhere_take_tritons_way() -> None:
    """The form was compiled for addresses that are multiples of 16 bytes."""
    kernel = Kernel()
    launcher = launch.Launcher(kernel)
    flat = torch.zeros(64)
    start(launcher, flat[1:])
    start(launcher, flat)
    start(launcher, flat[2:])
    start(launcher, flat[4:])
    assert kernel.calls == ["triton 4", "triton 4", "triton 4", "compiled"]


class OnDevice:
    """A tensor on a CUDA device, as far as a launcher asks."""

    def __init__(self, index: int) -> None:
        self.index = index

    def get_device(self) -> int:
        return self.index

    def data_ptr(self) -> int:
        return 256


def test_each_device_has_its_own_form_and_becomes_the_current_one() -> None:
    kernel = Kernel()
    launcher = launch.Launcher(kernel)
    entered: list[Any] = []
    now = [0]

    @contextlib.contextmanager
    def on(index: int) -> Iterator[None]:
        entered.append(index)
        now.append(index)
        yield
        now.pop()

    with (
        mock.patch.object(launch, "current_cuda_device", side_effect=lambda: now[-1]),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=False),
        mock.patch("torch.cuda.device", on),
    ):
        for index in (0, 1, 0, 1):
            start(launcher, OnDevice(index))
    assert kernel.calls == ["triton 4", "triton 4", "compiled", "compiled"]
    assert entered == [1, 1]


def test_a_form_that_never_ran_cannot_be_captured() -> None:
    kernel = Kernel()
    launcher = launch.Launcher(kernel)
    tensor: Any = OnDevice(0)
    capturing = mock.patch("torch.cuda.is_current_stream_capturing", return_value=True)
    with mock.patch.object(launch, "current_cuda_device", return_value=0):
        with capturing, pytest.raises(RuntimeError, match="once with inputs of the same shapes"):
            start(launcher, tensor)
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=False):
            start(launcher, tensor)
        with capturing:
            start(launcher, tensor)
    assert kernel.calls == ["triton 4", "compiled"]


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors that seem to be on a GPU, and a driver that launches nothing; the kernels' names."""
    from polyadic.kernels import fused
    from polyadic.kernels.triton import khatri_rao, mttkrp

    started: list[str] = []
    for module in (khatri_rao, mttkrp):
        kernel = Kernel()
        kernel.calls = started
        monkeypatch.setattr(module.LAUNCHER, "kernel", kernel)
        monkeypatch.setattr(module.LAUNCHER, "forms", {})
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(Tensor, "is_cpu", False)
    monkeypatch.setattr(fused, "triton_serves", lambda index: True)
    return started


def test_a_warm_step_makes_few_calls(stubbed: list[str]) -> None:
    """Of the library's functions, each of which costs a slow processor a microsecond."""
    ins, outs = [torch.randn(4, 8) for _ in range(3)], [torch.randn(5, 8) for _ in range(3)]
    route = LinearRoute((3,), (3,), by="triton")
    layer_map = LinearMap(LinearPlan(route, route, "x and z"), 3)
    x = torch.randn(7, 64, requires_grad=True)
    factors = [factor.requires_grad_() for factor in (*ins, *outs)]
    call, grad_y = Call(layer_map, 0), torch.ones(7, 125)

    def forward() -> Tensor:
        return call.run(x, (factors,), None, None)

    def backward(y: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(y, [x, *factors], grad_y)

    backward(forward())()
    stubbed.clear()
    assert own_calls(forward)[0] <= 28
    assert own_calls(backward(forward()))[0] <= 44
    assert stubbed == ["compiled"] * 4


def test_gradients_share_memory_only_where_each_begins_aligned() -> None:
    from polyadic.kernels.triton import mttkrp

    modes = ((3, 5), (2,))
    for rank, apart, pieces in ((8, False, 1), (8, True, 3), (5, False, 3)):
        groups = [[torch.zeros(mode, rank) for mode in group] for group in modes]
        found = mttkrp._new(groups, modes, apart)
        assert [[f.shape for f in g] for g in found] == [[f.shape for f in g] for g in groups]
        flat = [f for group in found for f in group]
        assert all(f.is_contiguous() and f.data_ptr() % 16 == 0 for f in flat)
        assert len({f.untyped_storage().data_ptr() for f in flat}) == pieces
