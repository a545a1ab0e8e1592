"""The cost model's mirror of the kernels: FLOPs equal torch's count, steps sum to plans."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polyadic import ConvFormat, LinearFormat, LinearPlan, LinearRoute
from polyadic.checks import check_geometry, check_transposed_geometry
from polyadic.formats import EmbeddingFormat
from polyadic.functional import (
    cp_conv,
    cp_conv_forward,
    cp_conv_transpose,
    cp_embedding,
    cp_linear,
    cp_linear_forward,
)
from polyadic.kernels.embedding import EmbeddingMap
from polyadic.kernels.linear import LinearMap
from polyadic.planner import choice
from polyadic.planner.linear import compositions
from polyadic.planner.machine import Machine, built_in
from polyadic.planner.request import Request, bucket, request
from polyadic.planner.steps import Step, gemm
from polyadic.testing import Flops

LINEAR = [
    (LinearFormat((4, 4, 16), (4, 4, 8), 16), 32),
    (LinearFormat((7,), (3, 5), 2), 1),
    (LinearFormat((2, 3, 5, 2), (1, 4), 9), 3),
]
CONV = [
    (ConvFormat((4, 2), (2, 3), (3, 3), 5), (1, 1, 1), 2, (6, 7)),
    (ConvFormat((4, 2), (2, 3), (1, 1), 5), (2, 0, 1), 2, (6, 7)),
    (ConvFormat((8,), (6,), (5, 3), 4), (2, "valid", 1), 1, (11, 9)),
    (ConvFormat((4, 2), (2, 3), (4,), 5), (1, "same", 2), 3, (13,)),
    (ConvFormat((4, 3), (2, 3), (3, 3), 5, groups=3), (2, 1, 1), 2, (6, 7)),
    # So large that the weight gradients of its wide taps are computed in parts.
    (ConvFormat((4, 2), (2, 3), (5, 5), 32), (1, 2, 1), 1, (16, 16)),
    (ConvFormat((4, 2), (2, 3), (3, 3), 5, transposed=True), (2, 1, 1, 1), 2, (6, 7)),
    (ConvFormat((4, 2), (2, 3), (4, 2), 3, 2, transposed=True), (1, 0, 1, 0), 2, (4, 5)),
    (ConvFormat((4,), (6,), (4,), 3, transposed=True), (2, 1, 2, 1), 2, (9,)),
]


NUMBERS = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.complex64], ids=["real", "complex"]
)


def _factors(
    *groups: tuple[int, ...], rank: int, dtype: torch.dtype = torch.float32
) -> list[list[torch.Tensor]]:
    make = functools.partial(torch.randn, dtype=dtype, requires_grad=True)
    return [[make(n, rank) for n in group] for group in groups]


def candidates(asked: Request) -> list[Any]:
    return list(choice.kind_of(asked).candidates(asked))


@pytest.mark.parametrize(("fmt", "rows"), LINEAR)
def test_flops_left_to_autograd_are_the_same(fmt: LinearFormat, rows: int) -> None:
    route = LinearRoute((len(fmt.in_shape),), (len(fmt.out_shape),))
    closed, left = (
        choice.steps(request(fmt, rows), LinearPlan(route, route, keep))
        for keep in ("x and z", "autograd")
    )
    ins, outs = _factors(fmt.in_shape, fmt.out_shape, rank=fmt.rank)
    x = torch.randn(rows, fmt.in_features, requires_grad=True)
    with Flops() as counter:
        cp_linear(x, ins, outs, plan=LinearPlan(route, route, "autograd")).sum().backward()
    assert counter.total == sum(step.flops for part in left for step in part)
    assert counter.total == sum(step.flops for part in closed for step in part)
    assert len(left[1]) <= len(closed[1])


@NUMBERS
@pytest.mark.parametrize("memory", ["balanced", "least"])
@pytest.mark.parametrize(("fmt", "rows"), LINEAR)
def test_linear_flops_are_what_torch_counts(
    fmt: LinearFormat, rows: int, memory: str, dtype: torch.dtype
) -> None:
    ins, outs = _factors(fmt.in_shape, fmt.out_shape, rank=fmt.rank, dtype=dtype)
    x = torch.randn(rows, fmt.in_features, dtype=dtype, requires_grad=True)
    asked = request(fmt, rows, dtype, memory=memory)
    for plan in candidates(asked):
        forward, backward = choice.steps(asked, plan)
        with Flops() as counter:
            y = cp_linear(x, ins, outs, plan=plan)
        assert counter.total == sum(step.flops for step in forward), plan
        with Flops() as counter:
            y.sum().real.backward()
        assert counter.total == sum(step.flops for step in backward), plan


@NUMBERS
@pytest.mark.parametrize("memory", ["fast", "balanced", "least"])
@pytest.mark.parametrize(("fmt", "where", "batch", "size"), CONV)
def test_conv_flops_are_what_torch_counts(
    fmt: ConvFormat,
    where: tuple,
    batch: int,
    size: tuple[int, ...],
    memory: str,
    dtype: torch.dtype,
) -> None:
    groups = fmt.out_shape, fmt.in_shape, fmt.kernel_size
    outs, ins, kernels = _factors(*groups, rank=fmt.rank, dtype=dtype)
    options = dict(zip(("stride", "padding", "dilation"), where[:3], strict=True))
    x = torch.randn(batch, fmt.channels[0], *size, dtype=dtype, requires_grad=True)
    if fmt.transposed:
        options["output_padding"] = where[3]
        place = check_transposed_geometry(fmt.kernel_size, *where[:2], where[3], where[2])
    else:
        place = check_geometry(fmt.kernel_size, *where)
    asked = request(fmt, batch, dtype, memory=memory, geometry=place, size=size)
    for plan in candidates(asked):
        forward, backward = choice.steps(asked, plan)
        with Flops() as counter:
            if fmt.transposed:
                call = {"groups": fmt.groups, "plan": plan, **options}
                y = cp_conv_transpose(x, ins, outs, kernels, **call)
            else:
                y = cp_conv(x, outs, ins, kernels, groups=fmt.groups, plan=plan, **options)
        assert counter.total == sum(step.flops for step in forward), plan
        with Flops() as counter:
            y.sum().real.backward()
        assert counter.total == sum(step.flops for step in backward), plan


@pytest.mark.parametrize("memory", ["fast", "balanced"])
@pytest.mark.parametrize(("in_shape", "rows"), [((5, 7), 3), ((3, 4, 2), 40), ((9,), 4)])
def test_embedding_flops_are_what_torch_counts(
    in_shape: tuple[int, ...], rows: int, memory: str
) -> None:
    fmt = EmbeddingFormat(in_shape, (4, 3), 6, num_embeddings=math.prod(in_shape) - 1)
    ins, outs = _factors(in_shape, fmt.out_shape, rank=fmt.rank)
    asked = request(fmt, rows, memory=memory)
    forward, backward = choice.steps(asked, choice.choose(asked))
    with Flops() as counter:
        y = cp_embedding(torch.arange(rows) % 7, ins, outs, unique=False, memory=memory)
    assert counter.total == sum(step.flops for step in forward)
    with Flops() as counter:
        y.sum().backward()
    assert counter.total == sum(step.flops for step in backward)


class Dispatched(TorchDispatchMode):
    """Counts what reaches the dispatcher: operations that make a view, and all others."""

    def __init__(self) -> None:
        super().__init__()
        self.views = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = func.is_view or func is torch.ops.aten._unsafe_view.default
        self.views += is_view
        self.launches += not is_view
        return func(*args, **(kwargs or {}))


def counts(steps: list[Step]) -> tuple[int, int]:
    return sum(step.launches for step in steps), sum(step.views for step in steps)


PLACES = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    ("meta", torch.float32),
    ("meta", torch.bfloat16),
]


@pytest.mark.parametrize("memory", ["balanced", "least"])
@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("fmt", "rows"), LINEAR)
def test_linear_launches_are_what_torch_dispatches(
    fmt: LinearFormat, rows: int, device: str, dtype: torch.dtype, memory: str
) -> None:
    """On a CPU and, by tensors without values, elsewhere; casts of half precisions are launches."""
    place = {"dtype": dtype, "device": device}
    factors = [torch.randn(n, fmt.rank, **place) for n in (*fmt.in_shape, *fmt.out_shape)]
    x, grad_y = (
        torch.randn(rows, features, **place) for features in (fmt.in_features, fmt.out_features)
    )
    asked, needs = request(fmt, rows, memory=memory, **place), (True,) * (1 + len(factors))
    for plan in candidates(asked):
        layer_map = LinearMap(plan, len(fmt.in_shape))
        forward, backward = choice.steps(asked, plan)
        with Dispatched() as there:
            _, kept = layer_map.forward(x, None, factors)
        assert (there.launches, there.views) == counts(forward), plan
        with Dispatched() as back:
            layer_map.backward(grad_y, x, kept, factors, needs)
        assert (back.launches, back.views) == counts(backward), plan


@pytest.mark.parametrize("memory", ["fast", "balanced"])
@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("in_shape", "rows"), [((5, 7), 3), ((3, 4, 2), 40), ((9,), 4)])
def test_embedding_launches_are_what_torch_dispatches(
    in_shape: tuple[int, ...], rows: int, device: str, dtype: torch.dtype, memory: str
) -> None:
    place = {"dtype": dtype, "device": device}
    fmt = EmbeddingFormat(in_shape, (4, 3), 6)
    ins, outs = (
        [torch.randn(n, fmt.rank, requires_grad=True, **place) for n in shape]
        for shape in (fmt.in_shape, fmt.out_shape)
    )
    asked = request(fmt, rows, memory=memory, **place)
    plan = choice.choose(asked)
    forward, backward = choice.steps(asked, plan)
    layer_map = EmbeddingMap(plan, len(ins))
    indices = torch.zeros(rows, dtype=torch.int64, device=device)
    with torch.no_grad(), Dispatched() as there:
        y, kept = layer_map.forward(indices, None, [*ins, *outs])
    assert (there.launches, there.views) == counts(forward)
    needs = (False, *[True] * (len(ins) + len(outs)))
    grad_y = torch.ones_like(y)
    with torch.no_grad(), Dispatched() as back:
        layer_map.backward(grad_y, indices, kept, [*ins, *outs], needs)
    assert (back.launches, back.views) == counts(backward)


def test_a_product_reads_its_operands_before_it_multiplies() -> None:
    """Of few rows it costs the reading, of many the multiplications, and between them both."""
    machine = Machine(launch=0.0)
    asked = request(LinearFormat((1,), (1,), 1), 1)
    one, few, many = (machine.seconds(gemm(asked, "", n, 1024, 4096)) for n in (1, 64, 1024))
    reading = 4 * 2048**2 / machine.gemm_bandwidth
    assert one == pytest.approx(reading, rel=0.1)
    assert few > reading + 2 * 64 * 2048**2 / machine.gemm
    assert many == pytest.approx(2 * 1024 * 2048**2 / machine.gemm, rel=0.1)


def test_compositions_are_all_ways_to_cut() -> None:
    assert set(compositions(3)) == {(3,), (1, 2), (2, 1), (1, 1, 1)}
    assert len(list(compositions(5))) == 16


def test_bucket_is_the_next_power_of_two() -> None:
    assert [bucket(n) for n in (0, 1, 2, 3, 32, 33)] == [1, 1, 2, 4, 32, 64]


def test_the_choice_is_the_cheapest_of_the_predictions() -> None:
    for fmt, rows in LINEAR:
        asked = request(fmt, bucket(rows))
        times = [choice.predict(asked, plan) for plan in candidates(asked)]
        assert choice.predict(asked, choice.choose(asked)) <= min(times) * (1 + 1e-9)


def test_small_batches_split_and_high_ranks_rebuild() -> None:
    wide = LinearFormat((16, 16, 16), (16, 16, 16), 256)
    one = choice.choose(request(wide, 1))
    assert len(one.forward.in_groups) > 1
    assert len(one.backward.out_groups) > 1
    many = choice.choose(request(wide, 4096))
    assert many.forward == LinearRoute((3,), (3,))
    above = LinearFormat((8, 8), (8, 8), 512)
    assert choice.choose(request(above, 4096)).forward.kind == "dense"


def test_least_memory_keeps_nothing() -> None:
    for fmt, rows in LINEAR:
        assert choice.choose(request(fmt, rows, memory="least")).keep == "x"


def test_predictions_add_up_to_the_steps() -> None:
    fmt, rows = LINEAR[0]
    machine = Machine(gemm=1e9, launch=1e-3)
    asked = request(fmt, rows)
    forward, backward = choice.steps(asked, candidates(asked)[0])
    every = [*forward, *backward]
    assert machine.total(every) == pytest.approx(machine.total(forward) + machine.total(backward))
    assert machine.total(every) > 1e-3 * sum(step.launches for step in every)


def test_built_in_rates_scale_with_threads_and_dtype() -> None:
    one, four = built_in("cpu", torch.float32, 1), built_in("cpu", torch.float32, 4)
    assert four.gemm == 4 * one.gemm
    assert four.launch == one.launch
    assert four.cache_bandwidth == one.cache_bandwidth
    assert built_in("cpu", torch.float64, 1).gemm == one.gemm / 2


@pytest.mark.parametrize(
    ("dtype", "part"), [(torch.complex64, torch.float32), (torch.complex128, torch.float64)]
)
def test_complex_numbers_are_priced_by_their_parts(dtype: torch.dtype, part: torch.dtype) -> None:
    """Four real products for one, twice the bytes, and the rates of the parts' dtype."""
    fmt = LinearFormat((4, 4), (3, 5), 6)
    whole, parts = request(fmt, 32, dtype), request(fmt, 32, part)
    assert whole.place == parts.place
    ours, theirs = gemm(whole, "", 32, 16, 6), gemm(parts, "", 32, 16, 6)
    assert (ours.flops, ours.padded_flops) == (4 * theirs.flops, 4 * theirs.padded_flops)
    assert ours.nbytes == 2 * theirs.nbytes


def test_the_explicit_pairs_never_rebuild_by_choice() -> None:
    """Where rebuilding is cheapest the differentiable function may; the pair stays factorized."""
    ins, outs = _factors((4, 4), (4, 4), rank=200)
    x = torch.randn(64, 16)
    fmt = LinearFormat((4, 4), (4, 4), 200)
    assert choice.choose(request(fmt, 64)).forward.kind == "dense"
    plan = cp_linear_forward(x, ins, outs)[1].plan
    assert plan.forward.kind == plan.backward.kind == "factorized"
    outs, ins, kernels = _factors((4, 2), (4, 2), (3, 3), rank=300)
    saved = cp_conv_forward(torch.randn(2, 8, 9, 9), outs, ins, kernels, padding="same")[1]
    assert saved.plan.forward.kind == saved.plan.backward.kind == "factorized"
