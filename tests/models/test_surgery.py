"""Finding and exchanging layers of a model."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from polyadic.surgery import EXCHANGEABLE, by_pattern, find, replace


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 6)
        self.key = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.query(x) + self.key(x))


class Model(nn.Module):
    """An embedding tied to its head, two blocks, one of them in two places."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.Sequential(Block(), Block())
        self.again = self.blocks[0]
        self.head = nn.Linear(6, 11)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.blocks(self.embed(ids))))


QUERIES = ["blocks.0.query", "blocks.1.query"]
INNER = ["blocks.0.query", "blocks.0.key", "blocks.1.query", "blocks.1.key"]


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        (None, None, ["embed", *INNER, "head"]),
        (["query"], None, QUERIES),
        ([r"blocks.0.query"], None, ["blocks.0.query"]),
        ("blocks.*query", None, QUERIES),
        (("query", "key"), ["blocks.0.key"], ["blocks.0.query", "blocks.1.query", "blocks.1.key"]),
        (None, "embed|head", INNER),
        (None, [], ["embed", *INNER, "head"]),
        ({"key"}, r".*\.1\..*", ["blocks.0.key"]),
        # An instance is selected and left out by any of its names.
        ("again.query", None, ["blocks.0.query"]),
        (None, ["embed", "head", "again.key"], [n for n in INNER if n != "blocks.0.key"]),
    ],
)
def test_names_are_matched_as_peft_does(target: Any, exclude: Any, expected: list[str]) -> None:
    model = Model()
    found = find(model, target_modules=target, exclude_modules=exclude)
    assert list(found.layers) == expected
    assert all(found.layers[name] is model.get_submodule(name) for name in expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_modules": "query"}, ValueError, "'query' matches none of the layers"),
        ({"target_modules": ["uery"]}, ValueError, "'uery' matches none of the layers"),
        ({"target_modules": ["query", "valeu"]}, ValueError, "'valeu' matches none"),
        ({"target_modules": ["blocks.0"]}, ValueError, "'blocks.0' matches none"),
        ({"target_modules": ["norm"]}, ValueError, "'norm' matches none"),
        ({"exclude_modules": ["quer"]}, ValueError, "'quer' matches none"),
        ({"target_modules": "qu(ery"}, ValueError, "no regular expression"),
        ({"target_modules": []}, ValueError, "target_modules is empty"),
        ({"target_modules": 3}, TypeError, "target_modules must be a string or a list"),
        ({"target_modules": b"query"}, TypeError, "target_modules must be a string or a list"),
        ({"exclude_modules": ["key", 3]}, TypeError, "exclude_modules must hold strings"),
        ({"target_modules": ["key"], "exclude_modules": ["key"]}, ValueError, "is excluded"),
        ({"target_modules": ["head"]}, ValueError, "head shares its weight with embed.weight"),
        ({"exclude_modules": ["embed"], "target_modules": ["embed"]}, ValueError, "is excluded"),
    ],
)
def test_what_matches_nothing_is_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        find(Model(), **arguments)


def test_a_model_is_a_module() -> None:
    with pytest.raises(TypeError, match="Module, got dict"):
        find({})
    assert find(nn.ReLU()).layers == {}


def test_shared_instances_have_one_entry() -> None:
    model = Model()
    assert model.again.key is model.blocks[0].key
    found = find(model)
    assert {"blocks.0.query", "blocks.0.key"} <= found.layers.keys()
    assert not {"again.query", "again.key"} & found.layers.keys()


def test_tied_weights_go_together_or_not_at_all() -> None:
    assert find(Model()).ties == (("embed", "head"),)
    assert find(Model(tied=False)).ties == ()
    for lone, other in (("embed", "head"), ("head", "embed")):
        found = find(Model(), exclude_modules=[other])
        assert lone not in found.layers
        assert found.ties == ()
        assert found.skipped == {lone: f"shares its weight with {other}.weight, which stays"}


def test_three_ties_and_a_parameter_elsewhere() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["c"].weight = model["a"].weight
    assert find(model).ties == (("a", "b", "c"),)
    model.register_parameter("same", model["a"].weight)
    found = find(model)
    assert not found.layers
    assert set(found.skipped) == {"a", "b", "c"}


class Sub(nn.Linear):
    pass


def hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


def own_forward() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: Sub(4, 4), "a subclass of Linear"),
        (lambda: nn.LazyLinear(4), "a subclass of Linear"),
        (lambda: nn.Bilinear(4, 4, 4), "not Linear, ConvNd or Embedding"),
        (lambda: nn.EmbeddingBag(4, 4), "not Linear, ConvNd or Embedding"),
        (lambda: nn.LSTM(4, 4), "not Linear, ConvNd or Embedding"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "a subclass of Linear"),
        (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "it is computed"),
        (hooked, "has the forward hook"),
        (own_forward, "has a forward of its own"),
    ],
)
def test_what_would_change_is_skipped_with_the_reason(layer: Any, reason: str) -> None:
    found = find(nn.Sequential(nn.Linear(3, 4), layer()))
    assert list(found.layers) == ["0"]
    assert list(found.skipped) == ["1"]
    assert reason in found.skipped["1"]


def test_layers_that_are_not_called_are_skipped() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    found = find(nn.ModuleDict({"encoder": model, "attention": nn.MultiheadAttention(8, 2)}))
    assert not found.layers
    for name in ("encoder.linear1", "encoder.linear2"):
        assert "fast path" in found.skipped[name]
    for name in ("encoder.self_attn.out_proj", "attention.out_proj"):
        assert "nn.MultiheadAttention reads its weight" in found.skipped[name]
    # Its in-projection is a parameter of its own.
    assert "MultiheadAttention" in found.skipped["attention"]
    # A decoder layer calls both.
    decoder = find(nn.ModuleList([nn.TransformerDecoderLayer(8, 2, 16)]))
    assert list(decoder.layers) == ["0.linear1", "0.linear2"]


def test_conv1d_of_transformers_is_skipped_by_name() -> None:
    transformers = pytest.importorskip("transformers.pytorch_utils")
    model = nn.ModuleDict({"c_attn": transformers.Conv1D(12, 4), "fc": nn.Linear(4, 4)})
    found = find(model)
    assert list(found.layers) == ["fc"]
    assert "Conv1D of transformers.pytorch_utils" in found.skipped["c_attn"]
    with pytest.raises(ValueError, match=r"c_attn is Conv1D of transformers\.pytorch_utils"):
        find(model, target_modules=["c_attn"])


def test_the_model_itself_is_not_a_part_of_it() -> None:
    assert find(nn.Linear(3, 3)).skipped == {"": "is the model itself, not a part of it"}


@pytest.mark.parametrize("kind", EXCHANGEABLE, ids=lambda kind: kind.__name__)
def test_every_exchangeable_type_is_found(kind: type[nn.Module]) -> None:
    sizes = (4, 4) if kind in (nn.Linear, nn.Embedding) else (4, 4, 3)
    assert list(find(nn.Sequential(kind(*sizes))).layers) == ["0"]


def test_replace_reaches_every_place_of_an_instance() -> None:
    model = Model()
    new = nn.Linear(6, 6)
    model.blocks[0].query.eval()
    replace(model, "again.query", new)
    assert model.blocks[0].query is model.again.query is new
    assert not new.training
    assert model.blocks[1].query.training
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 5


def test_replace_keeps_a_shared_bias_one_parameter() -> None:
    model = nn.Module()
    model.decoder = nn.Linear(4, 7)
    model.bias = model.decoder.bias
    new = nn.Linear(4, 7)
    replace(model, "decoder", new)
    assert model.bias is model.decoder.bias is new.bias
    assert len(list(model.parameters())) == 2


@pytest.mark.parametrize(("name", "message"), [("blocks.7", "no module named"), ("", "itself")])
def test_replace_needs_a_part(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Model(), name, nn.ReLU())


def test_by_pattern() -> None:
    names = ["a.fc1", "a.fc2", "b.fc1", "fc1", "b.xfc1"]
    assert by_pattern({"a.fc1": 1, "fc1": 2}, names, "rank_pattern") == {
        "a.fc1": 1,
        "b.fc1": 2,
        "fc1": 2,
    }
    assert by_pattern({r"a\..*": 3, "fc1|xfc1": 4}, names, "rank_pattern") == {
        "a.fc1": 3,
        "a.fc2": 3,
        "b.fc1": 4,
        "fc1": 4,
        "b.xfc1": 4,
    }
    assert by_pattern({}, names, "rank_pattern") == {}


@pytest.mark.parametrize(
    ("patterns", "error"),
    [({"fc3": 1}, ValueError), ({"a(": 1}, ValueError), ([1], TypeError), ({1: 1}, TypeError)],
)
def test_by_pattern_refuses(patterns: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="rank_pattern"):
        by_pattern(patterns, ["a.fc1"], "rank_pattern")


class Keeper:
    """No module: what it holds is registered nowhere."""

    def __init__(self, layer: nn.Module) -> None:
        self.layers = [layer]


KEPT: list[tuple[str, Any]] = [
    ("list", lambda layer: [layer]),
    ("nested", lambda layer: {"a": ({"b": [None, layer]},)}),
    ("attribute of an object", Keeper),
    ("bound method", lambda layer: layer.forward),
    ("partial", lambda layer: functools.partial(layer, torch.ones(6))),
    ("closure", lambda layer: lambda x: layer(x)),
    ("default", lambda layer: eval("lambda x, f=layer: f(x)", {"layer": layer})),
    ("weight", lambda layer: [layer.weight]),
    ("weight in a closure", lambda layer: lambda: layer.weight.square().sum()),
]


@pytest.mark.parametrize("keep", [k[1] for k in KEPT], ids=[k[0] for k in KEPT])
def test_a_layer_kept_outside_the_registry_is_skipped(keep: Any) -> None:
    """What is called there would go on to be the old one."""
    model = Model(tied=False)
    kept = keep(model.blocks[1].query)
    # As what is assigned before nn.Module's own attributes are: it registers nothing.
    model.blocks.__dict__["kept"] = kept
    found = find(model)
    assert re.search(r"is kept in blocks\.kept too", found.skipped["blocks.1.query"])
    assert set(found.layers) == {"embed", *INNER, "head"} - {"blocks.1.query"}


def test_what_a_module_keeps_of_itself_goes_with_it() -> None:
    """And what refers to whole blocks, or to itself, is no hindrance."""
    model = Model(tied=False)
    model.__dict__["loop"] = loop = [model.blocks, model]
    loop.append(loop)
    model.embed.__dict__["lookup"] = model.embed.forward
    model.__dict__["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    assert find(model).skipped == {}


class Experts(nn.Module):
    """As mixtures of experts hold theirs: stacks of matrices, not layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 6, 8))
        self.down = nn.Parameter(torch.randn(3, 4, 6))
        self.positions = nn.Parameter(torch.randn(1, 5, 6))


def test_stacks_of_matrices_are_named() -> None:
    model = nn.ModuleDict({"experts": Experts(), "router": nn.Linear(6, 3)})
    found = find(model)
    assert set(found.layers) == {"router"}
    (reason,) = found.skipped.values()
    assert "stacks of matrices such as gate_up (3, 6, 8) and down (3, 4, 6)" in reason
    assert "positions" not in reason
    with pytest.raises(ValueError, match=r"experts is Experts .*no CP layer yet"):
        find(model, target_modules=["experts"])


def test_the_layers_of_an_adapter_stay() -> None:
    """PEFT saves and merges them as the layers that they were."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    config = peft.LoraConfig(target_modules=["0"], r=4, modules_to_save=["2"])
    found = find(peft.get_peft_model(model, config))
    assert [name.removeprefix("base_model.model.") for name in found.layers] == [
        "0.base_layer",
        "2.original_module",
    ]
    assert len(found.skipped) == 3
    assert all("part of an adapter" in reason for reason in found.skipped.values())
