"""What ``compress`` is given and cannot use is said, and is never left out in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyadic


class Tied(nn.Module):
    """An embedding and its head, with the head in front."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 100)
        self.table = nn.Embedding(100, 16)
        self.head.weight = self.table.weight

    def forward(self, indices: Tensor) -> Tensor:
        y: Tensor = self.head(self.table(indices))
        return y


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.mark.parametrize(
    "batch",
    [
        torch.randn(8, 15),
        torch.ones(8, 16, dtype=torch.long),
        (torch.randn(8, 16), torch.zeros(8)),
        {"x": torch.randn(8, 16)},
        None,
    ],
    ids=["shape", "dtype", "labels", "name", "none"],
)
def test_batches_that_do_not_fit_the_model(batch: Any) -> None:
    good = torch.randn(8, 16)
    with pytest.raises(ValueError, match=r"does not run on batch 1 of calibration.*forward="):
        polyadic.compress(mlp(), ratio=2, calibration=[good, batch])


def test_weights_that_fit_no_layer() -> None:
    batches = [torch.randn(8, 16)]
    for weights, error, text in (
        (torch.ones(7), ValueError, r"got \(7,\) .* layers have \(8,\)"),
        (None, TypeError, "must return a tensor"),
        (torch.full((8,), float("nan")), ValueError, "finite and not negative"),
    ):
        with pytest.raises(error, match=text):
            polyadic.compress(
                mlp(), ratio=2, calibration=batches, weights=lambda _, given=weights: given
            )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_whose_weight_is_not_finite_is_skipped(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[1, 2] = value
    small, report = polyadic.compress(model, ratio=2, orders=(1,))
    skipped, _ = report.layers
    assert (skipped.decision, skipped.name) == ("skipped", "0")
    assert "NaN or infinity" in skipped.reason
    assert type(small[0]) is nn.Linear
    with pytest.raises(ValueError, match="no layer to convert: 0 has NaN"):
        polyadic.compress(model, ratio=2, target_modules=["0"])


def test_a_layer_without_sizes_yet_is_skipped() -> None:
    model = nn.Sequential(nn.LazyLinear(16), *mlp())
    small, report = polyadic.compress(model, ratio=2, orders=(1,))
    assert [layer.name for layer in report.layers if layer.decision == "skipped"] == ["0"]
    assert small(torch.randn(2, 5)).shape == (2, 10)


def test_shapes_that_do_not_fit_one_of_several_layers() -> None:
    with pytest.raises(ValueError, match=r"shapes: those of 0 .* multiply to 32"):
        polyadic.compress(mlp(), ratio=2, shapes={"0": ((4, 4), (4, 4))})


def test_shapes_of_tied_layers_are_those_of_the_table() -> None:
    table, head = ((10, 10), (4, 4)), ((4, 4), (10, 10))
    small, _ = polyadic.compress(Tied(), ratio=4, shapes={"table": table})
    assert (small.table.in_shape, small.table.out_shape) == table
    for shapes in ({"head": head}, {"table": table, "head": head}):
        with pytest.raises(ValueError, match="give the shapes of table alone"):
            polyadic.compress(Tied(), ratio=4, shapes=shapes)


def test_a_callers_autocast_is_for_the_model_alone() -> None:
    torch.manual_seed(0)
    model, batches = mlp(), [torch.randn(8, 16) for _ in range(4)]
    _, expected = polyadic.compress(model, ratio=2, calibration=batches)
    with torch.autocast("cpu", torch.bfloat16):
        _, report = polyadic.compress(model, ratio=2, calibration=batches)
    for own, other in zip(report.layers, expected.layers, strict=True):
        assert own.importance == pytest.approx(other.importance, rel=0.05)
        assert own.weight_error == pytest.approx(other.weight_error, rel=0.05)
