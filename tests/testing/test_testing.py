"""What the package offers to authors of layers: exact counts, and where numbers come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from polyadic.nn import CPEmbedding, CPLinear
from polyadic.testing import (
    Flops,
    KeptBytes,
    LiveBytes,
    Operations,
    allocations,
    environment,
    flops,
    kept_bytes,
    launches,
)


class TestKeptBytes:
    def test_linear_keeps_its_input_alone(self) -> None:
        layer, x = nn.Linear(4, 3), torch.rand(2, 4)
        assert kept_bytes(lambda: layer(x), layer.parameters()) == 2 * 4 * 4
        assert kept_bytes(lambda: layer(x), [*layer.parameters(), x]) == 0

    def test_small_classifier(self) -> None:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        x, y = torch.rand(2, 4), torch.tensor([0, 2])
        relu, log_softmax, total_weight = 2 * 8 * 4, 2 * 3 * 4, 4
        loss = kept_bytes(
            lambda: nn.functional.cross_entropy(model(x), y), [*model.parameters(), x, y]
        )
        assert loss == relu + log_softmax + total_weight

    def test_a_storage_counts_once_and_whole(self) -> None:
        x = torch.rand(6, requires_grad=True)
        assert kept_bytes(lambda: (x[:2] * x[4:]).sum()) == 6 * 4

    def test_a_copy_of_what_is_left_out_counts(self) -> None:
        x = torch.rand(6, requires_grad=True)
        assert kept_bytes(lambda: x.clone().exp().sum(), [x]) == 6 * 4
        assert kept_bytes(lambda: x.clone().square().sum(), [x]) == 6 * 4

    def test_without_gradients_nothing_is_kept(self) -> None:
        x = torch.rand(6)
        assert kept_bytes(lambda: x.exp()) == 0

    def test_what_is_freed_is_taken_off(self) -> None:
        x = torch.rand(6, requires_grad=True)
        with KeptBytes() as kept:
            y = x.exp()
        assert kept.total == 6 * 4
        del y
        assert kept.total == 0

    def test_on_meta_tensors_it_counts_the_same(self) -> None:
        def counted(device: str) -> int:
            layer = CPLinear(12, 8, rank=3, device=device)
            x = torch.empty(5, 12, device=device)
            return kept_bytes(lambda: layer(x), layer.parameters())

        assert counted("cpu") == counted("meta") > 0


def test_live_bytes_know_sparse_gradients() -> None:
    layer = nn.Embedding(100, 8, sparse=True)
    indices = torch.tensor([3, 1, 3])
    with LiveBytes([*layer.parameters(), indices]) as live:
        layer(indices).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_sparse
    # The gradient keeps a row and an index for each lookup, never the size of the table.
    there = layer.weight.nbytes + indices.nbytes
    assert there + 3 * 8 * 4 <= live.current <= live.peak < there + 1000


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_flops_of_convolutions_are_right_for_groups(groups: int, transposed: bool) -> None:
    """Two per position, channel and tap; a backward pass has two gradients, each as much again."""
    cls = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = cls(8, 16, 3, groups=groups, bias=False)
    x = torch.rand(2, 8, 6, 5, requires_grad=True)
    with Flops() as forward:
        y = layer(x)
    positions = x.shape if transposed else y.shape
    once = 2 * positions[0] * math.prod(positions[2:]) * layer.weight.numel()
    assert forward.total == once
    assert flops(y.sum().backward) == 2 * once


def test_operations_and_what_they_allocate() -> None:
    x, w = torch.rand(3, 4), torch.rand(4, 5)

    def run() -> None:
        torch.mm(x, w).t().add_(1)

    with Operations() as seen:
        run()
    assert seen.names == ["aten.mm.default", "aten.t.default", "aten.add_.Tensor"]
    assert launches(run) == 3
    (made,) = allocations(run)
    assert (made.operation, made.nbytes, made.elements) == ("aten.mm.default", 60, 15)


def test_a_lookup_allocates_nothing_of_the_tables_size() -> None:
    layer = CPEmbedding(5000, 64, rank=4)
    indices = torch.tensor([4, 2])
    made = allocations(lambda: layer(indices).sum().backward())
    assert max(allocation.elements for allocation in made) <= 64 * 4 < 5000


def test_the_environment_is_plain_and_names_no_place() -> None:
    found = environment(("polyadic", "no-such-package"))
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert found["versions"]["polyadic"]
    assert found["versions"]["no-such-package"] is None
