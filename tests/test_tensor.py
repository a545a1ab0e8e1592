"""CPTensor against one einsum over all factors, and its conversions, bit for bit."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import over
from cases.protocol import Case
from cases.weights import by_einsum
from compare import assert_close
from polyadic import CPTensor, reference


def full(case: Case) -> Tensor:
    """The tensor with one dimension per mode, by einsum."""
    leaves = case.leaves()
    return by_einsum(leaves.factors, *([] if leaves.weights is None else [leaves.weights]))


def tensor(case: Case) -> CPTensor:
    leaves = case.leaves()
    return CPTensor.from_factors(case.tensorized_shape, leaves.factors, leaves.weights)


@over(lambda case: len(case.leaves().factors) == len(case.modes))
def test_to_tensor_and_to_matrix(case: Case) -> None:
    cp, want = tensor(case), full(case)
    sizes = [math.prod(group) for group in case.tensorized_shape]
    assert_close(cp.to_tensor(), want, "tensor")
    assert_close(cp.to_matrix(), want.reshape(sizes), "matrix")
    assert cp.shape == torch.Size(sizes)
    assert cp.order == len(case.modes)
    assert cp.rank == case.rank
    dense = reference.dense(cp)
    assert_close(dense, want.reshape(dense.shape), "reference.dense")


@over(lambda case: len(case.leaves().factors) == len(case.modes))
def test_to_matrix_is_differentiable(case: Case) -> None:
    cp, leaves = tensor(case), case.leaves().map(Tensor.requires_grad_)
    grad = torch.randn(*cp.shape, dtype=case.exact)
    cp.to_matrix().backward(grad)
    matrix = case.matrix(leaves).reshape(cp.shape)
    named = {name: leaf for name, leaf in leaves.named().items() if name not in ("x", "bias")}
    want = dict(zip(named, torch.autograd.grad(matrix, list(named.values()), grad), strict=True))
    got = {f"factor {i}": f.grad for i, f in enumerate(cp.factors)}
    if cp.weights is not None:
        got["weights"] = cp.weights.grad
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], name)


def test_one_group_is_a_vector() -> None:
    cp = CPTensor(((2, 3),), 4, dtype=torch.float64)
    a, b = cp.factors
    assert_close(cp.to_matrix(), torch.einsum("ar,br->ab", a, b).reshape(6), "vector")
    assert cp.to_tensor().shape == (2, 3)


def test_factors_are_parameters_in_a_list() -> None:
    cp = CPTensor(((2, 3), (5,)), 4, weights=True)
    assert len(cp.factors) == 3
    assert [tuple(f.shape) for f in cp.factors] == [(2, 4), (3, 4), (5, 4)]
    assert [tuple(f.shape) for f in cp.factors[1:3]] == [(3, 4), (5, 4)]
    assert cp.factors[-1] is cp.factors[2]
    assert all(isinstance(f, nn.Parameter) for f in cp.factors)
    assert {name for name, _ in cp.named_parameters()} == {
        "factors.0",
        "factors.1",
        "factors.2",
        "weights",
    }
    assert torch.equal(cp.weights, torch.ones(4))
    assert CPTensor(((2, 3), (5,)), 4).weights is None
    groups = cp.factor_groups()
    assert [len(group) for group in groups] == [2, 1]
    assert groups[0][0] is cp.factors[0]
    assert groups[1][0] is cp.factors[2]


def test_tensorized_shape_is_of_plain_ints() -> None:
    for given in ([[2, 3], [5]], (torch.Size([2, 3]), torch.Size([5])), ((2, 3), (5,))):
        cp = CPTensor(given, 4)
        assert cp.tensorized_shape == ((2, 3), (5,))
        assert all(type(group) is tuple for group in cp.tensorized_shape)


def test_from_factors_copies() -> None:
    factors = [torch.randn(2, 4).t().contiguous().t(), torch.randn(3, 4, requires_grad=True)]
    weights = torch.rand(4)
    cp = CPTensor.from_factors(((2,), (3,)), factors, weights)
    for ours, given in zip([*cp.factors, cp.weights], [*factors, weights], strict=True):
        assert torch.equal(ours, given)
        assert ours.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
        assert ours.is_contiguous()
        assert ours.is_leaf
        assert isinstance(ours, nn.Parameter)
    with torch.no_grad():
        factors[0].zero_()
    assert cp.factors[0].abs().sum() > 0
    assert cp.factors[0].dtype == torch.float32


def test_from_factors_keeps_frozen_parameters_frozen() -> None:
    frozen = nn.Parameter(torch.randn(2, 4), requires_grad=False)
    cp = CPTensor.from_factors(((2,), (3,)), [frozen, nn.Parameter(torch.randn(3, 4))])
    assert [f.requires_grad for f in cp.factors] == [False, True]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
)
def test_dtypes(dtype: torch.dtype) -> None:
    cp = CPTensor(((2, 3), (5,)), 4, weights=True, dtype=dtype)
    assert {p.dtype for p in cp.parameters()} == {dtype}
    assert cp.to_matrix().dtype == dtype


def assert_no_shared_storage(a: list[Tensor], b: list[Tensor]) -> None:
    ours = {t.untyped_storage().data_ptr() for t in a}
    assert ours.isdisjoint(t.untyped_storage().data_ptr() for t in b)


def parts(cp: CPTensor) -> list[Tensor]:
    return [*cp.factors, *([] if cp.weights is None else [cp.weights])]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128, torch.complex64]
)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    "groups", [((4, 4, 16), (4, 4, 8)), ((4, 8), (4, 4), (3, 3)), ((7,), (5,)), ((1, 6), (2, 1, 3))]
)
class TestConversions:
    """To and from tltorch and tensorly, bit for bit, both ways, nothing shared."""

    def make(self, groups: Any, weights: bool, dtype: torch.dtype) -> CPTensor:
        cp = CPTensor(groups, 6, weights=weights, dtype=dtype)
        if cp.weights is not None:
            nn.init.normal_(cp.weights)
        return cp

    def test_tltorch(self, groups: Any, weights: bool, dtype: torch.dtype) -> None:
        pytest.importorskip("tltorch")
        cp = self.make(groups, weights, dtype)
        theirs = cp.to_tltorch()
        assert tuple(map(tuple, theirs.tensorized_shape)) == cp.tensorized_shape
        assert tuple(theirs.shape) == tuple(cp.shape)
        assert theirs.rank == cp.rank
        for a, b in zip(cp.factors, theirs.factors, strict=True):
            assert torch.equal(a, b)
            assert b.dtype == dtype
        expected = torch.ones(6, dtype=dtype) if cp.weights is None else cp.weights
        assert torch.equal(theirs.weights, expected)
        if dtype in (torch.float64, torch.complex128):
            assert_close(theirs.to_matrix(), cp.to_matrix(), "matrix")

        back = CPTensor.from_tltorch(theirs)
        assert back.tensorized_shape == cp.tensorized_shape
        assert torch.equal(back.weights, expected)
        assert all(torch.equal(a, b) for a, b in zip(cp.factors, back.factors, strict=True))
        given = [*theirs.factors, theirs.weights]
        assert_no_shared_storage(parts(cp), given)
        assert_no_shared_storage(parts(back), given)

    def test_tensorly(self, groups: Any, weights: bool, dtype: torch.dtype) -> None:
        tensorly = pytest.importorskip("tensorly")
        before = tensorly.get_backend()
        cp = self.make(groups, weights, dtype)
        theirs = cp.to_tensorly()
        assert tensorly.get_backend() == before
        assert theirs.rank == cp.rank
        assert tuple(theirs.shape) == tuple(f.shape[0] for f in cp.factors)
        expected = torch.ones(6, dtype=dtype) if cp.weights is None else cp.weights
        assert torch.equal(theirs.weights, expected)
        assert all(torch.equal(a, b) for a, b in zip(cp.factors, theirs.factors, strict=True))
        if dtype in (torch.float64, torch.complex128):
            with tensorly.backend_context("pytorch"):
                assert_close(tensorly.cp_to_tensor(theirs), cp.to_tensor(), "tensor")

        back = CPTensor.from_tensorly(theirs, groups)
        assert tensorly.get_backend() == before
        assert back.tensorized_shape == cp.tensorized_shape
        assert torch.equal(back.weights, expected)
        assert all(torch.equal(a, b) for a, b in zip(cp.factors, back.factors, strict=True))
        given = [*theirs.factors, theirs.weights]
        assert_no_shared_storage(parts(cp), given)
        assert_no_shared_storage(parts(back), given)


@pytest.mark.parametrize("tensorized", [True, False])
def test_tltorch_by_real_and_imaginary_parts(tensorized: bool) -> None:
    """The parameters of a ``ComplexCP`` are pairs of real numbers, which come and go bit by bit."""
    pytest.importorskip("tltorch")
    cp = CPTensor(((2, 3), (5,)), 4, weights=True, dtype=torch.complex64)
    assert cp.weights is not None
    nn.init.normal_(cp.weights)
    cp.factors[1].requires_grad_(False)
    theirs = cp.to_tltorch(tensorized=tensorized, as_real=True)
    assert type(theirs).__name__ == f"ComplexCPTensor{'ized' if tensorized else ''}"
    stored = [*theirs.parameters()]
    assert [p.dtype for p in stored] == [torch.float32] * 4
    for own, real in zip([cp.weights, *cp.factors], stored, strict=True):
        assert torch.equal(torch.view_as_real(own), real)
    back = CPTensor.from_tltorch(theirs, cp.tensorized_shape)
    assert torch.equal(back.weights, cp.weights)
    assert all(torch.equal(a, b) for a, b in zip(cp.factors, back.factors, strict=True))
    assert_no_shared_storage(parts(back), stored)
    for parameter in stored:
        parameter.requires_grad_(parameter is not stored[2])
    back = CPTensor.from_tltorch(theirs, cp.tensorized_shape)
    assert [f.requires_grad for f in back.factors] == [True, False, True]
    with pytest.raises(TypeError, match="as_real is for complex factors"):
        CPTensor(((2, 3), (5,)), 4).to_tltorch(as_real=True)


def test_from_a_tensor_tltorch_made() -> None:
    tltorch = pytest.importorskip("tltorch")
    for groups in (((4, 4, 16), (4, 4, 8)), ((4, 8), (4, 4), (3, 3))):
        theirs = tltorch.TensorizedTensor.new(groups, 7, factorization="CP", dtype=torch.float64)
        tltorch.tensor_init(theirs)
        cp = CPTensor.from_tltorch(theirs)
        assert_close(cp.to_matrix(), theirs.to_matrix().detach(), "matrix")


def test_from_a_tensor_tensorly_made() -> None:
    """A decomposition as tensorly returns it, one mode to a group, or a plain pair."""
    tensorly = pytest.importorskip("tensorly")
    with tensorly.backend_context("pytorch"):
        theirs = tensorly.random.random_cp((3, 4, 5), rank=2, dtype=torch.float64)
    for given in (theirs, (theirs.weights, theirs.factors), (None, theirs.factors)):
        cp = CPTensor.from_tensorly(given)
        assert cp.tensorized_shape == ((3,), (4,), (5,))
        assert all(torch.equal(a, b) for a, b in zip(cp.factors, theirs.factors, strict=True))
    assert cp.weights is None


def test_repr() -> None:
    """Shapes, rank and both parameter counts, as the notebooks print them."""
    text = repr(CPTensor(((4, 4, 16), (4, 4, 8)), 100))
    for fact in ("(256, 128)", "((4, 4, 16), (4, 4, 8))", "rank=100", "4000 of 32768", "8.2x"):
        assert fact in text, text
    text = repr(CPTensor(((4, 8), (4, 4), (3, 3)), 100))
    for fact in ("(32, 16, 9)", "((4, 8), (4, 4), (3, 3))", "2600 of 4608"):
        assert fact in text, text


@pytest.mark.parametrize(
    ("package", "method"), [("tensorly", "to_tensorly"), ("tltorch", "to_tltorch")]
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*polyadic\[interop\]"):
        getattr(CPTensor(((2, 3), (2, 2)), 3), method)()
