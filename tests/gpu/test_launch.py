"""When a kernel starts through its compiled form, and when in Triton's own way."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_int32, c_uint64
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from data import poisoned
from torch import Tensor

from counted_calls import own_calls
from polyadic import _torch
from polyadic.functional.boundary import Call
from polyadic.kernels.linear import LinearMap
from polyadic.plans import LinearPlan, LinearRoute

pytest.importorskip("triton")
launch = pytest.importorskip("polyadic.kernels.triton.launch")
driver = pytest.importorskip("polyadic.kernels.triton.driver")
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
    """A compiled kernel that takes one pointer and one number, in the words of Triton."""

    function = 77
    asm: ClassVar = {
        "ptx": ".visible .entry kernel(\n .param .u64 .ptr .global .align 1 kernel_param_0,"
        " .param .u32 kernel_param_1, .param .u64 kernel_param_2, .param .u64 kernel_param_3)"
    }

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.metadata = SimpleNamespace(
            num_ctas=1,
            num_warps=8,
            launch_cooperative_grid=False,
            launch_pdl=False,
            global_scratch_size=0,
            profile_scratch_size=0,
            shared=1024,
        )

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def compiled(*arguments: Any) -> None:
            self.kernel.calls.append("compiled")

        return compiled


def start(launcher: Any, tensor: Tensor, key: object = "key", warps: int = 4) -> None:
    launcher(key, (1, 1, 1), [tensor], (), lambda: (tensor,), warps=warps)


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


class OnDevice(Tensor):
    """A tensor on a CUDA device, as far as a launcher asks."""

    index: int

    def get_device(self) -> int:
        return self.index


def on_device(index: int) -> Tensor:
    tensor = torch.zeros(64).as_subclass(OnDevice)
    tensor.index = index
    return tensor


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
            start(launcher, on_device(index))
    assert kernel.calls == ["triton 4", "triton 4", "compiled", "compiled"]
    assert entered == [1, 1]


def test_a_form_that_never_ran_cannot_be_captured() -> None:
    kernel = Kernel()
    launcher = launch.Launcher(kernel)
    tensor = on_device(0)
    capturing = mock.patch("torch.cuda.is_current_stream_capturing", return_value=True)
    with mock.patch.object(launch, "current_cuda_device", return_value=0):
        with capturing, pytest.raises(RuntimeError, match="once with inputs of the same shapes"):
            start(launcher, tensor)
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=False):
            start(launcher, tensor)
        with capturing:
            start(launcher, tensor)
    assert kernel.calls == ["triton 4", "compiled"]


class Config(ctypes.Structure):
    """What CUDA calls a CUlaunchConfig."""

    _fields_: ClassVar = [
        ("programs", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("how_many", ctypes.c_uint),
    ]


class Driver:
    """Stands for the driver's function that starts code, and reads what it is given."""

    def __init__(self) -> None:
        self.status = 0
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, config: int, function: int, parameters: int, extra: None) -> int:
        given = Config.from_address(config)
        at = (ctypes.c_void_p * 4).from_address(parameters)
        pointer, number = c_uint64.from_address(at[0]).value, c_int32.from_address(at[1]).value
        more = [c_uint64.from_address(at[n]).value for n in (2, 3)]
        assert given.attributes is None
        assert given.how_many == 0
        sizes = [*given.programs, *given.threads, given.shared]
        self.calls.append((function, sizes, given.stream, pointer, number, more))
        return self.status


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Driver:
    started = Driver()
    monkeypatch.setattr(driver, "launch_function", lambda: started)
    monkeypatch.setattr(driver, "current_raw_stream", lambda index: 500)
    return started


def numbered(launcher: Any, tensor: Tensor, number: int) -> None:
    launcher("key", (3, 2, 1), [tensor], (number,), lambda: (tensor, number))


def test_the_driver_starts_what_is_compiled(started: Driver) -> None:
    kernel, tensor = Kernel(), torch.zeros(64)
    launcher = launch.Launcher(kernel)
    for number in (5, -6, 2**31 - 1):
        numbered(launcher, tensor, number)
    assert kernel.calls == ["triton 4"]
    sizes = [3, 2, 1, 256, 1, 1, 1024]
    where = tensor.data_ptr()
    assert started.calls == [(77, sizes, 500, where, n, [0, 0]) for n in (-6, 2**31 - 1)]


def test_what_the_driver_refuses_is_started_by_triton(started: Driver) -> None:
    kernel, tensor = Kernel(), torch.zeros(64)
    launcher = launch.Launcher(kernel)
    started.status = 201
    for _ in range(3):
        numbered(launcher, tensor, 1)
    assert kernel.calls == ["triton 4", "compiled", "compiled"]
    assert len(started.calls) == 2


def test_profilers_of_triton_see_each_start(
    started: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, tensor = Kernel(), torch.zeros(64)
    launcher = launch.Launcher(kernel)
    hook = SimpleNamespace(calls=[])
    monkeypatch.setattr(driver.knobs.runtime, "launch_enter_hook", hook)
    numbered(launcher, tensor, 1)
    numbered(launcher, tensor, 1)
    hook.calls.append(print)
    numbered(launcher, tensor, 1)
    assert kernel.calls == ["triton 4", "compiled"]
    assert len(started.calls) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"num_ctas": 2},
        {"launch_cooperative_grid": True},
        {"launch_pdl": True},
        {"global_scratch_size": 8},
        {"profile_scratch_size": 8},
        {"shared": 229 * 1024},
    ],
)
def test_what_takes_more_than_arguments_is_left_to_triton(
    started: Driver, changes: dict[str, Any]
) -> None:
    form = Form(Kernel())
    assert driver.code_of(form, 1, 1, 0) is not None
    vars(form.metadata).update(changes)
    assert driver.code_of(form, 1, 1, 0) is None


def test_parameters_that_are_not_the_arguments_are_left_to_triton(started: Driver) -> None:
    """Another version of Triton may put other things behind the arguments."""
    form = Form(Kernel())
    assert driver.code_of(form, 2, 1, 0) is None
    assert driver.code_of(form, 1, 2, 0) is None
    assert driver.code_of(form, 2, 0, 0) is None


def test_without_a_driver_triton_starts_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "launch_function", lambda: None)
    assert driver.code_of(Form(Kernel()), 1, 1, 0) is None


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Tensors that seem to be on a GPU, and a driver that launches nothing; the kernels' names."""
    from polyadic.kernels import fused, fused_linear
    from polyadic.kernels.triton import khatri_rao, mttkrp

    started: list[str] = []

    def by_driver(*arguments: Any) -> int:
        started.append("driver")
        return 0

    monkeypatch.setattr(driver, "launch_function", lambda: by_driver)
    monkeypatch.setattr(driver, "current_raw_stream", lambda index: 0)
    taken = driver.parameter_bits(Form.asm["ptx"])
    monkeypatch.setattr(driver, "expected_bits", lambda pointers, numbers: taken)
    # What was made for sizes holds on to kernels.
    for made in (khatri_rao.matrices_of, mttkrp.gradients_of, fused_linear._fused_of):
        made.cache_clear()
    for launcher in (khatri_rao.LAUNCHER, khatri_rao.WITH_SUMS, mttkrp.LAUNCHER):
        kernel = Kernel()
        kernel.calls = started
        monkeypatch.setattr(launcher, "kernel", kernel)
        monkeypatch.setattr(launcher, "forms", {})
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(Tensor, "is_cpu", False)
    monkeypatch.setattr(fused, "triton_serves", lambda index: True)
    yield started
    for made in (khatri_rao.matrices_of, mttkrp.gradients_of, fused_linear._fused_of):
        made.cache_clear()


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all that is allocated for the kernels."""
    shapes: list[Any] = []
    empty = _torch._EMPTY_ON_CPU
    assert empty is not None

    def noted(shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
        shapes.append(shape)
        return empty(shape, strides, dtype)

    monkeypatch.setattr(_torch, "_EMPTY_ON_CPU", noted)
    return shapes


@pytest.mark.parametrize("biased", [False, True])
def test_a_warm_step_makes_few_calls(
    stubbed: list[str], allocated: list[torch.Size], biased: bool
) -> None:
    """Of the library's functions, each of which costs a slow processor a microsecond."""
    ins, outs = [torch.randn(4, 8) for _ in range(3)], [torch.randn(5, 8) for _ in range(3)]
    route = LinearRoute((3,), (3,), by="triton")
    layer_map = LinearMap(LinearPlan(route, route, "x and z"), 3)
    x = torch.randn(7, 64, requires_grad=True)
    factors = [factor.requires_grad_() for factor in (*ins, *outs)]
    bias = torch.randn(125, requires_grad=True) if biased else None
    call, grad_y = Call(layer_map, 0), torch.ones(7, 125)
    leaves = [x, *factors, *([] if bias is None else [bias])]

    def forward() -> Tensor:
        return call.run(x, (factors,), bias, None)

    def backward(y: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(y, leaves, grad_y)

    # The first step compiles, and the second takes memory for starts.
    for _ in range(2):
        backward(forward())()
    stubbed.clear()
    allocated.clear()
    assert own_calls(forward)[0] <= 18
    assert allocated == [(64, 8), (125, 8)]
    assert own_calls(backward(forward()))[0] <= 26 + 4 * biased
    assert stubbed == ["driver"] * 4
    sums = [(1, 125)] if biased else []
    of_backward = [(64, 8), (125, 8), *sums, *[tuple(f.shape) for f in factors]]
    of_backward += [(125,)] if biased else []
    assert allocated[2:] == [(64, 8), (125, 8), *of_backward]


def test_memory_is_filled_where_torch_is_told_to_fill_it() -> None:
    with poisoned():
        for dtype in (torch.float32, torch.bfloat16):
            made = _torch.empty_beside(torch.zeros(2))((3, 5), (5, 1), dtype)
            assert made.isnan().all()
            assert (made.shape, made.dtype) == ((3, 5), dtype)
