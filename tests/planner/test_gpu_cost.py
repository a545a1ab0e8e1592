"""The cost model of a GPU: what overlaps, what a graph leaves, which plans win; without one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import polyadic
from polyadic import ConvPlan, ConvRoute, LinearFormat, LinearPlan, LinearRoute, functional
from polyadic.kernels import backend, pairs
from polyadic.kernels.linear import LinearMap
from polyadic.nn import CPConv2d, CPEmbedding, CPLinear
from polyadic.planner import choice, linear
from polyadic.planner.machine import GPU, built_in
from polyadic.planner.request import request
from polyadic.planner.steps import Step, gemm

explain = functools.partial(polyadic.explain, device="cuda", dtype=torch.bfloat16)
ODD = LinearFormat((7, 3), (2, 5, 3), 9)


def square(features: int, rank: int) -> LinearFormat:
    return LinearFormat(*polyadic.tensorize(features, features), rank)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the library's kernels could run here."""
    monkeypatch.setattr(linear, "serves", lambda kind, device, dtype: device == "cuda")
    choice.forget()
    yield
    choice.forget()


def test_a_gpu_works_while_the_processor_launches() -> None:
    """What takes longer of both is what passes; in a graph nothing is launched."""
    light = [Step("", "stream", 0, 1000, launches=1, views=1)] * 10
    heavy = [Step("", "stream", 0, 10**9)]
    host, work = GPU.spent([*light, *heavy])
    assert host == pytest.approx(11 * GPU.launch + 10 * GPU.view)
    streamed = 10 * GPU.streamed(1000) + GPU.streamed(10**9)
    assert work == pytest.approx(11 * GPU.kernel + streamed)
    assert GPU.total([*light, *heavy]) == max(host, work)
    assert GPU.total(light) == pytest.approx(10 * (GPU.launch + GPU.view))
    assert GPU.in_graph().total(light) == pytest.approx(GPU.spent(light)[1])
    cpu = built_in("cpu", torch.float32, 1)
    assert cpu.total([*light, *heavy]) == pytest.approx(sum(cpu.spent([*light, *heavy])))


def test_a_gpu_reads_while_it_multiplies() -> None:
    """A product takes the longer of both; rows that are not aligned take longer."""
    asked = request(ODD, 1, torch.bfloat16, "cuda")
    thin, thick, odd = (gemm(asked, "", 8192, 4096, n) for n in (8, 8192, 9))
    assert GPU.work(thin) == pytest.approx(GPU.kernel + thin.nbytes / GPU.gemm_bandwidth)
    assert GPU.work(thick) == pytest.approx(GPU.kernel + thick.flops / GPU.gemm)
    assert GPU.work(odd) > 1.5 * GPU.work(thin)


def test_what_is_predicted_for_a_gpu_does_not_depend_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = [
        (LinearFormat((16,) * 3, (16,) * 3, 64), {"batch": 2048}),
        (CPConv2d(32, 32, 5, padding=2, rank=40), {"batch": 8, "size": 32}),
        (CPEmbedding(5000, 96, rank=16), {"batch": 700}),
    ]

    def reports() -> list[str]:
        choice.forget()
        return [str(explain(layer, **options)) for layer, options in layers]

    before, threads = reports(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert reports() == before
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr("platform.processor", lambda: "another")
    monkeypatch.setattr("polyadic.kernels.cpu.in_onednn", lambda dtype: False)
    assert reports() == before


@pytest.mark.parametrize("kind", backend.KINDS)
def test_the_librarys_kernels_are_not_taken_for_complex_numbers(kind: str) -> None:
    for dtype in (torch.complex64, torch.complex128):
        assert "not in torch.complex" in str(backend.never(kind, "cuda", dtype))
    assert backend.never(kind, "cuda", torch.float32) is None
    assert torch.complex64 not in backend.DTYPES


def test_plans_that_write_large_maps_lose_on_a_gpu() -> None:
    """A split plan multiplies (T, L, R) maps, each of them tens of megabytes in float32."""
    found = explain(square(4096, 256), batch=2048)
    assert found.chosen.plan.forward.is_khatri_rao
    assert found.chosen.plan.backward.is_khatri_rao
    split = LinearRoute((1, 2), (1, 2))
    other = explain(square(4096, 256), batch=2048, plan=LinearPlan(split, split))
    assert other.chosen.seconds > found.chosen.seconds
    assert other.chosen.graph_seconds > 1.3 * found.chosen.graph_seconds


@pytest.mark.usefixtures("kernels")
def test_the_librarys_kernels_are_chosen_by_price() -> None:
    """Nine launches a step; printed; and not where they do not serve."""
    found = explain(square(4096, 64), batch=2048)
    assert found.chosen.plan.forward.by == found.chosen.plan.backward.by == "triton"
    assert sum(step.launches for step in (*found.chosen.forward, *found.chosen.backward)) == 9
    assert "by triton" in str(found)
    assert found.chosen.graph_seconds < 0.5 * found.dense.graph_seconds
    others = [other.plan.forward for other, _ in found.rejected]
    assert LinearRoute((3,), (3,)) in others
    assert polyadic.explain(square(4096, 64), batch=2048).chosen.plan.forward.by == "torch"


@pytest.mark.usefixtures("kernels")
def test_it_says_where_dense_wins_on_a_gpu() -> None:
    """Of 1024 features no plan beats one small product, even in a graph not by much."""
    small = explain(square(1024, 64), batch=2048)
    assert small.dense_is_faster
    assert small.dense_is_faster_in_a_graph
    text = str(small)
    assert "dense is faster here: the plan takes" in text
    assert "dense is faster in a CUDA graph: the plan takes" in text
    large = explain(square(8192, 64), batch=2048)
    assert not large.dense_is_faster_in_a_graph
    assert "in a CUDA graph the plan is predicted" in str(large)
    assert "CUDA graph" not in str(polyadic.explain(square(1024, 64), batch=2048))
    assert large.to_dict()["chosen"]["graph_seconds"] == large.chosen.graph_seconds


class Dispatched(TorchDispatchMode):
    """Counts launches, and operations that make a view."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = func.is_view or func is torch.ops.aten._unsafe_view.default
        self.launches += not view
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The kernels' way on a GPU by torch's operations, on a CPU."""
    with (
        mock.patch.object(Tensor, "is_cuda", True),
        mock.patch.object(Tensor, "is_cpu", False),
        mock.patch.object(pairs, "triton_serves", return_value=False),
    ):
        yield


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("fmt", [ODD, dataclasses.replace(ODD, rank=8)], ids=["odd", "aligned"])
def test_the_mirror_counts_the_padded_way_of_a_gpu(fmt: LinearFormat, keep: int) -> None:
    """FLOPs with the columns of zeros, and launches, in float32."""
    rows, route = 6, LinearRoute((2,), (3,))
    asked, plan = request(fmt, rows, torch.float32, "cuda"), LinearPlan(route, route, keep)
    factors = [torch.randn(n, fmt.rank) for n in (*fmt.in_shape, *fmt.out_shape)]
    x, grad_y = torch.randn(rows, fmt.in_features), torch.randn(rows, fmt.out_features)
    layer_map, needs = LinearMap(plan, 2), (True,) * (1 + len(factors))
    forward, backward = choice.steps(asked, plan)
    with as_on_a_gpu():
        _, kept = layer_map.forward(x, None, factors)
    for steps, run in (
        (forward, lambda: layer_map.forward(x, None, factors)),
        (backward, lambda: layer_map.backward(grad_y, x, kept, factors, needs)),
    ):
        with as_on_a_gpu(), Dispatched() as counted:
            run()
        with as_on_a_gpu(), FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == sum(step.flops for step in steps)
        assert counted.launches == sum(step.launches for step in steps)


def test_a_kept_map_with_columns_of_zeros_serves_every_backward() -> None:
    """The forward by Khatri-Rao matrices pads Z, which a split backward takes as it is."""
    factors = [torch.randn(n, ODD.rank).double() for n in (*ODD.in_shape, *ODD.out_shape)]
    x, grad_y = torch.randn(6, 21).double(), torch.randn(6, 30).double()
    plan = LinearPlan(LinearRoute((2,), (3,)), LinearRoute((1, 1), (1, 2)))
    layer_map, needs = LinearMap(plan, 2), (True,) * (1 + len(factors))
    y, kept = layer_map.forward(x, None, factors)
    expected = [y, *layer_map.backward(grad_y, x, kept, factors, needs)[1]]
    with as_on_a_gpu():
        y, kept = layer_map.forward(x, None, factors)
        assert kept[0].shape == (6, 16)
        found = [y, *layer_map.backward(grad_y, x, kept, factors, needs)[1]]
    torch.testing.assert_close(found, expected)


def test_a_plan_by_kernels_is_refused_where_they_cannot_run() -> None:
    route = LinearRoute((2,), (3,), by="triton")
    plan = LinearPlan(route, route)
    layer = CPLinear(21, 30, rank=3, in_shape=(7, 3), out_shape=(2, 5, 3))
    message = "the plan asks for by='triton', but Triton kernels run on CUDA devices, not on 'cpu'"
    x = torch.randn(4, 21)
    for call in (functional.cp_linear, functional.cp_linear_forward):
        with pytest.raises(ValueError, match=message):
            call(x, layer.in_factors, layer.out_factors, plan=plan)
    with pytest.raises(ValueError, match=message):
        polyadic.explain(layer, batch=4, plan=plan)
    conv = CPConv2d(4, 4, 3, rank=2)
    by = ConvRoute(by="triton")
    with pytest.raises(ValueError, match=message):
        functional.cp_conv(
            torch.randn(1, 4, 5, 5),
            conv.out_factors,
            conv.in_factors,
            conv.kernel_factors,
            plan=ConvPlan(by, by),
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LinearRoute((3,), (1, 2), by="triton"),
            "routes that contract the out modes",
        ),
        (
            lambda: LinearPlan(*[LinearRoute((1, 2), (3,), by="triton")] * 2).covering(
                LinearFormat((2, 2, 2), (2, 2, 2), 1)
            ),
            "serves linear routes that contract the in modes",
        ),
        (lambda: LinearRoute((3,), (3,), by="cuda"), "by must be one of 'torch', 'triton'"),
        (lambda: ConvRoute(by="cuda"), "by must be one of 'torch', 'triton'"),
        (
            lambda: LinearPlan(*[LinearRoute((3,), (3,), by="triton")] * 2, keep="autograd"),
            "keep='autograd' leaves the backward to autograd",
        ),
    ],
)
def test_backends_that_no_route_has_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_tf32_counts_only_where_torch_allows_it() -> None:
    def seconds() -> float:
        return polyadic.explain(square(8192, 64), batch=8192, device="cuda").dense.seconds

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        exact = seconds()
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert seconds() < 0.3 * exact
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
