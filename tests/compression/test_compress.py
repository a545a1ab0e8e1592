"""Conversion of whole models within a budget."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import polyadic
from polyadic import Report
from polyadic.nn import CPConv2d, CPEmbedding, CPLinear
from polyadic.testing import Flops


def low_rank_weight(out: int, into: int, rank: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(out, rank, generator=draw)
    return left @ torch.randn(rank, into, generator=draw) / math.sqrt(rank * into)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 7)
    )


def cnn() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 12, 2, stride=2),
        nn.Conv2d(12, 20, 1),
        nn.Flatten(),
        nn.Linear(20 * 64, 5),
    )


def rows(count: int, size: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


BATCHES = [rows(40, 48, seed) for seed in (5, 6)]


def own(model: nn.Module, report: Report) -> int:
    """Parameters of the layers weighed, counted from the model itself."""
    total = 0
    for layer in report.weighed:
        module = model.get_submodule(layer.name)
        cp = getattr(module, "cp", None)
        total += sum(f.numel() for f in cp.factors) if cp is not None else module.weight.numel()
    return total


@pytest.mark.parametrize("ratio", [1.5, 4, 12.5])
@pytest.mark.parametrize("calibration", [None, BATCHES], ids=["plain", "calibrated"])
def test_a_ratio_is_met_by_the_model_itself(ratio: float, calibration: Any) -> None:
    model = mlp()
    dense = sum(m.weight.numel() for m in model if isinstance(m, nn.Linear))
    small, report = polyadic.compress(
        model, ratio=ratio, calibration=calibration, orders=(1, 2), iterations=8
    )
    assert own(small, report) * ratio <= dense
    assert own(small, report) == report.parameters
    assert report.dense_parameters == dense
    # Not far below either: one rank of the largest format is the most that is left over.
    assert own(small, report) * ratio > 0.9 * dense
    assert report.model_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_complex_model(calibrated: bool) -> None:
    """Both parts of weights and outputs count."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 20, dtype=torch.complex64)
    with torch.no_grad():
        left, right = (torch.randn(n, 3, dtype=torch.complex64) for n in (20, 24))
        layer.weight.copy_(left @ right.t())
    x = torch.randn(60, 24, dtype=torch.complex64)
    small, _ = polyadic.compress(
        nn.Sequential(layer), max_error=1e-3, calibration=[x] if calibrated else None, orders=(1,)
    )
    assert small[0].cp.factors[0].dtype == torch.complex64
    assert small[0].rank == 3
    with torch.no_grad():
        assert float((small(x) - layer(x)).norm() / layer(x).norm()) < 1e-3


def test_the_model_given_is_left_alone_and_the_copy_has_cp_layers() -> None:
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how = {"ratio": 4, "calibration": BATCHES, "orders": (1, 2), "iterations": 8}
    small, report = polyadic.compress(model, **how)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    for layer in report.converted:
        assert type(small.get_submodule(layer.name)) is CPLinear
        assert type(model.get_submodule(layer.name)) is nn.Linear
        assert small.get_submodule(layer.name).rank == layer.rank
    changed, again = polyadic.compress(model, **how, inplace=True)
    assert changed is model
    assert again == report
    assert torch.equal(changed(BATCHES[0]), small(BATCHES[0]))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_dry_run_changes_nothing(inplace: bool) -> None:
    model = mlp().train()
    model[2].eval()
    before = copy.deepcopy(model)
    modules = dict(model.named_modules())
    same, report = polyadic.compress(
        model, ratio=3, calibration=BATCHES, dry_run=True, inplace=inplace, orders=(1, 2)
    )
    assert same is model
    assert dict(model.named_modules()) == modules
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert report.dry_run
    assert report.error is None
    assert report.output_error is None
    assert report.ratio >= 3
    assert "(plan)" in str(report)
    assert [x.rank for x in report.layers] == [
        x.rank
        for x in polyadic.compress(
            model, ratio=3, calibration=BATCHES, orders=(1, 2), iterations=4
        )[1].layers
    ]


def test_errors_reported_are_those_of_the_converted_layers() -> None:
    model = mlp()
    small, report = polyadic.compress(model, ratio=3, calibration=BATCHES, iterations=8)
    seen: dict[str, torch.Tensor] = {}
    for layer in report.converted:
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, args, name=layer.name: seen.update({name: args[0].detach()})
        )
    x = torch.cat(BATCHES)
    model(x)
    for layer in report.converted:
        old = model.get_submodule(layer.name).weight.detach().double()
        new = small.get_submodule(layer.name).weight.detach().double()
        inputs = seen[layer.name].double()
        assert layer.weight_error == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
        through = (inputs @ (new - old).t()).norm() / (inputs @ old.t()).norm()
        assert layer.output_error == pytest.approx(float(through), rel=1e-3)
    y, z = model(x).double(), small(x).double()
    assert report.output_error == pytest.approx(
        float((z - y).detach().norm() / y.detach().norm()), rel=1e-4
    )


@pytest.mark.parametrize("calibration", [None, BATCHES], ids=["plain", "calibrated"])
@pytest.mark.parametrize("bound", [0.1, 0.5])
def test_a_bound_on_the_error_is_met(bound: float, calibration: Any) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.copy_(low_rank_weight(60, 64, 6, seed=2))
    small, report = polyadic.compress(
        model, max_error=bound, calibration=calibration, orders=(1, 2), iterations=20
    )
    assert report.error is not None
    assert report.error <= bound
    assert report.converted
    if calibration is None:
        pairs = [
            (
                model.get_submodule(x.name).weight.detach(),
                small.get_submodule(x.name).weight.detach(),
            )
            for x in report.weighed
        ]
        lost = sum(float((a - b).double().square().sum()) for a, b in pairs)
        whole = sum(float(a.double().square().sum()) for a, _ in pairs)
        assert math.sqrt(lost / whole) <= bound
    else:
        y = torch.cat([model(x) for x in BATCHES])
        z = torch.cat([small(x) for x in BATCHES])
        assert float((z - y).detach().norm() / y.detach().norm()) <= bound


def test_plain_low_rank_is_chosen_where_it_is_better() -> None:
    model = nn.Sequential(nn.Linear(48, 64, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(low_rank_weight(64, 48, 5, seed=4))
    small, report = polyadic.compress(model, ratio=5)
    (layer,) = report.layers
    assert (layer.order, layer.rank) == (1, 5)
    assert "plain low rank" in layer.reason
    torch.testing.assert_close(small[0].weight, model[0].weight, rtol=0, atol=1e-5)


def test_more_modes_are_chosen_where_they_are_better() -> None:
    made = CPLinear(48, 64, rank=6, order=2, bias=False)
    model = nn.Sequential(made.to_linear())
    _, report = polyadic.compress(model, ratio=10, seed=1, iterations=100)
    (layer,) = report.layers
    assert layer.order == 2
    assert layer.weight_error is not None
    assert layer.weight_error < 0.05
    assert "order 2" in layer.reason


def test_what_matters_to_the_output_keeps_its_parameters() -> None:
    """Two equal branches, of which the output takes one a hundred times."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.loud = nn.Linear(32, 32, bias=False)
            self.quiet = nn.Linear(32, 32, bias=False)
            self.quiet.weight.data.copy_(self.loud.weight.data)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 100 * self.loud(x) + self.quiet(x.flip(-1))

    batches = [rows(64, 32)]
    _, report = polyadic.compress(Branches(), ratio=3, calibration=batches, orders=(1,))
    loud, quiet = report.layers
    assert loud.importance > 1000 * quiet.importance
    assert loud.parameters > 3 * quiet.parameters
    _, plain = polyadic.compress(Branches(), ratio=3, orders=(1,))
    assert abs(plain.layers[0].rank - plain.layers[1].rank) <= 1


def test_flops_are_counted_as_torch_counts_them() -> None:
    model, x = cnn().eval(), torch.randn(4, 3, 8, 8)
    _, report = polyadic.compress(model, flops_ratio=2, calibration=[x], orders=(1,))
    assert report.flops_ratio is not None
    assert report.flops_ratio >= 2
    with Flops() as dense, torch.no_grad():
        model(x)
    assert sum(layer.dense_flops or 0 for layer in report.layers) == dense.total
    kept = [layer for layer in report.layers if layer.decision == "dense"]
    assert all(layer.flops == layer.dense_flops for layer in kept)
    linear = report.layers[-1]
    assert linear.flops == 2 * 4 * linear.rank * (20 * 64 + 5) or linear.rank == 0


def test_never_slower() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 512), nn.Linear(512, 512))
    batches = [rows(256, 16)]
    _, alone = polyadic.compress(
        model, speed="never-slower", calibration=batches, dry_run=True, orders=(1,)
    )
    _, both = polyadic.compress(
        model, ratio=2, speed="never-slower", calibration=batches, dry_run=True, orders=(1,)
    )
    assert alone.dry_run
    assert both.dry_run
    for report in (alone, both):
        small = report.layers[0]
        assert small.decision == "dense"
        assert "slower" in small.reason
        assert report.layers[2].decision == "converted"
        assert all(x.seconds <= x.dense_seconds for x in report.layers)
    assert both.ratio >= 2
    # Alone it takes the most faithful of what is admitted.
    assert alone.layers[2].rank >= both.layers[2].rank


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(61, 24)
        self.body = nn.Linear(24, 24)
        self.head = nn.Linear(24, 61)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


@pytest.mark.parametrize("calibrated", [False, True])
def test_tied_layers_are_converted_together(calibrated: bool) -> None:
    model, ids = Tied(), torch.randint(61, (8, 9), generator=torch.Generator().manual_seed(0))
    small, report = polyadic.compress(model, ratio=4, calibration=[ids] if calibrated else None)
    pair = report.layers[0]
    assert pair.names == ("embed", "head")
    assert type(small.embed) is CPEmbedding
    assert small.head.cp is small.embed.cp
    torch.testing.assert_close(small.head.bias, model.head.bias)
    logits = small(ids)
    by_hand = torch.tanh(small.body(small.embed.weight[ids])) @ small.embed.weight.t()
    torch.testing.assert_close(logits, by_hand + model.head.bias, rtol=1e-4, atol=1e-4)
    assert report.parameters == sum(
        p.numel() for n, p in small.named_parameters() if "bias" not in n
    )


def test_layers_tied_to_what_stays_are_skipped_with_the_reason() -> None:
    _, report = polyadic.compress(Tied(), ratio=2, exclude_modules=["head"])
    skipped = report.layers[0]
    assert (skipped.name, skipped.decision) == ("embed", "skipped")
    assert "head" in skipped.reason
    assert [layer.name for layer in report.weighed] == ["body"]


def test_attention_of_torch_is_skipped_with_the_reason() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(32, 32))
    small, report = polyadic.compress(
        model, ratio=2, calibration=[torch.randn(2, 5, 32)], orders=(1,)
    )
    reasons = {x.name: x.reason for x in report.layers if x.decision == "skipped"}
    assert "MultiheadAttention" in reasons["0.self_attn.out_proj"]
    assert "fast path" in reasons["0.linear1"]
    assert [x.name for x in report.converted] == ["1"]
    assert type(small[0].linear1) is nn.Linear


class InAList(nn.Module):
    """Layers that are registered by name, and called from a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
        self.head = nn.Linear(48, 4)
        self.body = [self.first, self.second]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            x = layer(x).tanh()
        return self.head(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_that_would_go_on_to_be_called_is_not_said_to_be_converted(inplace: bool) -> None:
    model = InAList()
    new, report = polyadic.compress(model, ratio=2, inplace=inplace)
    assert [layer.name for layer in report.converted] == ["head"]
    by_name = {layer.name: layer for layer in report.layers}
    for name in ("first", "second"):
        assert by_name[name].decision == "skipped"
        assert "is kept in body too" in by_name[name].reason
        assert by_name[name].reason in str(report)
    assert new.body[0] is new.first


def test_the_experts_of_a_mixture_are_named() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    _, report = polyadic.compress(transformers.MixtralForCausalLM(config), ratio=1.2, dry_run=True)
    experts = [layer for layer in report.layers if layer.name.endswith("experts")]
    assert len(experts) == 2
    for layer in experts:
        assert layer.decision == "skipped"
        assert layer.dense_parameters == 3 * (16 * 48 + 24 * 16)
        assert "stacks of matrices such as gate_up_proj (3, 48, 16)" in layer.reason
        assert layer.name in str(report)


def test_rank_pattern_fixes_ranks() -> None:
    small, report = polyadic.compress(
        mlp(), ratio=2, rank_pattern={"2": 3, "4": 0.5}, orders=(1, 2)
    )
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["2"].rank == small[2].rank == 3
    assert "asked for" in by_name["2"].reason
    assert by_name["4"].parameters <= 0.5 * 420


@pytest.mark.parametrize(
    "argument", ["rank_pattern", "target_modules", "exclude_modules", "shapes"]
)
def test_patterns_that_match_nothing_are_errors(argument: str) -> None:
    value: Any = {"nowhere": 3} if argument == "rank_pattern" else ["nowhere"]
    if argument == "shapes":
        value = {"nowhere": ((6, 8), (8, 8))}
    with pytest.raises(ValueError, match="nowhere"):
        polyadic.compress(mlp(), ratio=2, **{argument: value})


def test_shapes_are_obeyed() -> None:
    shapes = {"0": ((3, 16), (4, 16))}
    small, _ = polyadic.compress(mlp(), ratio=3, shapes=shapes, target_modules=["0"])
    assert (small[0].in_shape, small[0].out_shape) == ((3, 16), (4, 16))
    with pytest.raises(ValueError, match="multiply to 48"):
        polyadic.compress(mlp(), ratio=3, shapes={"0": ((5, 5), (8, 8))}, target_modules=["0"])


def test_what_cannot_be_reached_is_said() -> None:
    with pytest.raises(
        ValueError, match=r"ratio=1000 cannot be met: the most .* reach is (\S+)"
    ) as e:
        polyadic.compress(mlp(), ratio=1000)
    reachable = float(str(e.value).split("reach is ")[1].split()[0])
    _, report = polyadic.compress(mlp(), ratio=reachable * 0.9999)
    assert report.ratio == pytest.approx(reachable, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({}, ValueError, "give a budget"),
        ({"ratio": 2, "max_error": 0.1}, ValueError, "ratio and max_error"),
        ({"ratio": 0.5}, ValueError, "above 1"),
        ({"ratio": float("nan")}, ValueError, "above 1"),
        ({"ratio": "2"}, TypeError, "a number"),
        ({"ratio": True}, TypeError, "a number"),
        ({"max_error": 1.5}, ValueError, r"\(0, 1\)"),
        ({"speed": "fast"}, ValueError, "never-slower"),
        ({"ratio": 2, "orders": 2}, TypeError, "orders"),
        ({"ratio": 2, "orders": (0,)}, ValueError, "orders"),
        ({"ratio": 2, "seed": 1.5}, TypeError, "seed"),
        ({"ratio": 2, "callback": 3}, TypeError, "callback"),
        ({"ratio": 2, "calibration": torch.ones(3, 48)}, TypeError, "list of one"),
        ({"ratio": 2, "calibration": []}, ValueError, "at least one batch"),
        ({"ratio": 2, "forward": lambda m, b: m(b)}, ValueError, "calibration"),
        ({"ratio": 2, "sweeps": 3}, TypeError, "no option 'sweeps'"),
        ({"ratio": 2, "metric": None}, TypeError, "no option 'metric'"),
        ({"ratio": 2, "shapes": {"0": 3}}, TypeError, "shapes"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        polyadic.compress(mlp(), **given)


def test_models_without_layers() -> None:
    with pytest.raises(TypeError, match="Module"):
        polyadic.compress("model", ratio=2)
    with pytest.raises(ValueError, match="no layer to convert"):
        polyadic.compress(nn.Sequential(nn.ReLU()), ratio=2)
    with pytest.raises(ValueError, match="the model itself"):
        polyadic.compress(nn.Linear(4, 4), ratio=2)
    with pytest.raises(ValueError, match="meta"):
        polyadic.compress(nn.Sequential(nn.Linear(8, 8, device="meta")), ratio=2)


def test_sizes_of_convolutions_come_from_calibration() -> None:
    for demand in ({"flops_ratio": 2}, {"ratio": 2, "speed": "never-slower"}):
        with pytest.raises(ValueError, match="give calibration="):
            polyadic.compress(cnn(), **demand)


def test_convolutions() -> None:
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = cnn()
    small, report = polyadic.compress(model, ratio=3, calibration=[x], iterations=8)
    assert report.ratio >= 3
    assert any(isinstance(m, CPConv2d) for m in small)
    assert report.output_error == pytest.approx(
        float((small(x) - model(x)).detach().norm() / model(x).detach().norm()), rel=1e-3
    )


def test_layers_that_are_not_called_stay() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    _, report = polyadic.compress(
        Spare(), ratio=1.5, calibration=[torch.randn(40, 32)], orders=(1,)
    )
    spare = report.layers[1]
    assert spare.decision == "dense"
    assert "not called" in spare.reason


def test_outputs_and_positions_that_count_can_be_chosen() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"first": self.first(x), "second": self.second(x)}

    x, mask = torch.randn(4, 10, 24), torch.ones(4, 10)
    x[:, 6:] = 1e4
    mask[:, 6:] = 0
    batch = {"x": x, "mask": mask}
    _, report = polyadic.compress(
        Two(),
        ratio=2,
        calibration=[batch],
        orders=(1,),
        weights=lambda b: b["mask"],
        forward=lambda model, b: model(**b)["second"][b["mask"] > 0],
    )
    first, second = report.layers
    assert first.importance == 0
    assert first.parameters == first.dense_parameters / 2
    assert second.importance > 0
    _, clean = polyadic.compress(
        Two(),
        ratio=2,
        calibration=[{"x": x[:, :6], "mask": mask[:, :6]}],
        orders=(1,),
        forward=lambda model, b: model(**b)["second"],
    )
    assert second.importance == pytest.approx(clean.layers[1].importance, rel=1e-4)
    assert second.output_error == pytest.approx(clean.layers[1].output_error, rel=1e-4)


@pytest.mark.parametrize("budget", [{"ratio": 4}, {"flops_ratio": 4}, {"max_error": 0.4}])
def test_a_layer_without_effect_is_not_crushed(budget: dict[str, float]) -> None:
    """A head that the outputs do not show would seem to be perfect at rank 1."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Linear(64, 64)
            self.pooler = CPLinear(64, 64, rank=20, order=2).to_linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.pooler(x)
            return self.body(x)

    _, report = polyadic.compress(Encoder(), calibration=[rows(128, 64)], orders=(1, 2), **budget)
    pooler = report.layers[1]
    assert pooler.importance == 0
    assert "changes none of the outputs that count" in pooler.reason
    assert pooler.decision == "converted"
    if "ratio" in budget:
        assert pooler.order == 2  # the better of two formats of equal size
    assert pooler.parameters >= pooler.dense_parameters / budget.get("ratio", 1e9)
    assert pooler.flops is not None
    assert pooler.dense_flops is not None
    assert pooler.flops >= pooler.dense_flops / budget.get("flops_ratio", 1e9)
    assert pooler.predicted_error is not None
    assert pooler.predicted_error <= budget.get("max_error", 1)


def test_ranks_at_the_end_of_their_curves_are_noted() -> None:
    """The curves of CP formats end near the budget's average; plain low rank's is whole."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made = [CPLinear(64, 64, rank=r, order=2, bias=False) for r in (60, 2)]
            self.loud, self.quiet = (layer.to_linear() for layer in made)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1000 * self.loud(x) + self.quiet(x.flip(-1))

    torch.manual_seed(0)
    asked = {"ratio": 4, "calibration": [rows(128, 64)], "dry_run": True}
    _, report = polyadic.compress(Branches(), orders=(2,), **asked)
    loud, quiet = report.layers
    assert loud.rank == loud.curves[0].ranks[-1]
    assert loud.reason.endswith("the largest rank whose error was estimated")
    assert "largest" not in quiet.reason
    (note,) = report.notes
    assert note.startswith("1 layer has the largest rank")
    _, low = polyadic.compress(Branches(), orders=(1,), **asked)
    assert not low.notes
    _, given = polyadic.compress(Branches(), orders=(2,), rank_pattern={"loud": 40}, **asked)
    assert not given.notes


def test_the_same_seed_gives_the_same(tmp_path: Path) -> None:
    runs = [
        polyadic.compress(mlp(), ratio=5, seed=7, calibration=BATCHES, iterations=8)
        for _ in range(2)
    ]
    (first, one), (second, two) = runs
    assert one == two
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_half_precision_and_flags_are_kept() -> None:
    model = mlp().to(torch.bfloat16).eval()
    model[0].requires_grad_(False)
    small, _ = polyadic.compress(model, ratio=3)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in small[0].parameters())
    assert not small.training


def test_an_interruption_leaves_the_model_as_it_was() -> None:
    model = mlp()
    before = copy.deepcopy(model)

    def stop(stage: str, done: int, total: int, name: str) -> None:
        if stage == "fits":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        polyadic.compress(model, ratio=3, calibration=BATCHES, inplace=True, callback=stop)
    assert all(type(a) is type(b) for a, b in zip(model.modules(), before.modules(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int, str]] = []
    polyadic.compress(
        mlp(), ratio=3, calibration=BATCHES, orders=(1,), callback=lambda *args: told.append(args)
    )
    stages = list(dict.fromkeys(stage for stage, *_ in told))
    assert stages == ["calibration", "curves", "fits"]
    for stage in stages:
        own_steps = [(done, total) for name, done, total, _ in told if name == stage]
        assert own_steps == sorted(own_steps)
        assert own_steps[-1][0] == own_steps[-1][1]


def test_a_report_comes_back_from_json(tmp_path: Path) -> None:
    _, report = polyadic.compress(Tied(), ratio=3, exclude_modules=["body"])
    report.to_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert Report.from_dict(data) == report
    assert data["totals"]["ratio"] == report.ratio
    with pytest.raises(ValueError, match="format_version"):
        Report.from_dict({**data, "format_version": 99})


def test_the_page_stands_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = mlp()
    model.add_module("<b>odd</b>", nn.Linear(7, 7))
    _, report = polyadic.compress(model, ratio=3)
    report.to_html(tmp_path / "report.html", "a <small> model")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<svg") == 1 + sum(bool(layer.curves) for layer in report.layers) > 2
    assert page.index('class="verdict"') < page.index("<ul>")
    # Light and dark: lines and letters of the figures have the colour of the page's text.
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#010203" not in page
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert "<h1>Compression of a &lt;small&gt; model</h1>" in page
    assert f"polyadic {polyadic.__version__}, 20" in page
    assert "<b>odd" not in page
    assert "http" not in page
    for layer in report.layers:
        assert f"{layer.parameters:,}" in page


def test_the_table_names_every_layer() -> None:
    _, report = polyadic.compress(mlp(), ratio=3)
    text = str(report)
    for layer in report.layers:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{layer.name} ")]
        assert f"{layer.parameters:,}" in line
    assert f"{report.ratio:.2f} times fewer" in text


def test_a_report_of_lookups_alone_is_printed() -> None:
    """A dense lookup has no FLOPs, one in CP format has some."""
    table = nn.Sequential(nn.Embedding(64, 16))
    _, report = polyadic.compress(table, ratio=2, orders=(1,))
    assert report.flops_ratio == 0
    assert "these layers compute now, where lookups had no FLOPs" in str(report)


def test_a_dry_run_that_would_convert_nothing_is_one() -> None:
    small = nn.Sequential(nn.Linear(4, 4))
    for dry_run in (True, False):
        _, report = polyadic.compress(small, speed="never-slower", dry_run=dry_run)
        assert report.dry_run is dry_run
        assert not report.converted


def test_too_few_rows_of_calibration_are_noted() -> None:
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16))
    for rows_given, noted in ((10, 1), (15, 1), (16, 0)):
        batches = [rows(rows_given, 32, seed) for seed in (1, 2)]
        _, report = polyadic.compress(
            model, ratio=2, calibration=batches, orders=(1,), dry_run=True
        )
        assert len(report.notes) == noted
        assert ("note:" in str(report)) == bool(noted)
        assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize(
    ("change", "speed", "words"),
    [
        (
            0.01,
            2.0,
            "The model is 2.00 times smaller, its layers are predicted 2.00 times as fast, "
            "and its outputs change by 1 %.",
        ),
        (0.2, 2.0, "its outputs change by 20 %. That is too much for most uses: recover it by "),
        (
            0.69,
            0.5,
            "its outputs change by 69 %. The model is not usable without recovery: recover "
            "it by polyadic.finetune.distill, --recover on the command line, or choose a smaller "
            "budget. The option speed='never-slower' leaves those dense that would be slower.",
        ),
        (None, 2.0, "how much its outputs change is not known without calibration batches."),
    ],
)
def test_the_report_opens_with_a_verdict(change: float | None, speed: float, words: str) -> None:
    report = _report(change, speed)
    assert words in report.verdict
    assert str(report).startswith(report.verdict)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (0.69, 0.03, "and after its recovery its outputs change by 3 % (69 % before it)."),
        (
            0.69,
            0.2,
            "by 20 % (69 % before it). That is too much for most uses: recover it in more "
            "steps, or choose a smaller budget.",
        ),
        (
            0.85,
            0.6,
            "by 60 % (85 % before it). The model is not usable yet: recover it in more "
            "steps, or choose a smaller budget.",
        ),
    ],
)
def test_the_verdict_after_a_recovery_is_of_the_recovered_model(
    before: float, after: float, words: str
) -> None:
    converted = _report(before, 2.0)
    report = dataclasses.replace(converted, recovered_error=after)
    assert report.verdict.endswith(words)
    assert "distill" not in report.verdict
    assert f"the same change after the recovery: {after:g}" in str(report)
    again = json.loads(json.dumps(report.to_dict()))
    assert polyadic.Report.from_dict(again).verdict == report.verdict
    del again["recovered_error"]  # as older versions wrote it
    assert polyadic.Report.from_dict(again) == converted


def _report(change: float | None, speed: float) -> polyadic.Report:
    """A report of one layer of half the size."""
    layer = dataclasses.replace(
        polyadic.compress(nn.Sequential(nn.Linear(64, 64)), ratio=2)[1].layers[0],
        dense_parameters=100,
        parameters=50,
        dense_seconds=1.0,
        seconds=1 / speed,
    )
    return polyadic.Report(
        budget="2 times fewer parameters",
        layers=(layer,),
        dry_run=False,
        calibrated=change is not None,
        seed=0,
        model_parameters=100,
        predicted_error=0.0,
        error=0.0,
        output_error=change,
        machine="built-in",
    )
