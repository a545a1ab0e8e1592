"""``python -m benchmarks.gpu.stubbed CASE``: times passes of a layer that wait for no device.

Tensors are so small that computing with them takes no time to speak of, say that they are on a GPU,
and kernels are started by a function of the C library that does nothing. What is left is the time
that a processor spends on starting things. The package on ``PYTHONPATH`` is measured, which may be
one from before there were kernels.

A line with the number of starts of kernels in a step comes first. Then each line that is read, a
number of calls, is answered by one with the microseconds of this thread that each pass takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import polyadic
from polyadic import functional

MODES, RANK, ROWS = (4, 4, 4), 8, 32
WARM_CALLS = 50


def nothing() -> Any:
    """Return a function that takes what the driver takes and returns 0, as if all had gone well.

    It says whether two numbers are the same, which two addresses are not.
    """
    function = ctypes.CDLL(None).pthread_equal
    function.argtypes, function.restype = [ctypes.c_void_p] * 4, ctypes.c_int
    return function


@contextlib.contextmanager
def without_a_gpu() -> Iterator[None]:
    """Take the way of a GPU with tensors of a CPU, where the package has one."""
    try:
        driver: Any = importlib.import_module("polyadic.kernels.triton.driver")
        launch: Any = importlib.import_module("polyadic.kernels.triton.launch")
    except ModuleNotFoundError:
        yield
        return
    from triton.runtime import JITFunction

    def loaded(kernel: Any, pointers: int, numbers: int, index: int) -> Any:
        return driver.Code(nothing(), 16, 128, 0, pointers, numbers, index)

    def product(x: Tensor, z: Tensor) -> Tensor:
        return torch.mm(x.t(), z)

    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(Tensor, "is_cuda", True))
        stack.enter_context(patch(Tensor, "is_cpu", False))
        stack.enter_context(
            patch(JITFunction, "__getitem__", lambda kernel, grid: lambda *a, **o: 1)
        )
        stack.enter_context(patch(launch, "code_of", loaded))
        stack.enter_context(patch(driver, "current_raw_stream", lambda index: 0))
        arguments = importlib.import_module("polyadic.checks.arguments")
        stack.enter_context(patch(arguments, "why_not", lambda *about: None))
        for name in ("pairs", "fused"):
            module = importlib.import_module(f"polyadic.kernels.{name}")
            stack.enter_context(patch(module, "triton_serves", lambda index: True))
        for name in ("linear", "fused_linear", "fused_conv", "embedding"):
            with contextlib.suppress(ModuleNotFoundError):
                module = importlib.import_module(f"polyadic.kernels.{name}")
                for wide in ("matmul_tn_in_float32", "matmul_tn_unrounded"):
                    # A CPU has no product of half precisions in float32.
                    if hasattr(module, wide):
                        stack.enter_context(patch(module, wide, product))
        yield


def _route(kind: Any, *arguments: Any) -> Any:
    try:
        return kind(*arguments, by="triton")
    except TypeError:
        return kind(*arguments)


def _factors(*modes: int) -> list[Tensor]:
    return [torch.rand(mode, RANK).requires_grad_() for mode in modes]


def linear(biased: bool) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A linear layer's forward, and all that gets a gradient."""
    ins, outs = _factors(*MODES), _factors(*MODES)
    x = torch.rand(ROWS, 64).requires_grad_()
    bias = torch.rand(64).requires_grad_() if biased else None
    route = _route(polyadic.LinearRoute, (3,), (3,))
    plan = polyadic.LinearPlan(route, route)
    leaves = [x, *ins, *outs, *([] if bias is None else [bias])]
    return lambda: functional.cp_linear(x, ins, outs, bias, plan=plan), leaves


def conv() -> tuple[Callable[[], Tensor], list[Tensor]]:
    """That of a convolution."""
    outs, ins, kernels = _factors(4, 4), _factors(4, 2), _factors(3, 3)
    x = torch.rand(2, 8, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    route = _route(polyadic.ConvRoute, "channels_last", "merged")
    plan = polyadic.ConvPlan(route, route)
    leaves = [x, *outs, *ins, *kernels]
    return lambda: functional.cp_conv(x, outs, ins, kernels, padding=1, plan=plan), leaves


def embedding() -> tuple[Callable[[], Tensor], list[Tensor]]:
    """That of an embedding, whose public function takes no plan."""
    from polyadic.functional.boundary import Call
    from polyadic.kernels.embedding import EmbeddingMap

    factors = _factors(*MODES, 4, 4)
    indices = torch.arange(ROWS)
    route = _route(polyadic.LinearRoute, (1, 1, 1), (2,))
    call = Call(EmbeddingMap(polyadic.LinearPlan(route, route), 3), 0)
    return lambda: call.run(indices, (factors,), None, None), factors


def pair() -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Two linear layers of torch that compute what our linear layer does, as a yardstick."""
    width = 64
    first, second = (torch.nn.Linear(n, m, False) for n, m in ((width, RANK), (RANK, width)))
    x = torch.rand(ROWS, width).requires_grad_()
    return lambda: second(first(x)), [x, first.weight, second.weight]


CASES: dict[str, Callable[[], tuple[Callable[[], Tensor], list[Tensor]]]] = {
    "linear": lambda: linear(False),
    "linear with a bias": lambda: linear(True),
    "convolution": conv,
    "embedding": embedding,
    "two nn.Linear": pair,
}


def passes(case: str) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    forward, leaves = CASES[case]()
    grad_y = torch.ones_like(forward())

    def without_grad() -> Tensor:
        with torch.no_grad():
            return forward()

    def step() -> Any:
        return torch.autograd.grad(forward(), leaves, grad_y)

    return {"forward without grad": without_grad, "forward": forward, "step": step}


def starts(call: Callable[[], Any]) -> int:
    """How many kernels a call starts by the driver."""
    try:
        code: Any = importlib.import_module("polyadic.kernels.triton.driver").Code
    except ModuleNotFoundError:
        return 0
    with mock.patch.object(code, "start", autospec=True, side_effect=code.start) as start:
        call()
    return start.call_count


def main() -> None:
    """Answer until there is nothing to read."""
    torch.set_num_threads(1)
    # What kernels that do nothing have not written may be numbers that a processor is slow with.
    torch.set_flush_denormal(True)
    with without_a_gpu():
        calls = passes(sys.argv[1])
        for call in calls.values():
            for _ in range(WARM_CALLS):
                call()
        print(json.dumps({"starts": starts(calls["step"]), "from": polyadic.__file__}), flush=True)
        for line in sys.stdin:
            seconds = {}
            for name, call in calls.items():
                begun = time.thread_time_ns()
                for _ in range(int(line)):
                    call()
                seconds[name] = (time.thread_time_ns() - begun) / int(line) / 1e9
            print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
