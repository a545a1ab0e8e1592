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
import test_conv_options as conv
import test_embedding as embedding
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from cases import Case, gradients
from compare import assert_all_close, assert_close
from polyadic import ConvPlan, LinearPlan, LinearRoute

Shape = tuple[int, ...]
Check = Callable[[], None]
MEMORY = ("fast", "balanced", "least")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def modes(largest: int, most: int) -> Any:
    return st.lists(st.integers(1, largest), min_size=1, max_size=most).map(tuple)


def check_linear(case: Case, seed: int, memory: str, plan: LinearPlan | None) -> None:
    """The layer, or the function with a plan, against ``F.linear`` of the weight by one einsum."""
    leaves = case.leaves(seed=seed).map(lambda t: t.requires_grad_())
    want = case.expected(leaves)
    grad_y = torch.randn(want.shape, dtype=want.dtype)
    want_grads = gradients(want, leaves, grad_y)
    if plan is not None:
        y = case.cp(leaves, plan=plan)
        assert_close(y, want, "y")
        return assert_all_close(gradients(y, leaves, grad_y), want_grads)
    layer: Any = case.make(seed=seed)
    layer.memory = memory
    assert_close(layer.weight, case.dense_weight(leaves), "weight")
    y = layer(leaves.x)
    assert_close(y, want, "y")
    tensors = [leaves.x, *layer.cp.factors, layer.bias, layer.cp.weights]
    found = torch.autograd.grad(y, [t for t in tensors if t is not None], grad_y)
    return assert_all_close(dict(zip(want_grads, found, strict=True)), want_grads)


@st.composite
def linear(draw: Any) -> Check:
    in_shape, out_shape = draw(modes(5, 4)), draw(modes(5, 4))
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    layouts = ["contiguous", "sliced"]
    layouts += ["transposed"] if lead else []
    layouts += ["expanded"] if lead and lead[0] else []
    case = Case(
        "generated", (in_shape, out_shape), draw(st.integers(1, 9)), lead,
        bias=draw(st.booleans()), weights=draw(st.booleans()),
        strides=draw(st.sampled_from(layouts)),
    )  # fmt: skip

    def consecutive(count: int) -> Shape:
        cuts = [0, *(i for i in range(1, count) if draw(st.booleans())), count]
        return tuple(b - a for a, b in itertools.pairwise(cuts))

    def route() -> LinearRoute:
        kind = draw(st.sampled_from(["factorized", "factorized", "dense"]))
        return LinearRoute(consecutive(len(in_shape)), consecutive(len(out_shape)), kind)

    plan = LinearPlan(route(), route(), draw(st.integers(0, 1))) if draw(st.booleans()) else None
    if plan is not None and plan.forward == plan.backward and plan.forward.is_khatri_rao:
        plan = LinearPlan(plan.forward, plan.backward, draw(st.integers(0, 2)))
    return partial(
        check_linear, case, draw(st.integers(0, 2**16)), draw(st.sampled_from(MEMORY)), plan
    )


def check_convolution(case: conv.Case, seed: int, memory: str, plan: ConvPlan | None) -> None:
    torch.manual_seed(seed)
    conv.assert_agrees(case, plan, memory=memory)


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
    case = conv.Case(
        other if transposed else own,
        own if transposed else other,
        draw(st.tuples(*[st.integers(1, 4)] * dims)),
        draw(st.tuples(*[st.integers(1, largest)] * dims)),
        draw(st.sampled_from([(), (1,), (2,), (3,), (0,)])),
        draw(st.integers(1, 6)),
        transposed,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        options,
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
            empty = 0 in case.dense()(case.input()).shape[-dims:]
    except RuntimeError:
        assume(False)
    assume(not empty)
    # torch's reflect and circular padding of no image raises.
    assume(case.lead != (0,) or options.get("padding_mode", "zeros") in ("zeros", "replicate"))
    route, other_route = (draw(st.sampled_from(conv.ROUTES)) for _ in range(2))
    plan = ConvPlan(route, other_route, draw(st.integers(0, 2))) if draw(st.booleans()) else None
    return partial(
        check_convolution, case, draw(st.integers(0, 2**16)), draw(st.sampled_from(MEMORY)), plan
    )


def check_embedding(
    arguments: dict[str, Any], lead: Shape, dtype: torch.dtype, transposed: bool, seed: int,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """The layer, and the function with its options, against ``F.embedding`` of the table."""
    torch.manual_seed(seed)
    layer = embedding.make(**arguments)
    indices = torch.randint(layer.num_embeddings, lead, dtype=dtype)
    if transposed:
        indices = indices.movedim(0, -1)
    embedding.assert_agrees(layer, indices)
    embedding.assert_agrees(layer, indices, **options)


def table(draw: Any) -> dict[str, Any]:
    in_shape, out_shape = draw(modes(5, 4)), draw(modes(5, 4))
    rows = math.prod(in_shape)
    size = draw(st.integers(max(1, rows // 2), rows))
    return {
        "size": size, "in_shape": in_shape, "out_shape": out_shape,
        "rank": draw(st.integers(1, 7)), "weights": draw(st.booleans()),
        "memory": draw(st.sampled_from(MEMORY)),
        "padding_idx": draw(st.none() | st.integers(-size, size - 1)),
    }  # fmt: skip


@st.composite
def lookup(draw: Any) -> Check:
    arguments = table(draw)
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if draw(st.integers(0, 9)) == 9:
        lead = (600,)
    options = {
        "unique": draw(st.sampled_from([None, True, False])),
        "memory": draw(st.sampled_from(MEMORY)),
    }
    return partial(
        check_embedding, arguments, lead, draw(st.sampled_from([torch.int64, torch.int32])),
        bool(lead) and draw(st.booleans()), draw(st.integers(0, 2**16)), options,
    )  # fmt: skip


def check_head(arguments: dict[str, Any], bias: bool, lead: Shape, seed: int) -> None:
    """The tied output head against ``F.linear`` with the table."""
    torch.manual_seed(seed)
    layer = embedding.make(**arguments)
    head = layer.as_linear(bias)
    if bias:
        nn.init.normal_(head.bias)
    x = torch.randn(*lead, head.in_features, dtype=torch.float64, requires_grad=True)
    # The head shows the row that the lookup keeps at zero.
    layer.padding_idx = None
    want, y = nn.functional.linear(x, embedding.table(layer), head.bias), head(x)
    assert_close(y, want, "y")
    leaves, grad_y = [x, *head.parameters()], torch.randn_like(want)
    found = torch.autograd.grad(y, leaves, grad_y)
    for i, (g, w) in enumerate(zip(found, torch.autograd.grad(want, leaves, grad_y), strict=True)):
        assert_close(g, w, f"gradient of leaf {i}")


@st.composite
def head(draw: Any) -> Check:
    lead = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    return partial(check_head, table(draw), draw(st.booleans()), lead, draw(st.integers(0, 2**16)))


KINDS = {
    "linear": linear(),
    "conv": convolution(transposed=False),
    "conv-transpose": convolution(transposed=True),
    "embedding": lookup(),
    "tied-linear": head(),
}
SUITE, LONG = 100, 2000
assert len(KINDS) * SUITE >= 300
assert len(KINDS) * LONG >= 10_000
each = pytest.mark.parametrize("kind", KINDS)


def run(kind: str, examples: int, **options: Any) -> None:
    """Check as many configurations; an error where fewer were drawn."""
    checked = 0

    @settings(max_examples=examples, deadline=None, database=None,
              suppress_health_check=list(HealthCheck), **options)  # fmt: skip
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
    right = conv.kernel
    monkeypatch.setattr(conv, "kernel", lambda layer: right(layer).flip(-1))
    with pytest.raises(AssertionError, match="off by"):
        run("conv", SUITE, derandomize=True, phases=[Phase.generate])
