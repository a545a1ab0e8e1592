"""Fresh CP layers in the place of an untrained model's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyadic
from other_packages import imported
from polyadic.nn import CPConv2d, CPEmbedding, CPLinear, CPTiedLinear


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16 * 16, 64),
        nn.LayerNorm(64),
        nn.Linear(64, 3),
    )


class Tied(nn.Module):
    """A table with its output head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 24, padding_idx=0)
        self.body = nn.Linear(24, 24)
        self.head = nn.Linear(24, 60, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.table(indices)))
        return logits


def test_layers_are_exchanged_and_the_report_accounts_for_every_parameter() -> None:
    model = small()
    before = sum(p.numel() for p in model.parameters())
    made, report = polyadic.factorize(model, rank=12)
    assert made is model
    assert isinstance(model[0], CPConv2d)
    assert isinstance(model[3], CPLinear)
    assert type(model[5]) is nn.Linear
    assert "weights, no more than" in report.left["5"]
    assert report.dense_parameters == before
    assert report.parameters == sum(p.numel() for p in model.parameters())
    taken = {layer.name: layer for layer in report.layers}
    assert taken["3"].dense_parameters == 16 * 16 * 64
    assert taken["3"].parameters == sum(f.numel() for f in model[3].cp.factors)
    assert report.untouched_parameters == sum(
        p.numel() for n, p in model.named_parameters() if ".cp." not in n
    )
    assert "3: CPLinear" in str(report)
    assert "5: left, it has 192 weights" in str(report)
    model(torch.randn(2, 8, 4, 4)).sum().backward()


def test_one_seed_gives_one_model_with_the_variance_of_torch() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(polyadic.factorize(nn.Sequential(nn.Linear(96, 80)), rank=24)[0])
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    weight = models[0][0].weight
    assert abs(float(weight.detach().std()) * (3 * 96) ** 0.5 - 1) < 0.2


def test_patterns_are_those_of_peft() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q_proj", "k_proj", "up", "out")})
    _, report = polyadic.factorize(
        model,
        rank=4,
        order=2,
        target_modules=r"(q|k)_proj|up",
        exclude_modules=["k_proj"],
        rank_pattern={"up": 6},
        order_pattern={"up": 3},
    )
    assert {layer.name: layer.rank for layer in report.layers} == {"q_proj": 4, "up": 6}
    orders = {layer.name: len(layer.modes[0]) for layer in report.layers}
    assert orders == {"q_proj": 2, "up": 3}


def test_all_linear_leaves_the_head_and_other_kinds() -> None:
    model = Tied()
    model.get_output_embeddings = lambda: model.head
    _, report = polyadic.factorize(model, rank=2, target_modules="all-linear")
    assert [layer.name for layer in report.layers] == ["body"]


def test_a_rank_asked_for_by_name_is_made_whatever_it_costs() -> None:
    _, report = polyadic.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2, rank_pattern={"0": 40})
    assert report.layers[0].rank == 40


def test_ties_are_kept() -> None:
    model = Tied()
    _, report = polyadic.factorize(model, rank=3)
    assert isinstance(model.table, CPEmbedding)
    assert isinstance(model.head, CPTiedLinear)
    assert model.head.cp is model.table.cp
    assert model.table.padding_idx == 0
    shared = next(layer for layer in report.layers if layer.name == "head")
    assert (shared.dense_parameters, shared.parameters) == (0, 0)
    model(torch.tensor([[1, 2, 59]])).sum().backward()


def test_a_meta_model_stays_on_meta_and_can_be_filled() -> None:
    with torch.device("meta"):
        model = small()
    polyadic.factorize(model, rank=4)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.isfinite(model(torch.randn(2, 8, 4, 4))).all()


def test_flags_of_training_are_kept() -> None:
    model = small().eval()
    model[3].weight.requires_grad_(False)
    polyadic.factorize(model, rank=4)
    assert not model[3].training
    assert not any(factor.requires_grad for factor in model[3].cp.factors)
    assert model[3].bias.requires_grad


def test_progress_is_told() -> None:
    told: list[Any] = []
    polyadic.factorize(small(), rank=12, callback=lambda *line: told.append(line))
    assert told == [("0", 1, 2), ("3", 2, 2)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module"),
        ({"rank": "most"}, ValueError, "rank must be"),
        ({"order": 0}, ValueError, "order"),
        ({"target_modules": "nothing"}, ValueError, "matches none of the layers"),
        ({"rank_pattern": {"nothing": 3}}, ValueError, "matches none of the layers"),
        ({"callback": 3}, TypeError, "callback must be a function or None"),
        ({"model": nn.ReLU()}, ValueError, "has no layer to put into CP format"),
    ],
)
def test_bad_arguments_are_refused(change: Any, error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"model": small(), "rank": 4, **change}
    with pytest.raises(error, match=message):
        polyadic.factorize(given.pop("model"), **given)


def skeletons() -> list[Any]:
    def bert() -> Any:
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=300,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
        )
        return transformers.BertForMaskedLM(config), {"input_ids": torch.randint(300, (2, 7))}

    def gpt2() -> Any:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=300, n_embd=48, n_layer=2, n_head=4, n_positions=32
        )
        return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(300, (2, 7))}

    def resnet18() -> Any:
        models = imported("torchvision.models")
        return models.resnet18(num_classes=10), {"x": torch.randn(2, 3, 32, 32)}

    def vit() -> Any:
        timm = imported("timm")
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
        return model, {"x": torch.randn(2, 3, 32, 32)}

    return [pytest.param(make, id=make.__name__) for make in (bert, gpt2, resnet18, vit)]


@pytest.mark.parametrize("make", skeletons())
def test_models_of_others_are_taken_in_one_call(make: Any) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    before = sum(p.numel() for p in model.parameters())
    _, report = polyadic.factorize(model, rank=8)
    assert report.layers
    assert report.dense_parameters == before
    assert report.parameters == sum(p.numel() for p in model.parameters())
    exchanged = sum(layer.parameters for layer in report.layers)
    dense = sum(layer.dense_parameters for layer in report.layers)
    assert before - dense == report.parameters - exchanged == report.untouched_parameters
    optimizer = torch.optim.AdamW(polyadic.param_groups(model, 1e-3, 0.1))
    if "x" in inputs:
        loss = model(inputs["x"]).square().mean()
    else:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
