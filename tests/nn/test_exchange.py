"""Torch layers exchanged for CP layers by a fit: what is exact, what is refused, in which metric.

That nothing but the weight changes, there and back, is a law: ``laws/test_conversion.py``.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import polyadic
from cases.weights import cp_by_einsum
from compare import assert_close
from polyadic import CPTensor
from polyadic import nn as pnn
from polyadic.nn import CPConv2d, CPEmbedding, CPLinear

KINDS = {
    nn.Linear: (CPLinear, "linear"),
    nn.Conv1d: (pnn.CPConv1d, "conv"),
    nn.Conv2d: (pnn.CPConv2d, "conv"),
    nn.Conv3d: (pnn.CPConv3d, "conv"),
    nn.ConvTranspose1d: (pnn.CPConvTranspose1d, "conv_transpose"),
    nn.ConvTranspose2d: (pnn.CPConvTranspose2d, "conv_transpose"),
    nn.ConvTranspose3d: (pnn.CPConvTranspose3d, "conv_transpose"),
    nn.Embedding: (CPEmbedding, "embedding"),
}
F64 = {"dtype": torch.float64}


def padded_embedding() -> nn.Embedding:
    layer = nn.Embedding(23, 6, padding_idx=-3, **F64)
    assert not layer.weight[20].any()
    return layer


# A torch layer and the shape of an input.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 10, **F64), (3, 12)),
    "linear no bias": (lambda: nn.Linear(12, 10, bias=False, **F64), (2, 3, 12)),
    "linear primes": (lambda: nn.Linear(7, 5, **F64), (3, 7)),
    "linear from one": (lambda: nn.Linear(1, 3, **F64), (4, 1)),
    "linear to one": (lambda: nn.Linear(6, 1, **F64), (0, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, **F64), (2, 4, 11)),
    "conv1d same": (
        lambda: nn.Conv1d(3, 5, 4, padding="same", dilation=2, bias=False, **F64), (3, 9),
    ),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, **F64), (2, 4, 5, 6)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1, stride=2, **F64), (2, 4, 5, 6)),
    "conv2d all": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 3), **F64),
        (1, 4, 7, 8),
    ),
    "conv2d groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding="valid", **F64), (2, 6, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1, **F64), (2, 6, 5, 5)),
    "conv2d depthwise, more out": (lambda: nn.Conv2d(3, 6, 2, groups=3, **F64), (2, 3, 5, 5)),
    "conv2d circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", **F64), (2, 4, 5, 6),
    ),
    "conv2d reflect same": (
        lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect", **F64), (2, 4, 5, 6),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 1, 2), padding=1, **F64), (1, 2, 4, 3, 5)),
    "transposed 1d": (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, **F64),
        (2, 4, 5),
    ),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 1), dilation=(1, 2), bias=False, **F64),
        (2, 6, 4, 5),
    ),
    "transposed 2d groups": (
        lambda: nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2, **F64), (2, 6, 4, 5),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, padding=1, **F64), (1, 2, 3, 4, 3)),
    "embedding": (lambda: nn.Embedding(24, 6, **F64), (4, 5)),
    "embedding prime": (lambda: nn.Embedding(23, 7, **F64), (11,)),
    "embedding padding": (padded_embedding, (40,)),
}  # fmt: skip
every = pytest.mark.parametrize("name", CASES)


def convert(layer: nn.Module, **options: Any) -> Any:
    cls, name = KINDS[type(layer)]
    return getattr(cls, f"from_{name}")(layer, **options)


def back(layer: nn.Module) -> Any:
    (name,) = (n for cls, n in KINDS.values() if cls is type(layer))
    return getattr(layer, f"to_{name}")()


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    create, size = CASES[name]
    layer = create()
    if isinstance(layer, nn.Embedding):
        return layer, torch.randint(layer.num_embeddings, size)
    return layer, torch.randn(size, dtype=torch.float64)


def options_of(layer: nn.Module) -> dict[str, Any]:
    """What a torch layer says of itself, parameters and state left out."""
    return {
        key: value
        for key, value in vars(layer).items()
        if not key.startswith("_") and key not in ("training", "cp", "memory", "frozen")
    }


def full_rank(layer: nn.Module) -> int:
    """A rank at which every tensor of the layer's modes is a CP tensor: all modes but one."""
    modes = [m for group in convert(layer, rank=1, iterations=1).cp.tensorized_shape for m in group]
    return math.prod(modes) // max(modes)


def storages(module: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in module.parameters()}


def with_cp_weight(name: str, rank: int = 3) -> tuple[nn.Module, CPTensor, Tensor]:
    """A torch layer whose weight is, by one einsum, that of a CP tensor."""
    layer, x = make(name)
    cp = copy.deepcopy(convert(layer, rank=rank, iterations=1).cp)
    with torch.no_grad():
        for factor in cp.factors:
            nn.init.normal_(factor)
        weight = cp_by_einsum(cp).reshape(cp.shape)
        weight = weight.t() if isinstance(layer, nn.Linear) else weight
        weight = weight[: len(layer.weight)].reshape(layer.weight.shape)
        if getattr(layer, "padding_idx", None) is not None:
            weight[layer.padding_idx] = 0
        layer.weight.copy_(weight)
    return layer, cp, x


@every
def test_exact_where_the_rank_suffices(name: str) -> None:
    layer, x = make(name)
    ours = convert(layer, rank=full_rank(layer))
    assert_close(ours.weight, layer.weight, "weight")
    assert_close(ours(x), layer(x), "y")


@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed 2d", "embedding"])
def test_a_layer_of_zeros_is_one_and_trains(name: str) -> None:
    """As a layer that training starts from zero: its output is zero, its gradient is not."""
    layer, x = make(name)
    nn.init.zeros_(layer.weight)
    ours = convert(layer, rank=3)
    assert torch.equal(ours(x), layer(x))
    y = ours(x)
    y.backward(torch.randn_like(y))
    assert any(p.grad.any() for p in ours.cp.parameters())


@pytest.mark.parametrize("name", ["linear", "conv2d groups"])
def test_a_weight_in_any_layout(name: str) -> None:
    layer, x = make(name)
    before = layer(x).detach()
    weight = layer.weight.detach()
    strided = torch.empty(weight.shape[::-1], **F64).permute(*reversed(range(weight.dim())))
    layer.weight = nn.Parameter(strided.copy_(weight))
    assert not layer.weight.is_contiguous()
    ours = convert(layer, rank=full_rank(layer))
    assert_close(ours(x), before, "y")
    assert all(p.is_contiguous() for p in ours.parameters())


def test_flags_of_a_frozen_layer() -> None:
    """They are those it has when unfrozen, and the weight is the same."""
    torch.manual_seed(0)
    layer = CPLinear(16, 10, rank=8, order=2)
    layer.bias.requires_grad_(False)
    before = layer.to_linear()
    polyadic.freeze(layer)
    assert layer.frozen is not None
    after = layer.to_linear()
    assert torch.equal(before.weight, after.weight)
    assert [p.requires_grad for p in after.parameters()] == [True, False]


def test_device_meta_is_not_used_up() -> None:
    """Nothing is drawn: the generator is where it was."""
    layer, cp, _ = with_cp_weight("linear")
    state = torch.get_rng_state()
    ours = convert(layer, cp=cp)
    ours.to_linear()
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.device.type for p in ours.parameters()} == {"cpu"}


class TestArguments:
    """Shapes, rank, order and memory."""

    def test_shapes_and_memory(self) -> None:
        layer = nn.Linear(24, 10)
        ours = CPLinear.from_linear(
            layer, rank=2, in_shape=(4, 6), out_shape=(10,), memory="least", iterations=1
        )
        assert ours.cp.tensorized_shape == ((4, 6), (10,))
        assert (ours.in_shape, ours.out_shape, ours.memory) == ((4, 6), (10,), "least")
        assert CPLinear.from_linear(layer, rank=2, order=2, iterations=1).in_shape == (4, 6)

    @pytest.mark.parametrize("rank", [0.2, "break-even"])
    def test_rank(self, rank: Any) -> None:
        layer = nn.Conv2d(8, 12, 3)
        ours = CPConv2d.from_conv(layer, rank=rank, iterations=1)
        assert ours.rank == CPConv2d(8, 12, 3, rank=rank).rank

    def test_a_fit_by_hand(self) -> None:
        """A ``Decomposition`` in place of a fit; its shapes are taken over, its dtype is not."""
        layer = nn.Linear(12, 10)
        weight = layer.weight.detach().t().double()
        found = polyadic.decompose(weight, ((12,), (2, 5)), 4)
        ours = CPLinear.from_linear(layer, cp=found)
        assert (ours.in_shape, ours.out_shape, ours.rank) == ((12,), (2, 5), 4)
        assert ours.cp.factors[0].dtype == torch.float32
        assert torch.equal(ours.cp.factors[1], found.cp.factors[1].float())

    def test_weights_of_a_tensor_are_kept(self) -> None:
        layer = nn.Linear(12, 10)
        cp = CPTensor(((3, 4), (10,)), 5, weights=True)
        nn.init.normal_(cp.weights)
        ours = CPLinear.from_linear(layer, cp=cp)
        assert torch.equal(ours.cp.weights, cp.weights)
        assert_close(
            ours.to_linear().weight.double(), cp.double().to_matrix().t(), "weight", tolerance=1e-5
        )


class TestMetric:
    """A fit in the second moment of the layer's input lowers the error of its output."""

    @staticmethod
    def errors(layer: nn.Module, x: Tensor, metric: Tensor, **options: Any) -> tuple[float, float]:
        want = layer(x)
        found = [
            convert(layer, rank=4, iterations=60, **options, **given)(x)
            for given in ({}, {"metric": metric})
        ]
        plain, weighted = [((y - want).norm() / want.norm()).item() for y in found]
        return plain, weighted

    def test_linear(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(400, 12, **F64) * torch.logspace(-2, 0, 12, **F64)
        plain, weighted = self.errors(nn.Linear(12, 10, bias=False, **F64), x, x.t() @ x / 400)
        assert weighted < 0.8 * plain

    @pytest.mark.parametrize("groups", [1, 2])
    def test_conv(self, groups: int) -> None:
        torch.manual_seed(0)
        scale = torch.logspace(-2, 0, 4, **F64).repeat(groups).view(-1, 1, 1)
        x = torch.randn(20, 4 * groups, 7, 7, **F64) * scale
        layer = nn.Conv2d(4 * groups, 10, 3, groups=groups, bias=False, **F64)
        patches = nn.functional.unfold(x, 3).transpose(1, 2).reshape(-1, 36)
        plain, weighted = self.errors(layer, x, patches.t() @ patches)
        assert weighted < 0.8 * plain

    def test_transposed(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(20, 8, 5, 5, **F64) * torch.logspace(-2, 0, 8, **F64).view(-1, 1, 1)
        rows = x.movedim(1, -1).reshape(-1, 8)
        layer = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False, **F64)
        plain, weighted = self.errors(layer, x, rows.t() @ rows)
        assert weighted < 0.8 * plain

    def test_frequencies_of_tokens(self) -> None:
        torch.manual_seed(0)
        layer = nn.Embedding(53, 12, **F64)
        frequencies = torch.logspace(0, -4, 53, **F64)
        tokens = torch.multinomial(frequencies, 2000, replacement=True)
        plain, weighted = self.errors(layer, tokens, frequencies)
        assert weighted < 0.8 * plain

    @pytest.mark.parametrize("name", [name for name in CASES if name != "linear to one"])
    def test_gathered_moments_fit(self, name: str) -> None:
        """What ``polyadic.second_moments`` returns for a layer is the metric of its conversion."""
        layer, x = make(name)
        moment = polyadic.second_moments(nn.Sequential(layer), [x], ["0"])["0"]
        ours = convert(layer, rank=full_rank(layer), metric=moment)
        assert_close(ours(x), layer(x), "y")

    def test_joint(self) -> None:
        """Of two layers with one input."""
        torch.manual_seed(0)
        x = torch.randn(400, 12, **F64) * torch.logspace(-2, 0, 12, **F64)
        layers = [nn.Linear(12, 10, bias=False, **F64) for _ in range(2)]
        want = torch.cat([layer(x) for layer in layers])
        found = [
            torch.cat([own(x) for own in CPLinear.joint_from(layers, rank=6, **given)])
            for given in ({}, {"metric": x.t() @ x})
        ]
        plain, weighted = [(y - want).norm().item() for y in found]
        assert weighted < 0.8 * plain

    def test_another_size(self) -> None:
        with pytest.raises(ValueError, match="metric"):
            CPLinear.from_linear(nn.Linear(12, 10), rank=2, metric=torch.eye(10))


@pytest.mark.parametrize("count", [1, 2])
def test_rows_that_pad_a_vocabulary_are_free(count: int) -> None:
    """A table cut off a CP tensor is met where zeros in the rest are not, alone and jointly."""
    torch.manual_seed(0)
    full = CPTensor((count, (8, 8), (4, 5)), 5, dtype=torch.float64)
    layers = [nn.Embedding(57, 20, **F64) for _ in range(count)]
    with torch.no_grad():
        tables = torch.stack([full.layer(i).to_matrix() for i in range(count)])
        for layer, rows in zip(layers, tables, strict=True):
            layer.weight.copy_(rows[:57])
        tables[:, 57:] = 0
    fit = {"rank": 6, "iterations": 400, "tolerance": 1e-9}
    made = joined(*layers, order=2, **fit) if count > 1 else [convert(layers[0], order=2, **fit)]
    zeros = polyadic.decompose(tables, ((count,), (8, 8), (4, 5)), **fit).cp.to_matrix()
    for own, layer, other in zip(made, layers, zeros, strict=True):
        # The best error is 0 where the rows are free, and is not where they are zeros; how near a
        # number of sweeps comes to either is a matter of the draw.
        error = (own.weight - layer.weight).norm()
        assert (other[:57] - layer.weight).norm() > 2 * error


def joined(*layers: nn.Module, **options: Any) -> nn.ModuleList:
    return KINDS[type(layers[0])][0].joint_from(layers, **options)


class TestJoint:
    """Several layers in one CP tensor."""

    @pytest.mark.parametrize("name", ["linear", "conv2d all", "transposed 2d groups", "embedding"])
    def test_exact_where_the_rank_suffices(self, name: str) -> None:
        layers = [make(name)[0] for _ in range(3)]
        for layer in layers:
            nn.init.normal_(layer.weight)
        x = make(name)[1]
        rank = 3 * full_rank(layers[0])
        ours = joined(*layers, rank=rank)
        assert len({id(layer.cp.joint) for layer in ours}) == 1
        assert ours[0].cp.joint.layer_modes == 1
        for own, layer in zip(ours, layers, strict=True):
            assert_close(own(x), layer(x), "y")
            again = back(own)
            assert options_of(again) == options_of(layer)
            assert_close(again.weight, layer.weight, "weight")

    def test_what_differs_is_kept(self) -> None:
        layers = [nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(4, 6, 3, stride=2, padding=1)]
        layers[1].eval()
        ours = CPConv2d.joint_from(layers, rank=2, iterations=1)
        assert ours[0].bias is None
        assert torch.equal(ours[1].bias, layers[1].bias)
        assert (ours[1].stride, ours[1].padding) == ((2, 2), (1, 1))
        assert [own.training for own in ours] == [True, False]

    def test_a_given_tensor(self) -> None:
        layers = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])
        cp = CPTensor((2, (2, 3), (4,)), 3)
        ours = CPLinear.joint_from(layers, cp=cp)
        for i, own in enumerate(ours):
            torch.testing.assert_close(own.weight, cp.layer(i).to_matrix().t())
        assert storages(ours).isdisjoint(storages(cp))

    def test_rank_counts_all_layers(self) -> None:
        layers = [nn.Linear(16, 16) for _ in range(4)]
        shapes = {"in_shape": (4, 4), "out_shape": (4, 4)}
        ours = CPLinear.joint_from(layers, rank=0.25, iterations=1, **shapes)
        assert ours[0].rank == CPLinear.joint(4, 16, 16, rank=0.25, **shapes)[0].rank

    def test_a_slice_is_copied_into_a_layer_of_its_own(self) -> None:
        cp = CPTensor((2, (2, 3), (4,)), 3).layer(1)
        ours = CPLinear.from_linear(nn.Linear(6, 4), cp=cp)
        assert type(ours.cp) is CPTensor
        torch.testing.assert_close(ours.weight, cp.to_matrix().t())


class TestTied:
    """An embedding and an output head with one table."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(23, 6, padding_idx=0, **F64)
            self.body = nn.Linear(6, 6, **F64)
            self.head = nn.Linear(6, 23, **F64)
            self.head.weight = self.embed.weight

        def forward(self, indices: Tensor) -> Tensor:
            y: Tensor = self.head(self.body(self.embed(indices)))
            return y

    def test_model(self) -> None:
        torch.manual_seed(0)
        model = self.Model().eval()
        indices = torch.tensor([[0, 3, 22], [4, 4, 1]])
        want = model(indices)
        bias = model.head.bias.requires_grad_(False)
        model.embed = CPEmbedding.from_embedding(model.embed, rank=9 * 6, order=2, in_shape=(3, 8))
        model.head = model.embed.as_linear(bias)
        assert_close(model(indices), want, "logits")
        assert torch.equal(model.head.bias, bias)
        assert model.head.bias.data_ptr() != bias.data_ptr()
        assert not model.head.bias.requires_grad
        # The factors exist once, under two names, as a tied weight does.
        names = [name for name, _ in model.named_parameters()]
        assert [n for n in names if ".cp." in n] == [f"embed.cp.factors.{i}" for i in range(4)]
        state = model.state_dict()
        assert state["head.cp.factors.1"].data_ptr() == state["embed.cp.factors.1"].data_ptr()
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        other.load_state_dict(state)
        assert torch.equal(other(indices), model(indices))

    def test_to_linear(self) -> None:
        torch.manual_seed(0)
        embed = CPEmbedding(23, 6, padding_idx=2, rank=5, **F64)
        head = embed.as_linear(torch.randn(23, **F64)).eval()
        embed.cp.factors[0].requires_grad_(False)
        dense, x = head.to_linear(), torch.randn(3, 6, **F64)
        assert type(dense) is nn.Linear
        assert dense.weight.requires_grad
        assert not dense.training
        assert_close(dense(x), head(x), "logits")
        assert_close(dense.weight, cp_by_einsum(embed.cp).reshape(embed.cp.shape)[:23], "weight")
        assert storages(dense).isdisjoint(storages(head))
        embed.cp.requires_grad_(False)
        assert not head.to_linear().weight.requires_grad

    def test_bias_of_another_size(self) -> None:
        embed = CPEmbedding(23, 6, rank=5)
        with pytest.raises(ValueError, match=r"bias must have shape \(23,\), got \(22,\)"):
            embed.as_linear(torch.zeros(22))

    def test_a_padding_row_that_is_not_zero(self) -> None:
        layer = nn.Embedding(6, 4, padding_idx=1, **F64)
        with torch.no_grad():
            layer.weight[1] = 3
        with pytest.warns(UserWarning, match="row 1 of the embedding, its padding_idx, is not"):
            ours = CPEmbedding.from_embedding(layer, rank=6, order=1)
        assert not ours(torch.tensor([1])).any()
        assert_close(ours.as_linear().weight, layer.weight, "the head's weight")
        layer.padding_idx = None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = CPEmbedding.from_embedding(layer, rank=6, order=1)
        assert_close(ours(torch.tensor([1])), layer(torch.tensor([1])), "row")


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def changed(layer: nn.Module, change: Callable[[nn.Module], Any]) -> nn.Module:
    change(layer)
    return layer


def own_forward(layer: nn.Module) -> None:
    layer.forward = lambda x: x


class Subclass(nn.Linear):
    pass


def hook(*_: Any) -> None:
    return None


def linear() -> nn.Linear:
    return nn.Linear(4, 6)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: torch.ones(2, 3), TypeError, "expects a torch.nn.Linear, got Tensor"),
    "another layer": (lambda: nn.Conv1d(4, 6, 1), TypeError, "torch.nn.Linear, got Conv1d"),
    "ours": (lambda: CPLinear(4, 6, rank=2), TypeError, "torch.nn.Linear, got CPLinear"),
    "subclass": (lambda: Subclass(4, 6), TypeError, "its subclass Subclass, which may compute"),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2).out_proj, TypeError,
        "its subclass NonDynamicallyQuantizableLinear",
    ),
    "lazy": (lambda: nn.LazyLinear(6), TypeError, "LazyLinear, which has no weight yet; run it"),
    "quantized": (
        lambda: torch.ao.nn.quantized.dynamic.Linear(4, 6), TypeError,
        "convert it before it is quantized",
    ),
    "trained for quantization": (
        lambda: torch.ao.nn.qat.Linear(
            4, 6, qconfig=torch.ao.quantization.get_default_qat_qconfig()
        ),
        TypeError, "got its subclass Linear",
    ),
    "parametrized": (
        lambda: parametrize.register_parametrization(linear(), "weight", Half()) , ValueError,
        "weight of this layer is parametrized; bake it in: "
        "torch.nn.utils.parametrize.remove_parametrizations",
    ),
    "parametrized bias": (
        lambda: parametrize.register_parametrization(linear(), "bias", Half()), ValueError,
        "but bias of this layer is parametrized",
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(linear()), ValueError, "weight of this layer is param",
    ),
    "old weight norm": (
        lambda: nn.utils.weight_norm(linear()), ValueError,
        "by WeightNorm; bake it in: torch.nn.utils.remove_weight_norm(layer)",
    ),
    "old spectral norm": (
        lambda: nn.utils.spectral_norm(linear()), ValueError,
        "by SpectralNorm; bake it in: torch.nn.utils.remove_spectral_norm(layer)",
    ),
    "pruned": (
        lambda: prune.random_unstructured(linear(), "weight", 0.5), ValueError,
        "by RandomUnstructured; bake it in: torch.nn.utils.prune.remove(layer, 'weight')",
    ),
    "pruned bias": (
        lambda: prune.random_unstructured(linear(), "bias", 0.5), ValueError, "nothing attached",
    ),
    "no weight": (
        lambda: changed(linear(), lambda m: setattr(m, "weight", None)), ValueError,
        "make it a torch.nn.Parameter",
    ),
    "forward hook": (
        lambda: changed(linear(), lambda m: m.register_forward_hook(hook)), ValueError,
        "has the forward hook hook, which the CP layer would not have; remove it",
    ),
    "forward pre-hook": (
        lambda: changed(linear(), lambda m: m.register_forward_pre_hook(hook)), ValueError,
        "the forward pre-hook hook",
    ),
    "backward hook": (
        lambda: changed(linear(), lambda m: m.register_full_backward_hook(hook)), ValueError,
        "the backward hook hook",
    ),
    "backward pre-hook": (
        lambda: changed(linear(), lambda m: m.register_full_backward_pre_hook(hook)), ValueError,
        "the backward pre-hook hook",
    ),
    "own forward": (lambda: changed(linear(), own_forward), ValueError, "a forward of its own"),
    "an adapter": (
        lambda: changed(linear(), lambda m: m.add_module("lora", nn.Linear(4, 2))), ValueError,
        "the part lora",
    ),
    "meta": (lambda: nn.Linear(4, 6, device="meta"), ValueError, "meta device; load it first"),
    "8 bits": (
        lambda: nn.Linear(4, 6).to(torch.float8_e4m3fn), TypeError,
        "complex64 or complex128, got torch.float8_e4m3fn",
    ),
    "sparse": (
        lambda: changed(
            linear(), lambda m: setattr(m, "weight", nn.Parameter(m.weight.data.to_sparse()))
        ),
        TypeError, "of layout torch.sparse_coo",
    ),
    "empty": (lambda: nn.Linear(0, 6), ValueError, "its shape is (6, 0)"),
}  # fmt: skip


# torch's own, of how these layers are made.
@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor:UserWarning",
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
    "ignore:Initializing zero-element tensors:UserWarning",
)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_layers(name: str) -> None:
    create, error, text = REFUSED[name]
    layer = create()
    with pytest.raises(error) as caught:
        CPLinear.from_linear(layer, rank=2)
    assert text in str(caught.value)
    assert "from_linear" in str(caught.value)
    with pytest.raises(error) as caught:
        CPLinear.joint_from([nn.Linear(4, 6), layer], rank=2)
    assert text in str(caught.value)


def conv_of(**options: Any) -> Any:
    return lambda: CPConv2d.from_conv(nn.Conv2d(4, 6, 3), **options)


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no rank": (conv_of(), TypeError, "give rank=, or the fitted weight as cp="),
    "rank 0": (conv_of(rank=0), ValueError, "must be a positive int"),
    "memory": (conv_of(rank=2, memory="none"), ValueError, "memory must be one of"),
    "in_shape": (conv_of(rank=2, in_shape=(3,)), ValueError, "in_shape must multiply to 4"),
    "unknown option of the fit": (conv_of(rank=2, sweeps=3), TypeError, "sweeps"),
    "cp of another type": (
        conv_of(cp=torch.ones(3)), TypeError, "cp must be a polyadic.CPTensor or a polyadic.Decomp",
    ),
    "cp and rank": (
        conv_of(cp=CPTensor(((6,), (4,), (3, 3)), 2), rank=2), ValueError,
        "with cp= nothing is fitted, so that rank cannot be given",
    ),
    "cp and iterations": (
        conv_of(cp=CPTensor(((6,), (4,), (3, 3)), 2), iterations=2), ValueError,
        "so that iterations cannot be given",
    ),
    "cp of another kernel": (
        conv_of(cp=CPTensor(((6,), (4,), (3, 2)), 2)), ValueError,
        "must have the tensorized shape ((6,), (4,), (3, 3)) here",
    ),
    "cp of another layer": (
        conv_of(cp=CPTensor(((6,), (4,)), 2)), ValueError, "must have the tensorized shape",
    ),
    "cp of other channels": (
        conv_of(cp=CPTensor(((5,), (4,), (3, 3)), 2)), ValueError, "out_shape must multiply to 6",
    ),
    "cp and other shapes": (
        conv_of(cp=CPTensor(((6,), (4,), (3, 3)), 2), out_shape=(2, 3)), ValueError,
        "out_shape is (2, 3), but cp has the modes (6,) there",
    ),
    "cp of several layers": (
        conv_of(cp=CPTensor((2, (6,), (4,), (3, 3)), 2)), ValueError,
        "must have 0 layer modes here, got 1",
    ),
    "a joint cp of one layer": (
        lambda: CPLinear.joint_from([nn.Linear(4, 6)] * 2, cp=CPTensor(((4,), (6,)), 2)),
        ValueError, "must have 1 layer modes here, got 0",
    ),
    "a joint cp of more layers": (
        lambda: CPLinear.joint_from([nn.Linear(4, 6)] * 2, cp=CPTensor((3, (4,), (6,)), 2)),
        ValueError, "must have the tensorized shape (2, (4,), (6,)) here",
    ),
    "a layer where several are expected": (
        lambda: CPLinear.joint_from(nn.Linear(4, 6), rank=2), TypeError, "a sequence of layers",
    ),
    "no layers": (lambda: CPLinear.joint_from([], rank=2), TypeError, "a sequence of layers"),
    "shapes that differ": (
        lambda: CPLinear.joint_from([nn.Linear(4, 6), nn.Linear(6, 4)], rank=2), ValueError,
        "in layer 0 and (((4, 6), torch.float32",
    ),
    "flags that differ": (
        lambda: CPLinear.joint_from(
            [nn.Linear(4, 6), nn.Linear(4, 6).requires_grad_(False)], rank=2
        ),
        ValueError, "must have one shape, dtype, device and requires_grad",
    ),
    "max_norm": (
        lambda: CPEmbedding.from_embedding(nn.Embedding(9, 4, max_norm=1.0), rank=2), ValueError,
        "CPEmbedding does not support max_norm",
    ),
    "sparse": (
        lambda: CPEmbedding.from_embedding(nn.Embedding(9, 4, sparse=True), rank=2), ValueError,
        "CPEmbedding does not support sparse",
    ),
    "scale_grad_by_freq": (
        lambda: CPEmbedding.from_embedding(nn.Embedding(9, 4, scale_grad_by_freq=True), rank=2),
        ValueError, "CPEmbedding does not support scale_grad_by_freq",
    ),
    "another dimension": (
        lambda: CPConv2d.from_conv(nn.Conv1d(4, 6, 3), rank=2), TypeError,
        "from_conv expects a torch.nn.Conv2d, got Conv1d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    call, error, text = MISTAKES[name]
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
