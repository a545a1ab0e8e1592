"""Generated configurations of every option against torch's layer, y and all gradients to 1e-10.

The normal suite draws the same few hundred at each run; ``pytest -m long`` draws ten thousand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import spectral
from cases.conv import ROUTES, ConvCase
from cases.conv_transpose import ConvTransposeCase
from cases.embedding import EmbeddingCase, HeadCase
from cases.linear import LinearCase
from cases.protocol import Case, Forced, gradients
from compare import assert_all_close, assert_close
from polyadic import ConvPlan, LinearPlan, LinearRoute, SpectralPlan, SpectralRoute

Shape = tuple[int, ...]
Check = Callable[[], None]
MEMORY = ("fast", "balanced", "least")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def modes(largest: int, most: int) -> Any:
    return st.lists(st.integers(1, largest), min_size=1, max_size=most).map(tuple)


def check(case: Case, seed: int, memory: str, forced: Forced) -> None:
    """The layer, or the function as it is told to, and the explicit pair if there is one.

    Every fourth seed is one of complex numbers.
    """
    case = case if seed % 4 else case.in_complex()
    leaves = case.leaves(seed=seed).map(Tensor.requires_grad_)
    want = case.dense(leaves)
    grad_y = torch.randn(want.shape, dtype=want.dtype)
    want_grads = gradients(want, leaves, grad_y)
    if not forced:
        layer = case.make(seed=seed, memory=memory)
        assert_close(layer.weight, case.weight(leaves), "weight")
        y, own = layer(leaves.x), {**leaves.named(), **case.parameters(layer)}
        found = torch.autograd.grad(y, list(own.values()), grad_y)
        assert_close(y, want, "y")
        return assert_all_close(dict(zip(own, found, strict=True)), want_grads)
    y = case.cp(leaves, **forced)
    assert_close(y, want, "y")
    assert_all_close(gradients(y, leaves, grad_y), want_grads)
    if case.explicit and forced.get("plan"):
        with torch.no_grad():
            y, saved = case.cp_forward(leaves, **forced)
            grads = case.cp_backward(grad_y, saved)
        bias = 0.0 if leaves.bias is None else leaves.bias.view(-1, *[1] * len(case.size))
        assert_close(y + bias, want, "y of the explicit pair")
        assert_all_close(grads, {name: g for name, g in want_grads.items() if name != "bias"})
    return None


@st.composite
def linear(draw: Any) -> Check:
    in_shape, out_shape = draw(modes(5, 4)), draw(modes(5, 4))
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    layouts = ["contiguous", "sliced"]
    layouts += ["transposed"] if lead else []
    layouts += ["expanded"] if lead and lead[0] else []
    case = LinearCase(
        "generated",
        (in_shape, out_shape),
        draw(st.integers(1, 9)),
        lead,
        bias=draw(st.booleans()),
        weights=draw(st.booleans()),
        strides=draw(st.sampled_from(layouts)),
    )

    def consecutive(count: int) -> Shape:
        cuts = [0, *(i for i in range(1, count) if draw(st.booleans())), count]
        return tuple(b - a for a, b in itertools.pairwise(cuts))

    def route() -> LinearRoute:
        kind = draw(st.sampled_from(["factorized", "factorized", "dense"]))
        return LinearRoute(consecutive(len(in_shape)), consecutive(len(out_shape)), kind)

    plan = LinearPlan(route(), route(), draw(st.integers(0, 1))) if draw(st.booleans()) else None
    if plan is not None and plan.forward == plan.backward and plan.forward.is_khatri_rao:
        plan = LinearPlan(plan.forward, plan.backward, draw(st.integers(0, 2)))
    forced = {} if plan is None else {"plan": plan}
    return partial(check, case, draw(st.integers(0, 2**16)), draw(st.sampled_from(MEMORY)), forced)


def per_dimension(low: int, high: int, dims: int) -> Any:
    each = st.integers(low, high)
    return each | st.tuples(*[each] * dims)


@st.composite
def convolution(draw: Any, transposed: bool) -> Check:
    dims = draw(st.integers(1, 3))
    own = draw(modes(3, 3))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 6) if math.prod(own) % g == 0]))
    other = draw(modes(3, 3))
    largest = 9 if dims < 3 else 4

    def spread(value: int | Shape) -> Shape:
        return value if isinstance(value, tuple) else (value,) * dims

    options: dict[str, Any] = {
        "groups": groups,
        "stride": draw(per_dimension(1, 3, dims)),
        "padding": draw(per_dimension(0, 3, dims)),
        "dilation": draw(per_dimension(1, 3, dims)),
    }
    lead = draw(st.sampled_from([(), (1,), (2,), (3,), (0,)]))
    last = lead != () and draw(st.booleans())
    kind = ConvTransposeCase if transposed else ConvCase
    case = kind(
        "generated",
        (own, other, draw(st.tuples(*[st.integers(1, 4)] * dims))),
        draw(st.integers(1, 6)),
        lead,
        draw(st.tuples(*[st.integers(1, largest)] * dims)),
        bias=draw(st.booleans()),
        weights=draw(st.booleans()),
        strides="channels_last" if last else "contiguous",
        options=options,
    )
    if transposed:
        extra = options["output_padding"] = draw(per_dimension(0, 2, dims))
        for e, s, d in zip(
            *map(spread, (extra, options["stride"], options["dilation"])), strict=True
        ):
            assume(e < max(s, d))
    else:
        options["padding_mode"] = draw(st.sampled_from(PADDING_MODES))
        named = draw(st.sampled_from([None, None, "same", "valid"]))
        if named is not None:
            options["padding"] = named
        if named == "same":
            options["stride"] = 1
    try:
        with torch.no_grad():
            empty = 0 in case.torch_layer()(torch.zeros(case.x_shape)).shape[-dims:]
    except RuntimeError:
        assume(False)
    assume(not empty)
    # torch's reflect and circular padding of no image raises.
    assume(case.lead != (0,) or options.get("padding_mode", "zeros") in ("zeros", "replicate"))
    route, other_route = (draw(st.sampled_from(ROUTES)) for _ in range(2))
    plan = ConvPlan(route, other_route, draw(st.integers(0, 2))) if draw(st.booleans()) else None
    forced = {} if plan is None else {"plan": plan}
    return partial(check, case, draw(st.integers(0, 2**16)), draw(st.sampled_from(MEMORY)), forced)


def table(draw: Any) -> dict[str, Any]:
    in_shape, out_shape = draw(modes(5, 4)), draw(modes(5, 4))
    rows = math.prod(in_shape)
    return {
        "id": "generated",
        "tensorized_shape": (in_shape, out_shape),
        "rank": draw(st.integers(1, 7)),
        "weights": draw(st.booleans()),
        "num_embeddings": draw(st.integers(max(1, rows // 2), rows)),
    }


@st.composite
def lookup(draw: Any) -> Check:
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if draw(st.integers(0, 9)) == 9:
        lead = (600,)
    own = table(draw)
    size = own["num_embeddings"]
    case = EmbeddingCase(
        **own,
        lead=lead,
        strides=draw(st.sampled_from(["contiguous", "transposed", "int32"])),
        options={"padding_idx": draw(st.none() | st.integers(-size, size - 1))},
    )
    memory = draw(st.sampled_from(MEMORY))
    forced = {"unique": draw(st.sampled_from([None, True, False])), "memory": memory}
    forced = forced if draw(st.booleans()) else {}
    return partial(check, case, draw(st.integers(0, 2**16)), memory, forced)


@st.composite
def head(draw: Any) -> Check:
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    case = HeadCase(**table(draw), lead=lead, bias=draw(st.booleans()))
    return partial(check, case, draw(st.integers(0, 2**16)), draw(st.sampled_from(MEMORY)), {})


def check_spectral(case: spectral.Case, dtype: torch.dtype, forced: Forced) -> None:
    """In double precision to 1e-10; in single within a few times the error of torch's functions."""

    def results(y: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
        drawn = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(y, list(named.values()), drawn.to(y.dtype))
        return {"y": y.detach(), **dict(zip(named, grads, strict=True))}

    named = spectral.leaves(case)
    want = results(spectral.dense(case, named), named)
    low = {
        name: t.detach().to(dtype if t.is_complex() else dtype.to_real()).requires_grad_()
        for name, t in named.items()
    }
    found = results(spectral.ours(case, low, **forced), low)
    rough = {} if dtype == torch.complex128 else results(spectral.dense(case, low), low)
    for name, tensor in want.items():
        assert found[name].dtype == (dtype if tensor.is_complex() else dtype.to_real())
        tolerance = 1e-10
        if name in rough and tensor.numel():
            # Of an empty batch all gradients are zero.
            scale = tensor.abs().max().clamp_min(1e-30)
            error = (rough[name] - tensor).abs().max() / scale
            tolerance = 1e-4 + 4 * float(error)
        assert_close(found[name].to(tensor.dtype), tensor, name, tolerance)


@st.composite
def transformed(draw: Any) -> Check:
    dims = draw(st.integers(1, 3))
    sizes = st.tuples(*[st.integers(1, 9 if dims < 3 else 5)] * dims)
    size, kept = draw(sizes), draw(st.tuples(*[st.integers(1, 7)] * dims))
    outs = draw(st.just(()) | modes(3, 3))
    case = spectral.Case(
        size,
        kept,
        draw(modes(3, 3)),
        outs,
        draw(st.integers(1, 7)),
        draw(st.sampled_from([None, 0, 1, 2, 5])),
        draw(st.sampled_from(["forward", "backward", "ortho"])),
        draw(st.none() | sizes),
        draw(st.booleans()),
        draw(st.booleans()),
    )

    def route() -> SpectralRoute:
        ways = draw(st.tuples(*[st.sampled_from(["dft", "fft", "fft-dft"])] * dims))
        if not outs or draw(st.integers(0, 3)) == 3:
            return SpectralRoute(None, "dense", ways)
        at_once = draw(st.none() | st.integers(1, 9))
        part = None if at_once is None else draw(st.none() | st.integers(1, 5))
        return SpectralRoute(at_once, "factorized", ways, part)

    plan = SpectralPlan(route(), route(), draw(st.integers(0, 1))) if draw(st.booleans()) else None
    forced: Forced = {"memory": draw(st.sampled_from(MEMORY))}
    forced = forced if plan is None else {"plan": plan}
    dtype = draw(st.sampled_from([torch.complex128, torch.complex64]))
    return partial(check_spectral, case, dtype, forced)


KINDS = {
    "linear": linear(),
    "conv": convolution(transposed=False),
    "conv-transpose": convolution(transposed=True),
    "embedding": lookup(),
    "tied-linear": head(),
    "spectral": transformed(),
}
SUITE, LONG = 150, 2000
assert len(KINDS) * SUITE >= 300
assert len(KINDS) * LONG >= 10_000
each = pytest.mark.parametrize("kind", KINDS)


def run(kind: str, examples: int, **options: Any) -> None:
    """Check as many configurations; an error where fewer were drawn."""
    checked = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    @given(KINDS[kind])
    def agrees(check: Check) -> None:
        nonlocal checked
        check()
        checked += 1

    agrees()
    assert checked >= examples


@each
def test_generated(kind: str) -> None:
    run(kind, SUITE, derandomize=True)


@pytest.mark.long
@each
def test_ten_thousand(kind: str) -> None:
    """Others at each run; a failure prints what reproduces it."""
    run(kind, LONG, print_blob=True)


def test_a_wrong_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a kernel whose taps stand in the wrong order, an example is drawn."""
    right = ConvCase.weight
    monkeypatch.setattr(ConvCase, "weight", lambda case, leaves: right(case, leaves).flip(-1))
    with pytest.raises(AssertionError, match="off by"):
        run("conv", SUITE, derandomize=True, phases=[Phase.generate])
