"""Layers that share one CP tensor, against torch's layers with weights made by one einsum each."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polyadic
from cases.weights import dense_conv, dense_conv_transpose, dense_embedding, dense_linear
from compare import assert_close
from polyadic import CPSlice, CPTensor
from polyadic.nn import CPConv1d, CPConv2d, CPConv3d, CPConvTranspose2d, CPEmbedding, CPLinear


@dataclass(frozen=True)
class Joint:
    """Three layers of one kind.

    Args:
        cls: the class.
        args: arguments all layers share.
        options: those in which each differs.
        size: shape of the input.
        dense: what torch computes with the parameters of one.
        weights: with λ.
    """

    cls: Any
    args: dict[str, Any]
    options: list[dict[str, Any]]
    size: tuple[int, ...]
    dense: Callable[[Any, Tensor], Tensor]
    weights: bool = True

    def make(self, dtype: torch.dtype = torch.float64) -> nn.ModuleList:
        torch.manual_seed(0)
        layers = self.cls.joint(self.options, **self.args, rank=4, dtype=dtype)
        if self.weights:
            scale = nn.Parameter(torch.rand(4, dtype=dtype) + 0.5)
            layers[0].cp.joint.weights = scale
        return layers

    def x(self, dtype: torch.dtype = torch.float64) -> Tensor:
        if self.cls is CPEmbedding:
            return torch.randint(23, self.size)
        return torch.randn(self.size, dtype=dtype)

    def expected(self, layers: nn.ModuleList, i: int, x: Tensor) -> Tensor:
        return self.dense(layers[i], x)


CASES = {
    "linear": Joint(
        CPLinear, {"in_features": 6, "out_features": 10, "order": 2}, [{}, {"bias": False}, {}],
        (3, 2, 6), dense_linear,
    ),
    "linear order 3": Joint(
        CPLinear, {"in_features": 12, "out_features": 7}, [{"memory": "least"}, {}, {}],
        (1, 12), dense_linear, weights=False,
    ),
    "linear no rows": Joint(
        CPLinear, {"in_features": 6, "out_features": 10, "order": 2}, [{}, {}, {}],
        (0, 6), dense_linear,
    ),
    "conv1d": Joint(
        CPConv1d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3},
        [{}, {"stride": 2}, {"padding": 2, "dilation": 2}], (2, 4, 9), dense_conv,
    ),
    "conv2d": Joint(
        CPConv2d, {"in_channels": 4, "out_channels": 6, "kernel_size": (3, 2)},
        [{"padding": 1}, {"stride": (2, 1), "bias": False}, {"dilation": (1, 3)}],
        (2, 4, 7, 6), dense_conv,
    ),
    "conv3d": Joint(
        CPConv3d, {"in_channels": 2, "out_channels": 3, "kernel_size": (1, 2, 2)},
        [{"padding": 1}, {}, {"stride": 2}], (1, 2, 4, 5, 3), dense_conv, weights=False,
    ),
    "conv transposed": Joint(
        CPConvTranspose2d, {"in_channels": 4, "out_channels": 6, "kernel_size": 2},
        [{"stride": 2, "output_padding": 1}, {"padding": 1}, {}], (2, 4, 3, 5),
        dense_conv_transpose,
    ),
    "embedding": Joint(
        CPEmbedding, {"num_embeddings": 23, "embedding_dim": 6}, [{}, {}, {}], (5, 2),
        dense_embedding,
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", CASES)


def leaves(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    parameters = list(layers.parameters())
    return [x, *parameters] if x.is_floating_point() else parameters


@each
def test_values_and_gradients_of_all_layers_together(name: str) -> None:
    """A loss in which every layer has a part; also in reverse order and from the end."""
    case = CASES[name]
    layers, x = case.make(), case.x()
    x.requires_grad_(x.is_floating_point())
    got = [layer(x) for layer in layers]
    want = [case.expected(layers, i, x) for i in range(3)]
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, "y")
    loss = sum((y * y.cos()).sum() for y in got)
    loss_dense = sum((y * y.cos()).sum() for y in want)
    wrt = leaves(layers, x)
    for g, w in zip(
        torch.autograd.grad(loss, wrt), torch.autograd.grad(loss_dense, wrt), strict=True
    ):
        assert_close(g, w, "gradient")


@pytest.mark.parametrize("name", [name for name in CASES if name != "linear no rows"])
def test_a_layer_alone_sends_gradients_to_its_row(name: str) -> None:
    case = CASES[name]
    layers, x = case.make(), case.x()
    layers[1](x).square().sum().backward()
    rows = layers[0].cp.joint.factors[0].grad
    assert rows[1].count_nonzero() == 4
    assert rows[[0, 2]].count_nonzero() == 0
    assert layers[0].bias is None or layers[0].bias.grad is None


@each
def test_second_derivatives(name: str) -> None:
    case = CASES[name]
    layers, x = case.make(), case.x()
    x.requires_grad_(x.is_floating_point())
    wrt = leaves(layers, x)
    found = []
    for outputs in (
        [layer(x) for layer in layers],
        [case.expected(layers, i, x) for i in range(3)],
    ):
        loss = sum(y.sin().sum() for y in outputs)
        first = torch.autograd.grad(loss, wrt, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), wrt))
    for g, w in zip(*found, strict=True):
        assert_close(g, w, "second derivative")


def test_half_precision_rounds_the_scale_once() -> None:
    """λ ∘ L_1 ∘ L_2 in bfloat16 is the exact product, rounded."""
    torch.manual_seed(0)
    joint = CPTensor((3, 2, (4,), (5,)), 64, weights=True, dtype=torch.bfloat16)
    nn.init.normal_(joint.weights)
    exact = joint.weights.double() * joint.factors[0][2].double() * joint.factors[1][1].double()
    assert torch.equal(joint.layer(2, 1).weights, exact.to(torch.bfloat16))
    assert joint.layer(2, 1).to_matrix().dtype == torch.bfloat16


class TestParameters:
    """They exist once, and every layer names them."""

    def test_exist_once(self) -> None:
        shapes = {"in_shape": (4, 16), "out_shape": (2, 4, 4)}
        layers = CPLinear.joint(5, 64, 32, rank=8, bias=False, **shapes)
        assert sum(p.numel() for p in layers.parameters()) == 8 * (5 + 4 + 16 + 2 + 4 + 4)

    def test_state_dict(self) -> None:
        first, second = CASES["conv2d"].make(), CASES["conv2d"].make()
        with torch.no_grad():
            for p in second.parameters():
                p.zero_()
        state = first.state_dict()
        assert "1.cp.joint.factors.0" in state
        assert state["1.cp.joint.factors.0"].data_ptr() == state["2.cp.joint.factors.0"].data_ptr()
        second.load_state_dict(state)
        x = CASES["conv2d"].x()
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a(x), b(x))

    def test_a_layer_alone_can_be_saved(self) -> None:
        layers, x = CASES["linear"].make(), CASES["linear"].x()
        file = io.BytesIO()
        torch.save(layers[2].state_dict(), file)
        file.seek(0)
        other = CASES["linear"].make()
        with torch.no_grad():
            other[2].cp.joint.factors[0].zero_()
        other[2].load_state_dict(torch.load(file))
        assert torch.equal(other[2](x), layers[2](x))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_share_among_themselves(self, copied: Any) -> None:
        layers, x = CASES["conv2d"].make(), CASES["conv2d"].x()
        others = copied(layers)
        assert others[0].cp.joint is others[2].cp.joint
        assert others[0].cp.joint is not layers[0].cp.joint
        assert torch.equal(others[1](x), layers[1](x))

    def test_an_optimizer_step_moves_all_layers(self) -> None:
        layers, x = CASES["linear"].make(), CASES["linear"].x()
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
        layers[0](x).square().sum().backward()
        before = layers[1].weight.clone()
        optimizer.step()
        assert not torch.equal(layers[1].weight, before)
        assert_close(layers[1](x), CASES["linear"].expected(layers, 1, x), "y")

    def test_dtype_and_device(self) -> None:
        layers = CASES["linear"].make().float()
        assert layers[1](CASES["linear"].x(torch.float32)).dtype == torch.float32
        layers = CPLinear.joint(3, 6, 10, rank=4, device="meta")
        layers.to_empty(device="cpu")
        for layer in layers:
            layer.reset_parameters()
        assert layers[0].cp.joint is layers[2].cp.joint
        assert layers[0](torch.ones(2, 6)).isfinite().all()


def test_anywhere_in_a_model() -> None:
    """Layers of one weight in several blocks train like any tied weight."""
    q = CPLinear.joint(2, 12, 12, rank=3, order=2)
    model = nn.Sequential(nn.Sequential(q[0], nn.Tanh()), nn.Sequential(q[1], nn.Tanh()))
    assert sum(p.numel() for p in model.parameters()) == 3 * (2 + 4 + 3 + 4 + 3 - 2) + 24 + 6
    model(torch.randn(4, 12)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_rank_counts_all_layers() -> None:
    """A fraction is of the parameters of all dense layers; FLOPs are those of one."""
    layers = CPLinear.joint(4, 16, 16, in_shape=(4, 4), out_shape=(4, 4), rank=0.25)
    assert layers[0].rank == int(0.25 * 4 * 256 / (16 + 4))
    assert CPLinear.joint(4, 16, 16, rank="break-even")[0].rank == 8


def test_initial_variance_is_that_of_torch() -> None:
    """Of every layer: the mean square of the weights of 40 draws deviates by well below 5 %."""
    drawn = torch.stack(
        [
            torch.stack([layer.weight for layer in CPLinear.joint(3, 48, 24, rank=32)])
            for _ in range(40)
        ]
    )
    variance = drawn.square().mean((0, 2, 3))
    assert (variance * 3 * 48 - 1).abs().max() < 0.05


def test_weight_and_repr() -> None:
    layers = CASES["linear"].make()
    x = CASES["linear"].x()
    assert_close(F.linear(x, layers[1].weight), layers[1](x), "y")
    assert_close(
        torch.stack([layer.weight.t() for layer in layers]),
        layers[0].cp.joint.to_matrix(),
        "all weights",
    )
    assert "layer 1 of CPTensor(shape=(3, 6, 10), tensorized_shape=(3, (2, 3), (2, 5))" in repr(
        layers[1]
    )
    assert repr(CPTensor((2, 3, (4,)), 2).layer(1, -1)).startswith("CPSlice(layer (1, 2) of")


def test_slices_are_cp_tensors() -> None:
    joint = CPTensor((2, 3, (4, 2), (5,)), 3, weights=True, dtype=torch.float64)
    nn.init.normal_(joint.weights)
    part = joint.layer(-1, 2)
    assert isinstance(part, CPSlice)
    assert part.index == (1, 2)
    assert part.tensorized_shape == ((4, 2), (5,))
    assert part.shape == (8, 5)
    assert part.order == 3
    assert_close(part.to_matrix(), joint.to_matrix()[1, 2], "matrix")
    own = CPTensor.from_factors(part.tensorized_shape, part.factors, part.weights)
    assert_close(own.to_tensor(), part.to_tensor(), "tensor")
    assert list(part.state_dict()) == [f"joint.{name}" for name in joint.state_dict()]
    part.reset_parameters()
    assert not torch.equal(own.to_tensor(), part.to_tensor())


def test_freeze_gives_every_flag_back() -> None:
    torch.manual_seed(0)
    layers = CPLinear.joint(3, 16, 10, rank=8, order=2)
    layers[0].cp.joint.factors[1].requires_grad_(False)
    flags, x = [p.requires_grad for p in layers.parameters()], torch.randn(4, 16)
    before = [layer(x) for layer in layers]
    polyadic.freeze(layers, batch=4)
    assert all(layer.frozen is not None for layer in layers)
    for layer, y in zip(layers, before, strict=True):
        torch.testing.assert_close(layer(x), y)
    polyadic.unfreeze(layers)
    assert [p.requires_grad for p in layers.parameters()] == flags
    assert all(map(torch.equal, [layer(x) for layer in layers], before))


class TestTltorch:
    """Joint tensors of tltorch, there and back, bit for bit."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(3, (2, 5), (3, 4)), (2, 3, (4,), (2, 2)), (1, (6,), (5,))])
    def test_from_ours(self, shape: Any, dtype: torch.dtype) -> None:
        pytest.importorskip("tltorch")
        cp = CPTensor(shape, 4, weights=True, dtype=dtype)
        nn.init.normal_(cp.weights)
        theirs = cp.to_tltorch()
        assert theirs.tensorized_shape == shape
        back = CPTensor.from_tltorch(theirs)
        assert (back.tensorized_shape, back.layer_modes) == (cp.tensorized_shape, cp.layer_modes)
        for a, b in zip(cp.parameters(), back.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()

    def test_a_slice(self) -> None:
        pytest.importorskip("tltorch")
        part = CPTensor((2, (4,), (2, 3)), 4, weights=True, dtype=torch.float64).layer(1)
        theirs = part.to_tltorch()
        assert theirs.tensorized_shape == ((4,), (2, 3))
        assert_close(theirs.to_matrix().detach(), part.to_matrix().detach(), "matrix")

    def test_a_linear_layer_of_theirs(self) -> None:
        """Their layer l is our slice l, and takes the tensor back."""
        tltorch = pytest.importorskip("tltorch")
        theirs = tltorch.FactorizedLinear(
            (3, 4), (2, 5), rank=4, n_layers=3, bias=False, dtype=torch.float64
        )
        theirs.weight.normal_(0, 1)
        cp = CPTensor.from_tltorch(theirs.weight)
        x = torch.randn(2, 12, dtype=torch.float64)
        want = [theirs(x, i) for i in range(3)]
        for i in range(3):
            assert_close(F.linear(x, cp.layer(i).to_matrix()), want[i], f"layer {i}")
        theirs.weight = cp.to_tltorch()
        for i in range(3):
            assert torch.equal(theirs(x, i), want[i])

    def test_a_convolution_of_theirs(self) -> None:
        tltorch = pytest.importorskip("tltorch")
        theirs = tltorch.FactorizedConv(4, 6, (3, 2), n_layers=(2, 3), rank=5, dtype=torch.float64)
        theirs.reset_parameters(1)
        cp = CPTensor.from_tltorch(theirs.weight, (2, 3, (6,), (4,), (3, 2)))
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
        want = theirs(x, (1, 2))
        got = F.conv2d(x, cp.layer(1, 2).to_matrix().view(6, 4, 3, 2))
        assert_close(got, want, "y")
        theirs.weight = cp.to_tltorch(tensorized=False)
        assert torch.equal(theirs(x, (1, 2)), want)

    def test_groups_are_needed_where_there_are_none(self) -> None:
        tltorch = pytest.importorskip("tltorch")
        theirs = tltorch.FactorizedConv(4, 6, (3, 2), rank=5)
        with pytest.raises(TypeError, match=r"\(6, 4, 3, 2\) does not say which of its modes"):
            CPTensor.from_tltorch(theirs.weight)
