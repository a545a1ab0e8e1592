"""When a kernel starts through its compiled form, and when in Triton's own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

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
        self.device = torch.device("cuda", index)

    def data_ptr(self) -> int:
        return 256


def test_each_device_has_its_own_form_and_becomes_the_current_one() -> None:
    kernel = Kernel()
    launcher = launch.Launcher(kernel)
    entered: list[Any] = []
    with (
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=False),
        mock.patch("torch.cuda.device") as current,
    ):
        current.side_effect = lambda device: entered.append(device) or mock.MagicMock()
        for index in (0, 1, 0, 1):
            start(launcher, OnDevice(index))
    assert kernel.calls == ["triton 4", "triton 4", "compiled", "compiled"]
    assert entered == [torch.device("cuda", 1)] * 2


def test_a_form_that_never_ran_cannot_be_captured() -> None:
    kernel = Kernel()
    launcher = launch.Launcher(kernel)
    tensor: Any = OnDevice(0)
    capturing = mock.patch("torch.cuda.is_current_stream_capturing", return_value=True)
    with mock.patch("torch.cuda.current_device", return_value=0):
        with capturing, pytest.raises(RuntimeError, match="once with inputs of the same shapes"):
            start(launcher, tensor)
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=False):
            start(launcher, tensor)
        with capturing:
            start(launcher, tensor)
    assert kernel.calls == ["triton 4", "compiled"]
