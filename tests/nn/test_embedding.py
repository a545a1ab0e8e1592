"""What only lookups and their heads have: padding rows, distinct indices, tied tables, resizing."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import polyadic
from cases.embedding import embedding
from cases.weights import by_einsum, table
from compare import assert_close
from polyadic import CPTensor
from polyadic import functional as PF
from polyadic.kernels.embedding import EmbeddingMap
from polyadic.nn import CPEmbedding, CPTiedLinear
from polyadic.plans import LinearPlan, LinearRoute
from polyadic.testing import allocations, kept_bytes

Shape = tuple[int, ...]


def make(
    size: int, in_shape: Shape, out_shape: Shape, rank: int, *, weights: bool = False, **kwargs: Any
) -> CPEmbedding:
    """A layer in float64 with factors of order 1."""
    case = embedding("own", size, in_shape, out_shape, rank, (), weights=weights, **kwargs)
    layer: CPEmbedding = case.make()
    return layer


class TestPadding:
    def test_row_and_gradient_are_zero(self) -> None:
        layer = make(10, (3, 4), (2, 2), 3, padding_idx=7)
        y = layer(torch.tensor([7, 1, 7]))
        assert y[[0, 2]].count_nonzero() == 0
        assert y[1].count_nonzero() == 4
        y[[0, 2]].sum().backward()
        assert all(f.grad.count_nonzero() == 0 for f in layer.cp.parameters())

    def test_counts_from_the_end(self) -> None:
        assert CPEmbedding(10, 4, -3, rank=2).padding_idx == nn.Embedding(10, 4, -3).padding_idx

    def test_without_it_no_row_is_zero(self) -> None:
        assert make(10, (3, 4), (2, 2), 3)(torch.arange(10)).abs().amin(1).gt(0).all()


class TestUnique:
    def test_rule(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From 512 indices on, where at most half of them are distinct, each is looked up once."""
        rows: list[int] = []
        forward = EmbeddingMap.forward
        monkeypatch.setattr(
            EmbeddingMap, "forward", lambda m, x, b, f: rows.append(len(x)) or forward(m, x, b, f)
        )
        layer = make(1000, (10, 10, 10), (2, 3), 3)
        repeated, distinct = torch.arange(256), torch.arange(512)
        layer(repeated.repeat(2))
        layer(repeated.repeat(2)[:-1])
        layer(distinct)
        assert rows == [256, 511, 512]

    def test_no_gradient_larger_than_the_lookup(self) -> None:
        """Nothing of the size of the table is made: the largest tensor is that of the output."""
        layer = CPEmbedding(50257, 768, rank=8)
        indices = torch.randint(50257, (32,))
        made = allocations(lambda: layer(indices).square().sum().backward())
        assert max(allocation.nbytes for allocation in made) == 32 * 768 * 4


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("groups", [(3,), (1, 2), (2, 1), (1, 1, 1)])
def test_any_in_factors_may_be_joined(groups: tuple[int, ...], weights: bool) -> None:
    """A law of plans: each computes the same rows and gradients."""
    layer = make(23, (2, 3, 4), (3, 2), 5, weights=weights, padding_idx=3)
    factors = [f.detach() for f in layer.cp.factors]
    if weights:
        factors.insert(0, layer.cp.weights.detach().unsqueeze(0))
        groups = (groups[0] + 1, *groups[1:])
    route = LinearRoute(groups, (1, 1))
    indices, grad_y = torch.randint(23, (40,)), torch.randn(40, 6, dtype=torch.float64)
    leaves = [f.clone().requires_grad_() for f in factors]
    count = len(factors) - 2
    rows = by_einsum(leaves).reshape(24, 6)[indices].masked_fill((indices == 3).unsqueeze(1), 0)
    want = torch.autograd.grad(rows, leaves, grad_y)
    for keep in (True, False):
        embedding = EmbeddingMap(LinearPlan(route, route, keep), count, padding_idx=3)
        y, kept = embedding.forward(indices, None, factors)
        assert len(kept) == keep
        assert_close(y, rows, "y")
        needs = (False, *(True,) * len(factors))
        _, grads = embedding.backward(grad_y, indices, kept, factors, needs)
        for got, expected in zip(grads, want, strict=True):
            assert_close(got, expected, "gradient")


@pytest.mark.parametrize(
    ("rows", "groups"),
    [(0, (1, 1, 1)), (11, (1, 1, 1)), (12, (2, 1)), (24, (1, 2)), (47, (1, 2)), (48, (3,))],
)
def test_factors_are_joined_where_indices_are_many(
    rows: int, groups: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From twice as many indices on as the Khatri-Rao product has rows, the last modes first."""
    seen: list[Any] = []
    forward = EmbeddingMap.forward
    monkeypatch.setattr(
        EmbeddingMap, "forward", lambda m, x, b, f: seen.append(m.plan) or forward(m, x, b, f)
    )
    layer = make(24, (2, 3, 4), (3, 2), 5)
    layer(torch.randint(24, (rows,)))
    assert [plan.forward.in_groups for plan in seen] == [groups]
    assert [plan.backward.in_groups for plan in seen] == [groups]


def test_saves_indices_alone() -> None:
    """For the backward "balanced" keeps 8 bytes per index beside the factors, "fast" also Z."""
    kept: dict[str, int] = {}
    for memory in ("balanced", "least", "fast"):
        layer = CPEmbedding(1000, 64, rank=16, memory=memory)
        indices = torch.randint(1000, (100,))
        kept[memory] = kept_bytes(partial(layer, indices), leave_out=layer.parameters())
    assert kept == {"balanced": 800, "least": 800, "fast": 800 + 100 * 16 * 4}


class TestDerivatives:
    def test_vmap_over_indices(self) -> None:
        layer = make(10, (3, 4), (2, 2), 3, padding_idx=2)
        indices = torch.tensor([[1, 2], [9, 9], [0, 2]])
        assert_close(vmap(layer)(indices), layer(indices), "y")
        values = {k: v.detach() for k, v in layer.named_parameters()}

        def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(layer, values, (sample,)).square().sum()

        got = vmap(grad(loss), (None, 0))(values, indices)
        for i, sample in enumerate(indices):
            want = grad(loss)(values, sample)
            for name in want:
                assert_close(got[name][i], want[name], name)


class TestTiedHead:
    def test_shares_parameters(self) -> None:
        """One set of parameters, to which lookup and head both send their gradient."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = make(23, (2, 3, 4), (3, 2), 5)
                self.head = self.embed.as_linear()

            def forward(self, indices: Tensor) -> Tensor:
                return self.head(self.embed(indices))

        model, indices = Model(), torch.randint(23, (4, 3))
        assert sum(p.numel() for p in model.parameters()) == 5 * (2 + 3 + 4 + 3 + 2)
        model(indices).square().sum().backward()
        got = [p.grad for p in model.parameters()]
        weight = table(model.embed)
        want = F.linear(F.embedding(indices, weight), weight).square().sum()
        for g, w in zip(got, torch.autograd.grad(want, list(model.parameters())), strict=True):
            assert_close(g, w, "gradient")
        copied = copy.deepcopy(model)
        assert copied.head.cp is copied.embed.cp
        copied.load_state_dict(model.state_dict())

    def test_padding_row_shows_in_the_head_alone(self) -> None:
        layer = make(23, (2, 3, 4), (3, 2), 5, padding_idx=4)
        head = layer.as_linear()
        others = torch.arange(23) != 4
        assert torch.equal(head.weight[others], layer.weight[others])
        assert layer.weight[4].count_nonzero() == 0
        assert head.weight[4].count_nonzero() == 6

    def test_wants_an_embedding(self) -> None:
        with pytest.raises(TypeError, match="CPEmbedding, got Linear"):
            CPTiedLinear(nn.Linear(2, 3))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 7, 97, 1000, 4096, 30522, 32000, 50257, 151936])
def test_padded_shape(size: int, order: int) -> None:
    modes = polyadic.padded_shape(size, order)
    assert len(modes) == order
    assert math.prod(modes) >= size
    assert max(modes) - min(modes) <= 1
    # One less in the sum is too few, however it is distributed.
    low, more = divmod(sum(modes) - 1, order)
    assert (low + 1) ** more * low ** (order - more) < size


@pytest.mark.parametrize(("size", "dim", "rank"), [(50257, 768, 2048), (30522, 384, 768)])
def test_real_vocabularies(size: int, dim: int, rank: int) -> None:
    """A hundred times fewer parameters at ranks above twice the embedding dimension."""
    layer = CPEmbedding(size, dim, rank=rank, device="meta")
    parameters = sum(p.numel() for p in layer.parameters())
    assert size * dim / parameters >= 100
    assert rank >= 2 * dim
    small = CPEmbedding(size, dim, rank=32)
    indices = torch.randint(size, (4, 128))
    indices[0, 0] = size - 1
    y = small(indices)
    assert y.shape == (4, 128, dim)
    y.sum().backward()
    assert small.as_linear()(y[:2, 0]).shape == (2, size)


def test_initial_variance_is_that_of_torch() -> None:
    weight = torch.stack([CPEmbedding(1000, 96, rank=64).weight for _ in range(40)])
    # Of 40 tables whose entries are uncorrelated: the mean square deviates by well below 5 %.
    assert abs(weight.mean().item()) < 0.02
    assert abs(weight.square().mean().item() - 1) < 0.05


class TestHome:
    """The layer in the company of the rest of torch."""

    def test_autocast_leaves_it_alone(self) -> None:
        layer, indices = CPEmbedding(100, 24, rank=4), torch.randint(100, (5,))
        plain = torch.autograd.grad(layer(indices).sum(), list(layer.parameters()))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(indices)
            inside = torch.autograd.grad(y.sum(), list(layer.parameters()))
            assert y.dtype == nn.Embedding(3, 4)(indices % 3).dtype == torch.float32
        assert all(map(torch.equal, plain, inside))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_halves(self, dtype: torch.dtype) -> None:
        """Error at most twice that of torch's lookup in the rounded table.

        Three roundings (of Z, KC and y) against torch's one: √3 of its error. Summed over draws
        of the layer's own factors; in a product of Gaussians a few entries make up the norm.
        """
        ours = theirs = 0.0
        for seed in range(8):
            torch.manual_seed(seed)
            shapes = {"in_shape": (10, 10, 10), "out_shape": (4, 8)}
            low = CPEmbedding(1000, 32, rank=24, dtype=dtype, **shapes)
            exact = table(copy.deepcopy(low).double()).detach()
            indices = torch.randint(1000, (300,))
            assert low(indices).dtype == dtype
            ours += (low(indices).double() - exact[indices]).square().sum().item()
            theirs += (exact.to(dtype).double() - exact)[indices].square().sum().item()
        assert ours <= 2**2 * theirs
        low(indices).sum().backward()
        assert all(p.grad.dtype == dtype for p in low.parameters())

    def test_half_gradients_are_summed_in_fp32(self) -> None:
        """Of 4096 equal rows; a bfloat16 sum would stand still at 256."""
        layer = CPEmbedding(2, 1, rank=1, in_shape=(2,), out_shape=(1,), dtype=torch.bfloat16)
        for p in layer.parameters():
            nn.init.ones_(p)
        ins, outs = layer.cp.factor_groups()
        PF.cp_embedding(
            torch.zeros(4096, dtype=torch.int64), ins, outs, unique=False
        ).sum().backward()
        assert ins[0].grad[0].item() == 4096

    @pytest.mark.slow
    def test_compile(self) -> None:
        torch._dynamo.reset()
        layer = make(23, (2, 3, 4), (3, 2), 5, padding_idx=3)
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        for count in (5, 600, 7):
            indices = torch.randint(23, (count, 2))
            y, want = compiled(indices), layer(indices)
            assert_close(y, want, "y")
            for g, w in zip(
                torch.autograd.grad(y.square().sum(), list(layer.parameters())),
                torch.autograd.grad(want.square().sum(), list(layer.parameters())),
                strict=True,
            ):
                assert_close(g, w, "gradient")


INS, OUTS = [torch.ones(3, 2), torch.ones(4, 2)], [torch.ones(5, 2)]
ERRORS: list[tuple[str, Any, type[Exception], str]] = [
    ("max_norm", lambda: CPEmbedding(9, 4, max_norm=1.0, rank=2), ValueError, "max_norm"),
    ("sparse", lambda: CPEmbedding(9, 4, sparse=True, rank=2), ValueError, "sparse"),
    ("freq", lambda: CPEmbedding(9, 4, scale_grad_by_freq=True, rank=2), ValueError,
     "scale_grad_by_freq"),
    ("size-0", lambda: CPEmbedding(0, 4, rank=2), ValueError, "num_embeddings"),
    ("dim-float", lambda: CPEmbedding(9, 4.0, rank=2), TypeError, "embedding_dim"),
    ("rank-0", lambda: CPEmbedding(9, 4, rank=0), ValueError, "rank"),
    ("padding-outside", lambda: CPEmbedding(9, 4, 9, rank=2), ValueError, r"\[-9, 9\), got 9"),
    ("padding-float", lambda: CPEmbedding(9, 4, 1.0, rank=2), TypeError, "padding_idx"),
    ("in-shape", lambda: CPEmbedding(9, 4, rank=2, in_shape=(2, 4)), ValueError, "8 rows, fewer"),
    ("out-shape", lambda: CPEmbedding(9, 4, rank=2, out_shape=(2, 3)), ValueError, "out_shape"),
    ("memory", lambda: CPEmbedding(9, 4, rank=2, memory="none"), ValueError, "memory"),
    ("not-a-tensor", lambda: PF.cp_embedding([1], INS, OUTS), TypeError, "indices must be"),
    ("float", lambda: PF.cp_embedding(torch.ones(2), INS, OUTS), TypeError, "int64 or int32"),
    ("bool", lambda: PF.cp_embedding(torch.ones(2) > 0, INS, OUTS), TypeError, "int64 or int32"),
    ("device", lambda: PF.cp_embedding(torch.ones(2, device="meta").long(), INS, OUTS),
     ValueError, "move one"),
    ("rows", lambda: PF.cp_embedding(torch.arange(2), INS, OUTS, num_embeddings=13), ValueError,
     "12 rows"),
    ("negative", lambda: PF.cp_embedding(torch.tensor([-1]), INS, OUTS), IndexError, r"\[0, 12\)"),
    ("beyond", lambda: PF.cp_embedding(torch.tensor([12]), INS, OUTS), IndexError, r"\[0, 12\)"),
    ("in-the-padding", lambda: PF.cp_embedding(torch.tensor([11]), INS, OUTS, num_embeddings=11),
     IndexError, r"\[0, 11\)"),
    ("weights", lambda: PF.cp_embedding(torch.tensor([1]), INS, OUTS, weights=torch.ones(3)),
     ValueError, "weights must have shape"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "match"), [pytest.param(*rest, id=name) for name, *rest in ERRORS]
)
def test_errors(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_repeats_in_half_precision(dtype: torch.dtype) -> None:
    """Gradients of frequent tokens: no worse with distinct indices than without, or torch's."""
    torch.manual_seed(0)
    layer = CPEmbedding(3000, 32, rank=16, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    frequencies = 1 / torch.arange(1, 3001, dtype=torch.float64)
    indices = torch.multinomial(frequencies, 20_000, replacement=True)
    grad_y = torch.randn(20_000, 32).to(dtype)

    def gradients(module: CPEmbedding, unique: bool | None) -> list[Tensor]:
        ins, outs = module.cp.factor_groups()
        y = PF.cp_embedding(indices, ins, outs, num_embeddings=3000, unique=unique)
        leaves = list(module.cp.parameters())
        return list(torch.autograd.grad(y, leaves, grad_y.to(y.dtype)))

    def error(got: list[Tensor], want: list[Tensor]) -> float:
        pairs = zip(got, want, strict=True)
        return max(((g.double() - w).norm() / w.norm()).item() for g, w in pairs)

    want = gradients(exact, False)
    each, plain, once = (error(gradients(layer, unique), want) for unique in (False, None, True))
    dense = torch.zeros(3000, 32, dtype=dtype, requires_grad=True)
    (got,) = torch.autograd.grad(F.embedding(indices, dense), dense, grad_y)
    right = torch.zeros(3000, 32, dtype=torch.float64).index_add_(0, indices, grad_y.double())
    torchs = error([got], [right])
    assert max(plain, once) <= 1.05 * each
    assert max(plain, once, each) <= torch.finfo(dtype).eps < torchs


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(("before", "after"), [(10, 7), (10, 12), (10, 13), (10, 40), (12, 3)])
def test_rows_that_stay_keep_their_values(before: int, after: int, weights: bool) -> None:
    """A table of another number of rows: those added are finite, and all are trained."""
    layer = CPEmbedding(before, 6, padding_idx=1, rank=4, in_shape=(3, 4))
    if weights:
        layer.cp = CPTensor(layer.cp.tensorized_shape, 4, weights=True)
        torch.nn.init.normal_(layer.cp.weights)
    table, kept = layer.weight.detach(), min(before, after)
    layer.resize(after)
    assert layer.weight.shape == (after, 6)
    assert torch.equal(layer.weight[:kept], table[:kept])
    assert layer.in_shape == layer.cp.tensorized_shape[0] == (-(-after // 4), 4)
    every = torch.arange(after)
    torch.testing.assert_close(layer(every), layer.weight)
    torch.testing.assert_close(
        layer.as_linear()(torch.eye(6)).t()[2:], layer.weight[2:], rtol=1e-5, atol=1e-5
    )
    layer(every).square().sum().backward()
    for factor in layer.cp.factors:
        assert bool(factor.grad.isfinite().all())
    assert bool(layer.weight[kept:].isfinite().all())
    assert f"{after}, 6" in repr(layer)
    again = copy.deepcopy(layer)
    assert torch.equal(again(every), layer(every))


def test_layers_that_share_a_table_are_resized_one_by_one() -> None:
    first, second = (CPEmbedding(10, 6, rank=4, order=2) for _ in range(2))
    second.cp = first.cp
    for layer in (first, second):
        layer.requires_grad_(False).resize(30)
    assert torch.equal(first.weight, second.weight)
    assert not first.cp.factors[0].requires_grad


def test_tables_that_cannot_be_resized() -> None:
    layer = CPEmbedding(10, 6, padding_idx=8, rank=2)
    with pytest.raises(ValueError, match="padding_idx"):
        layer.resize(8)
    with pytest.raises(TypeError, match="num_embeddings must be a positive int"):
        layer.resize(8.0)
    assert layer.num_embeddings == 10
    with pytest.raises(ValueError, match="layer of a joint tensor cannot be resized"):
        CPEmbedding.joint(2, 10, 6, rank=3)[0].resize(12)
