"""First and second derivatives in every mode: gradcheck, double backward, torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from cases import BY_ID, CASES, every_case, params
from cases.functions import as_function, both, keeping, power, second_derivatives
from cases.protocol import Case, Leaves
from compare import assert_close, assert_trees_close
from polyadic.functional import boundary
from polyadic.nn import CPLinear
from polyadic.plans import MEMORY, Memory

# Entry by entry where there are few; the others along random directions (fast_mode).
SMALL = [c for c in CASES if 0 < c.numel <= 45 and 0 not in c.lead]
NOT_EMPTY = [c for c in CASES if c.numel and 0 not in c.lead and not c.dtypes and c.numel < 9000]
FUNC = [
    BY_ID[name]
    for name in (
        "linear-order2-rank1-lambda",
        "linear-order3",
        "linear-unequal-4-2",
        "linear-complex-lambda",
        "conv-complex-all-options",
        "conv-1d-k4-same",
        "conv-1x1-stride",
        "conv-3x3-stride-tuple",
        "conv-3x3-channels-last-lambda",
        "conv-3d-2x3x2-same",
        "conv-groups2",
        "conv-groups-circular",
        "conv-reflect",
        "conv-transpose-2d-rectangular",
        "conv-transpose-groups",
        "conv-transpose-1d-k1-stride",
        "embedding-small-lambda",
        "embedding-order3",
        "head-order2",
        "joint-linear",
        "joint-conv2d",
        "joint-embedding",
    )
]
KEPT = [BY_ID["linear-order2"], BY_ID["conv-3x3"], BY_ID["embedding-order2"]]


def test_every_kind_is_small_enough_somewhere() -> None:
    assert {case.cls for case in SMALL} >= {case.cls for case in CASES if len(case.size) < 3}


@pytest.mark.parametrize("case", params(SMALL))
def test_gradcheck(case: Case) -> None:
    function, tensors = as_function(case, case.cp)
    for tensor in tensors:
        tensor.requires_grad_()
    assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("case", params(NOT_EMPTY))
def test_gradcheck_along_directions(case: Case) -> None:
    function, tensors = as_function(case, case.cp)
    tensors = [t.contiguous().requires_grad_() for t in tensors]
    assert gradcheck(function, tensors, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("case", params([c for c in SMALL if c.numel <= 30]))
def test_gradgradcheck(case: Case) -> None:
    function, tensors = as_function(case, case.cp)
    for tensor in tensors:
        tensor.requires_grad_()
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True)


@pytest.mark.parametrize("case", params(NOT_EMPTY))
def test_gradgradcheck_along_directions(case: Case) -> None:
    function, tensors = as_function(case, case.cp)
    tensors = [t.contiguous().requires_grad_() for t in tensors]
    assert gradgradcheck(function, tensors, fast_mode=True, check_fwd_over_rev=True)


@every_case
def test_double_backward(case: Case) -> None:
    expected = second_derivatives(case, case.dense)
    assert_trees_close(second_derivatives(case, case.cp), expected)
    assert_trees_close(second_derivatives(case, keeping(case)), expected)


@pytest.mark.parametrize("case", params(KEPT))
def test_double_backward_sees_kept_intermediates(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the backward did not recompute what the forward kept, the test above would fail."""
    monkeypatch.setattr(boundary, "_is_differentiated", lambda: False)
    ours = second_derivatives(case, keeping(case))
    with pytest.raises(AssertionError, match="off by"):
        assert_trees_close(ours, second_derivatives(case, case.dense))


def forward_over_reverse(
    case: Case, compute: Callable[[Leaves], Tensor], moved: str
) -> list[Tensor]:
    """Tangents of every gradient where one leaf moves, without ``create_graph``."""
    leaves = case.leaves().map(Tensor.requires_grad_)
    named = leaves.named()
    generator = torch.Generator().manual_seed(2)
    tangent = torch.randn(named[moved].shape, generator=generator, dtype=case.exact)
    with fwAD.dual_level():
        dual = leaves.map(lambda t: fwAD.make_dual(t, tangent) if t is named[moved] else t)
        grads = torch.autograd.grad(compute(dual), list(named.values()), case.grad_y())
        tangents = [fwAD.unpack_dual(g).tangent for g in grads]
    zeros = [torch.zeros_like(t) for t in named.values()]
    return [z if t is None else t for t, z in zip(tangents, zeros, strict=True)]


@pytest.mark.parametrize("case", params(FUNC))
def test_forward_over_reverse(case: Case) -> None:
    """Without ``create_graph``: grad mode is off inside the backward that is differentiated."""
    for moved in case.leaves().named():
        expected = forward_over_reverse(case, case.dense, moved)
        assert_trees_close(forward_over_reverse(case, case.cp, moved), expected)
        assert_trees_close(forward_over_reverse(case, keeping(case), moved), expected)


@pytest.mark.parametrize("case", params(FUNC))
class TestFunc:
    """torch.func transforms against the same transform of the dense counterpart."""

    def test_grad(self, case: Case) -> None:
        cp, dense, tensors = both(case)
        every = tuple(range(len(tensors)))
        got = grad(lambda *t: power(cp(*t)), every)(*tensors)
        assert_trees_close(got, grad(lambda *t: power(dense(*t)), every)(*tensors))

    def test_vjp(self, case: Case) -> None:
        cp, dense, tensors = both(case)
        assert_trees_close(
            vjp(cp, *tensors)[1](case.grad_y()), vjp(dense, *tensors)[1](case.grad_y())
        )

    def test_jvp(self, case: Case) -> None:
        cp, dense, tensors = both(case)
        tangents = tuple(torch.randn_like(t) for t in tensors)
        assert_trees_close(jvp(cp, tuple(tensors), tangents), jvp(dense, tuple(tensors), tangents))

    def test_jvp_of_each_argument_alone(self, case: Case) -> None:
        cp, dense, tensors = both(case)
        for i, tensor in enumerate(tensors):
            got, want = (
                jvp(
                    lambda t, f=f, i=i: f(*tensors[:i], t, *tensors[i + 1 :]),
                    (tensor,),
                    (torch.ones_like(tensor),),
                )
                for f in (cp, dense)
            )
            assert_trees_close(got, want)

    def test_jvp_without_grad_mode(self, case: Case) -> None:
        cp, dense, tensors = both(case)
        tangents = tuple(torch.randn_like(t) for t in tensors)
        with torch.no_grad():
            got = jvp(cp, tuple(tensors), tangents)
        assert_trees_close(got, jvp(dense, tuple(tensors), tangents))

    @pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
    def test_jacobian(self, case: Case, jacobian: Any) -> None:
        cp, dense, tensors = both(case)
        if case.exact.is_complex:
            with pytest.raises(RuntimeError, match="Expected all inputs to be real"):
                jacobian(cp, 1)(*tensors)
            return
        for argument in (1, len(tensors) - 1):
            got, want = jacobian(cp, argument)(*tensors), jacobian(dense, argument)(*tensors)
            assert_close(got, want, f"jacobian of argument {argument}")

    def test_hessian(self, case: Case) -> None:
        cp, dense, tensors = both(case)
        # Of two factors of different groups: the mixed block goes through what is kept.
        names = list(case.leaves().named())
        second = f"factor {len(case.leaves().factors) - 1}"
        arguments = (names.index("factor 0"), names.index(second))
        if case.exact.is_complex:
            with pytest.raises(RuntimeError, match="Expected all inputs to be real"):
                hessian(lambda *t: power(cp(*t)), arguments)(*tensors)
            return
        got = hessian(lambda *t: cp(*t).sin().sum(), arguments)(*tensors)
        assert_trees_close(got, hessian(lambda *t: dense(*t).sin().sum(), arguments)(*tensors))

    def test_jvp_of_grad(self, case: Case) -> None:
        cp, dense, tensors = both(case)
        every = tuple(range(len(tensors)))
        tangents = tuple(torch.randn_like(t) for t in tensors)
        got, want = (
            jvp(grad(lambda *t, f=f: power(f(*t)), every), tuple(tensors), tangents)
            for f in (cp, dense)
        )
        assert_trees_close(got, want)

    def test_jvp_of_jvp(self, case: Case) -> None:
        cp, dense, tensors = both(case)
        once, twice = (tuple(torch.randn_like(t) for t in tensors) for _ in range(2))
        got, want = (
            jvp(lambda *t, f=f: jvp(f, t, once)[1], tuple(tensors), twice) for f in (cp, dense)
        )
        assert_trees_close(got, want)

    def test_jvp_of_vmap(self, case: Case) -> None:
        """Batched are the tensors, or the direction, or one tensor beside others that are not."""
        cp, dense, tensors = both(case)
        stacked = tuple(torch.stack([t, 1 - t]) for t in tensors)
        one = tuple(stacked[i] if i == 1 else t for i, t in enumerate(tensors))
        dims = tuple(0 if i == 1 else None for i in range(len(tensors)))
        for given, where in ((stacked, 0), (one, dims)):
            tangents = tuple(torch.randn_like(t) for t in given)
            got, want = (
                jvp(lambda *t, f=f, w=where: vmap(f, w)(*t), given, tangents) for f in (cp, dense)
            )
            assert_trees_close(got, want)
        directions = tuple(torch.randn_like(t) for t in stacked)
        got, want = (
            vmap(lambda *v, f=f: jvp(f, tuple(tensors), v)[1])(*directions) for f in (cp, dense)
        )
        assert_close(got, want, "tangent")

    @pytest.mark.parametrize("memory", MEMORY)
    def test_grad_of_vmap_over_each_argument(self, case: Case, memory: Memory) -> None:
        """As an ensemble is trained: the loss of all members is differentiated outside of vmap."""
        every = tuple(range(len(case.leaves().named())))
        cp, tensors = as_function(case, lambda leaves: case.cp(leaves, memory=memory))
        dense, _ = as_function(case, case.dense)
        for i, tensor in enumerate(tensors):
            given = [*tensors[:i], torch.stack([tensor, 1 - tensor, -tensor]), *tensors[i + 1 :]]
            dims = tuple(0 if j == i else None for j in every)
            got, want = (
                grad(lambda *t, f=f, d=dims: power(vmap(f, d)(*t)), every)(*given)
                for f in (cp, dense)
            )
            assert_trees_close(got, want)

    def test_vmap_over_every_argument(self, case: Case) -> None:
        cp, dense, tensors = both(case)
        stacked = [torch.stack([t, 2 * t + 1, -t]) for t in tensors]
        assert_close(vmap(cp)(*stacked), vmap(dense)(*stacked), "y")

    def test_vmap_over_each_argument(self, case: Case) -> None:
        cp, dense, tensors = both(case)
        for i, tensor in enumerate(tensors):
            arguments = [*tensors[:i], torch.stack([tensor, 1 - tensor], -1), *tensors[i + 1 :]]
            dims = tuple(-1 if j == i else None for j in range(len(tensors)))
            got, want = vmap(cp, dims)(*arguments), vmap(dense, dims)(*arguments)
            assert_close(got, want, f"y over argument {i}")

    def test_vmap_of_backward(self, case: Case) -> None:
        cp, dense, tensors = both(case)
        for tensor in tensors:
            tensor.requires_grad_()
        grads_y = torch.stack([case.grad_y(), case.grad_y(seed=5)])
        got, want = (
            torch.autograd.grad(f(*tensors), tensors, grads_y, is_grads_batched=True)
            for f in (cp, dense)
        )
        assert_trees_close(got, want)

    def test_per_sample_gradients(self, case: Case) -> None:
        """vmap(grad) of the module itself, one gradient of each parameter per sample."""
        layer, x = case.make(), case.leaves().x
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
            return power(functional_call(layer, values, (sample,)))

        got = vmap(grad(loss), (None, 0))(parameters, x)
        for i, sample in enumerate(x):
            layer.zero_grad()
            power(layer(sample)).backward()
            for name, parameter in layer.named_parameters():
                assert_close(got[name][i], parameter.grad, f"sample {i}, {name}")


def test_gradients_of_frozen_parameters_are_none() -> None:
    case = BY_ID["linear-order3"]
    layer = case.make()
    layer.cp.factors[1].requires_grad_(False)
    layer(case.leaves().x).sum().backward()
    assert layer.cp.factors[1].grad is None
    assert layer.cp.factors[0].grad is not None


@pytest.mark.parametrize("case", params([BY_ID["linear-order3"], BY_ID["conv-3x3"]]))
def test_explicit_pair_is_differentiable(case: Case) -> None:
    """The closed-form backward consists of differentiable operations."""
    leaves = case.leaves().map(Tensor.requires_grad_)
    named = leaves.named()
    _, saved = case.cp_forward(leaves)
    grads = case.cp_backward(case.grad_y(), saved)
    got = torch.autograd.grad(
        sum(g.square().sum() for g in grads.values()), [named[name] for name in grads]
    )
    leaves = case.leaves().map(Tensor.requires_grad_)
    tensors = [leaves.named()[name] for name in grads]
    first = torch.autograd.grad(case.dense(leaves), tensors, case.grad_y(), create_graph=True)
    want = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
    assert_trees_close(got, want)


def test_a_bias_batched_alone_under_vmap() -> None:
    """The bias is added in place, which vmap refuses where only the bias is batched."""
    layer, x = CPLinear(12, 8, rank=2, dtype=torch.float64), torch.randn(3, 12).double()
    biases = torch.randn(5, 8, dtype=torch.float64)
    got = torch.func.vmap(lambda bias: torch.func.functional_call(layer, {"bias": bias}, (x,)))(
        biases
    )
    torch.testing.assert_close(got, (layer(x) - layer.bias) + biases.unsqueeze(1))
