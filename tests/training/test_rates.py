"""Rates of factors change, and decay, their tensor as the dense rate does a dense weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim import lr_scheduler as schedulers

import polyadic
from other_packages import imported
from polyadic.nn import CPConv2d, CPEmbedding, CPLinear

LAYERS: list[Any] = [
    pytest.param(lambda: CPLinear(12, 30, rank=7, order=2), id="linear"),
    pytest.param(lambda: CPLinear(64, 48, rank=40, order=3), id="linear-order-3"),
    pytest.param(lambda: CPConv2d(8, 12, 3, rank=9, order=2), id="conv"),
    pytest.param(lambda: CPEmbedding(50, 16, rank=6), id="embedding"),
    pytest.param(lambda: CPLinear.joint(3, 12, 8, rank=5)[1], id="joint"),
]


def tensor_of(layer: nn.Module) -> polyadic.CPTensor:
    own: Any = layer.cp
    found: polyadic.CPTensor = getattr(own, "joint", own)
    return found


@pytest.mark.parametrize("make", LAYERS)
def test_signed_steps_change_the_tensor_as_a_dense_step_does(make: Any) -> None:
    """A first step is lr · sign(gradient): each factor's alone changes the tensor as dense would,

    and all K together, with random signs, √K times as much.
    """
    torch.manual_seed(0)
    layer = make().double()
    tensor = tensor_of(layer)
    lr = 1e-4
    rates = polyadic.factor_rates(layer, lr)
    before = tensor.to_matrix().detach()
    changes = []
    for _ in range(20):
        moved = polyadic.CPTensor.from_factors(
            tensor.tensorized_shape,
            [p.detach() + rates[p][0] * torch.randn_like(p).sign() for p in tensor.factors],
        )
        changes.append(float((moved.to_matrix().detach() - before).norm() / before.norm()))
    dense = lr / float(before.square().mean().sqrt()) * math.sqrt(len(rates))
    # Rates are rounded to sixteenths of an octave; 20 draws of some hundred signs.
    assert dense * 0.8 < sum(changes) / len(changes) < dense * 1.25


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_tensor_decays_as_a_dense_weight(make: Any, optimizer: Any) -> None:
    torch.manual_seed(0)
    layer = make().double()
    tensor = tensor_of(layer)
    lr, decay, steps = 1e-3, 0.1, 200
    groups = polyadic.param_groups(layer, lr, decay, optimizer=optimizer)
    cls = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    own = cls(groups)
    before = tensor.to_matrix().detach().norm()
    for _ in range(steps):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        own.step()
    ratio = float(tensor.to_matrix().detach().norm() / before)
    assert math.isclose(ratio, (1 - lr * decay) ** steps, rel_tol=1e-3)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "compute",
    [
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        lambda factors, name: prune.l1_unstructured(factors, name, 0.25),
    ],
    ids=["weight_norm", "orthogonal", "pruning"],
)
def test_a_factor_that_is_computed_leaves_the_others_their_rates(
    make: Any, optimizer: Any, compute: Any
) -> None:
    torch.manual_seed(0)
    layer = make()
    tensor = tensor_of(layer)
    compute(tensor.factors, "1")
    plain = polyadic.CPTensor.from_factors(
        tensor.tensorized_shape, [factor.detach() for factor in tensor.factors]
    )
    want = [*polyadic.factor_rates(plain, 1e-3, 0.1, optimizer=optimizer).values()]
    got = polyadic.factor_rates(layer, 1e-3, 0.1, optimizer=optimizer)
    assert [*got.values()] == [want[0], *want[2:]]
    groups = polyadic.param_groups(layer, 1e-3, 0.1, optimizer=optimizer)
    rates = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert rates == {p: got.get(p, (1e-3, 0.1)) for p in layer.parameters()}


def test_sgd_moves_the_tensor_by_the_projected_gradient() -> None:
    """With orthonormal components, one factor's step is the gradient on what the factor reaches."""
    torch.manual_seed(0)
    layer = CPLinear(16, 16, rank=4, order=1, bias=False).double()
    a, c = layer.cp.factors
    gradient = torch.randn(16, 16, dtype=torch.float64)
    lr = 1e-3
    rates = polyadic.factor_rates(layer, lr, optimizer="sgd")
    step = -(gradient @ c) * rates[a][0]
    reached = c @ torch.linalg.pinv(c)
    torch.testing.assert_close(step @ c.T, -lr * gradient @ reached, rtol=0.03, atol=1e-9)


def test_every_parameter_stands_once_and_the_rest_keeps_the_rate() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), CPLinear(12, 12, rank=3), nn.LayerNorm(12))
    model[0].bias.requires_grad_(False)
    groups = polyadic.param_groups(model, 1e-3, 0.05)
    every = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in every} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(every) == len({id(p) for p in every})
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (1e-3, 0.05)
    assert any(p is model[2].bias for p in groups[0]["params"])
    assert all(group["lr"] > 1e-3 for group in groups[1:])


def test_equal_layers_share_groups() -> None:
    model = nn.Sequential(*[CPLinear(64, 64, rank=16) for _ in range(8)])
    assert len(polyadic.param_groups(model, 1e-3, 0.1)) <= 3


def test_a_tied_head_and_a_shared_tensor_stand_once() -> None:
    table = CPEmbedding(40, 12, rank=4)
    model = nn.ModuleList([table, table.as_linear(), *CPLinear.joint(2, 12, 12, rank=3)])
    every = [p for group in polyadic.param_groups(model, 1e-3) for p in group["params"]]
    assert len(every) == len({id(p) for p in every})


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 0.5**step),
    "step": lambda o: schedulers.StepLR(o, 2),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 20),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 20, power=2.0),
    "warm-up, then cosine": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.CosineAnnealingLR(o, 9)], [3]
    ),
    "one cycle": lambda o: schedulers.OneCycleLR(o, rates_of(o), total_steps=20),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_keeps_the_ratios(scheduler: str) -> None:
    model = nn.Sequential(CPLinear(12, 30, rank=3), CPConv2d(4, 4, 3, rank=2))
    optimizer = torch.optim.AdamW(polyadic.param_groups(model, 1e-2))
    before = rates_of(optimizer)
    assert len(before) > 2
    own = SCHEDULERS[scheduler](optimizer)
    seen = set()
    for _ in range(8):
        model[0](torch.ones(2, 12)).sum().backward()
        optimizer.step()
        own.step(*([1.0] if scheduler == "plateau" else []))
        factors = [rate / first for rate, first in zip(rates_of(optimizer), before, strict=True)]
        assert factors == pytest.approx([factors[0]] * len(factors), rel=1e-9)
        seen.add(round(factors[0], 9))
    assert len(seen) > 1, "the scheduler did nothing"


def test_lightning_takes_the_groups(tmp_path: Any) -> None:
    lightning = imported("pytorch_lightning")

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = CPLinear(8, 8, rank=2)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(polyadic.param_groups(self, 1e-2, 0.1))
            self.first = rates_of(optimizer)
            scheduler = schedulers.LambdaLR(optimizer, lambda step: 0.5**step)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    model = Model()
    before = model.layer.cp.factors[0].detach().clone()
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(8, 8), batch_size=4))
    assert trainer.global_step == 2
    assert rates_of(trainer.optimizers[0]) == pytest.approx([rate / 4 for rate in model.first])
    assert not torch.equal(before, model.layer.cp.factors[0])


def test_transformers_trainer_takes_the_groups(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = CPLinear(8, 8, rank=2)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.layer(x) - labels).square().mean()}

    model = Model()
    optimizer = torch.optim.AdamW(polyadic.param_groups(model, 1e-2, 0.1))
    rates = sorted(group["lr"] for group in optimizer.param_groups)
    rows = [{"x": torch.randn(8), "labels": torch.randn(8)} for _ in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        lr_scheduler_type="constant",
    )
    before = model.layer.cp.factors[0].detach().clone()
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None)
    )
    trainer.train()
    assert sorted(group["lr"] for group in trainer.optimizer.param_groups) == pytest.approx(rates)
    assert not torch.equal(before, model.layer.cp.factors[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0"),
        ({"lr": math.nan}, ValueError, "lr must be finite"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be"),
        ({"optimizer": "muon"}, ValueError, "optimizer must be one of 'adamw', 'sgd'"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module"),
    ],
)
def test_bad_arguments_are_refused(change: Any, error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"model": CPLinear(4, 4, rank=2), "lr": 1e-3, **change}
    with pytest.raises(error, match=message):
        polyadic.param_groups(**given)


def test_factors_without_values_or_scale_are_refused_by_name() -> None:
    model = nn.Sequential(CPLinear(4, 4, rank=2, device="meta"))
    with pytest.raises(ValueError, match=r"0\.cp: the factors are on the meta device"):
        polyadic.param_groups(model, 1e-3)
    model = nn.Sequential(CPLinear(4, 4, rank=2))
    nn.init.zeros_(model[0].cp.factors[1])
    with pytest.raises(ValueError, match=r"0\.cp: a factor, .* is zero"):
        polyadic.param_groups(model, 1e-3)
