"""Second moments agree with the layers' own outputs: tr(WᵀΣW) is the mean squared output."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyadic import second_moments

CONVS = {
    "1d": (nn.Conv1d(4, 5, 3, stride=2, padding=1, bias=False), (3, 4, 11)),
    "2d": (nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 1), bias=False), (2, 3, 7, 6)),
    "2d-same": (nn.Conv2d(2, 3, 4, padding="same", dilation=(2, 1), bias=False), (2, 2, 9, 8)),
    "2d-valid": (nn.Conv2d(2, 3, 3, padding="valid", bias=False), (2, 2, 5, 4)),
    "2d-reflect": (
        nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect", bias=False), (2, 2, 5, 4)),
    "3d": (nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 0), dilation=(1, 1, 2), bias=False),
           (2, 2, 3, 5, 6)),
}  # fmt: skip


def mean_square(weight: Tensor, sigma: Tensor) -> float:
    """Mean of ‖W x‖² over the positions by the moment, W (N, M)."""
    return float(torch.einsum("nm,mk,nk->", weight.double(), sigma.double(), weight.double()))


def test_linear_is_the_mean_of_outer_products() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    batches = [torch.randn(4, 6, 5), torch.randn(2, 3, 5)]
    found = second_moments(model, batches, ["0", "2"])
    rows = torch.cat([b.reshape(-1, 5) for b in batches]).double()
    torch.testing.assert_close(found["0"].double(), rows.t() @ rows / len(rows), rtol=0, atol=1e-6)
    hidden = model[:2](rows.float()).double()
    expected = hidden.t() @ hidden / len(rows)
    torch.testing.assert_close(found["2"].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("unfolded", [2**22, 100], ids=["at-once", "piecewise"])
@pytest.mark.parametrize("name", CONVS)
def test_convolution_moment_gives_the_mean_squared_output(
    name: str, unfolded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["polyadic.fitting.moments"], "UNFOLDED", unfolded)
    layer, shape = CONVS[name]
    x = torch.randn(shape)
    y = layer(x).detach().double()
    sigma = second_moments(nn.Sequential(layer), [x], ["0"])["0"]
    expected = float(y.square().sum(1).mean())
    assert mean_square(layer.weight.flatten(1).detach(), sigma) == pytest.approx(expected, rel=1e-5)


def test_complex_inputs() -> None:
    """Of complex rows X it is XᴴX, with which the fit's error is that of the outputs."""
    layers = nn.Linear(6, 4, dtype=torch.complex64), nn.Conv1d(2, 3, 3, dtype=torch.complex64)
    for layer, shape in zip(layers, ((5, 6), (4, 2, 7)), strict=True):
        x = torch.randn(shape, dtype=torch.complex64)
        sigma = second_moments(nn.Sequential(layer), [x], ["0"])["0"]
        weight = layer.weight.detach().flatten(1)
        y = (layer(x) - layer.bias.view(-1, *[1] * (x.dim() - 2))).detach()
        expected = y.abs().square().sum(-1 if x.dim() == 2 else 1).mean()
        found = torch.einsum("nm,mk,nk->", weight.conj(), sigma, weight).real
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_groups_and_transposed_convolutions() -> None:
    layer, x = nn.Conv2d(6, 4, 3, groups=2, padding=1, bias=False), torch.randn(2, 6, 5, 4)
    found = second_moments(nn.Sequential(layer), [x], ["0"])["0"]
    each = [
        second_moments(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1)), [part], ["0"])["0"]
        for part in x.chunk(2, 1)
    ]
    torch.testing.assert_close(found, (each[0] + each[1]) / 2)
    turned = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2, bias=False)
    found = second_moments(nn.Sequential(turned), [x], ["0"])["0"]
    rows = x.movedim(1, -1).reshape(-1, 6)
    first, second = (part.t() @ part / len(rows) for part in rows.split(3, 1))
    torch.testing.assert_close(found, torch.block_diag(first, second))


def test_embedding_counts_its_indices() -> None:
    model = nn.Sequential(nn.Embedding(6, 2))
    found = second_moments(model, [torch.tensor([[0, 1, 1], [5, 1, 0]])], ["0"])["0"]
    torch.testing.assert_close(found, torch.tensor([2, 3, 0, 0, 0, 1]) / 6.0)


def test_weights_leave_out_what_is_padding() -> None:
    """Whatever stands at a masked position, NaN too."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.linear(self.table(ids).masked_fill(mask.unsqueeze(-1) == 0, torch.nan))

    model = Model()
    batch = {
        "ids": torch.tensor([[1, 2, 0], [3, 0, 0]]),
        "mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
    }
    found = second_moments(model, [batch], ["table", "linear"], weights=lambda b: b["mask"])
    torch.testing.assert_close(found["table"][:4], torch.tensor([0, 1, 1, 1]) / 3.0)
    rows = model.table.weight.detach()[1:4]
    torch.testing.assert_close(found["linear"], rows.t() @ rows / 3)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9), nn.Linear(3, 2))
    model[1].eval()
    x = torch.randn(50, 3)
    found = second_moments(model, [x], ["2"])["2"]
    rows = model[0](x).detach()
    torch.testing.assert_close(found, rows.t() @ rows / 50)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        second_moments(model, [torch.ones(2, 7)], ["0"])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_autocast_does_not_round_the_moments() -> None:
    model, x = nn.Sequential(nn.Linear(5, 7)), torch.randn(30, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = second_moments(model, [x], ["0"])["0"]
    torch.testing.assert_close(found, x.t() @ x / 30)


def bypassed() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.layer.weight.t()

    return Model()


@pytest.mark.parametrize(
    ("model", "names", "weights", "error", "message"),
    [
        (nn.Sequential(nn.Linear(3, 2)), ["1"], None, ValueError, "no module named '1'"),
        (nn.Sequential(nn.ReLU()), ["0"], None, TypeError, "got ReLU"),
        (bypassed(), ["layer"], None, ValueError, "layer was never called"),
        (
            nn.Sequential(nn.Linear(3, 2)),
            ["0"],
            torch.ones(4, 2),
            ValueError,
            r"dimensions \(4,\) of the input of 0, got \(4, 2\)",
        ),
        (nn.Sequential(nn.Linear(3, 2)), ["0"], torch.zeros(4), ValueError, "no position"),
    ],
)
def test_errors(model: nn.Module, names: Any, weights: Any, error: Any, message: str) -> None:
    given = None if weights is None else lambda batch: weights
    with pytest.raises(error, match=message):
        second_moments(model, [torch.randn(4, 3)], names, weights=given)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.full((4,), float("nan")), ValueError, "finite and not negative"),
        (torch.tensor([1.0, -1.0, 1.0, 1.0]), ValueError, "finite and not negative"),
        ([1.0, 1.0, 1.0, 1.0], TypeError, "must return a tensor .* got list"),
        (torch.ones(4, dtype=torch.complex64), TypeError, r"real numbers .*complex64"),
    ],
    ids=["nan", "negative", "list", "complex"],
)
def test_weights_that_are_no_weights_are_refused(
    weights: Any, error: type[Exception], message: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(error, match=message):
        second_moments(model, [torch.randn(4, 3)], ["0"], weights=lambda batch: weights)


def test_batches_without_rows_add_nothing() -> None:
    for layer, shape in ((nn.Linear(3, 2), (4, 3)), (nn.Conv2d(3, 2, 3), (4, 3, 6, 5))):
        model, x = nn.Sequential(layer), torch.randn(shape)
        found = second_moments(model, [x[:0], x, x[:0]], ["0"])["0"]
        assert torch.equal(found, second_moments(model, [x], ["0"])["0"])
        with pytest.raises(ValueError, match="saw no position"):
            second_moments(model, [x[:0]], ["0"])
