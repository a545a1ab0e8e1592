"""Whole models with CP adapters: saved, loaded, several at once, combined, exported."""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

import polyadic.adapters as adapters
from adapters.adapted import ALL, Words, change, indices, parts, words
from benchmarks.reliability.kills import child, ended
from polyadic.adapters import CPConfig, from_lora, save_as_lora, to_lora

every_share = pytest.mark.parametrize("share", ["none", "layers"])


def layers(model: PeftModel) -> dict[str, Any]:
    """The adapted layers by name."""
    return {name: model.base_model.model.get_submodule(name) for name in ALL}


@every_share
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_it_is_saved_and_loaded(share: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    base, model = words(share=share)
    x = indices()
    assert not torch.allclose(model(x), base(x))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(
            base, str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    own = ("inference_mode", "auto_mapping")
    was, now = (m.peft_config["default"].to_dict() for m in (model, loaded))
    assert {k: v for k, v in now.items() if k not in own} == {
        k: v for k, v in was.items() if k not in own
    }
    first, second = (layers(loaded)[name].polyadic_cp["default"] for name in ("first", "second"))
    assert (first is second) == (share == "layers")


@pytest.mark.parametrize("name", ["adapter_config.json", "README.md"])
def test_a_full_disk_leaves_configuration_and_card_as_they_were(name: str, tmp_path: Path) -> None:
    config = CPConfig(r=3, target_modules=["first"])
    config.save_pretrained(str(tmp_path))
    # So long that the card cannot be added to it, where the configuration still has room.
    (tmp_path / "README.md").write_text("of someone else\n" * 200)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    room = len(before["adapter_config.json"]) + (100 if name == "README.md" else -100)

    def fill() -> None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
        with pytest.raises(OSError, match=name):
            config.save_pretrained(str(tmp_path))

    assert ended(child(fill)) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shared_factors_are_saved_once_under_the_first_layer(tmp_path: Path) -> None:
    _, model = words(share="layers")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    stem = "base_model.model"
    assert f"{stem}.first.polyadic_cp.factors.0" in saved
    assert not [key for key in saved if "second.polyadic_cp" in key]
    assert f"{stem}.second.polyadic_rows" in saved
    # Four tables of factors and five rows.
    assert sum(value.numel() for value in saved.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.count("import polyadic.adapters\n") == 1
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8").count("## How to load") == 1
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "POLYADIC"


def test_the_first_layer_with_a_shape_makes_the_shared_factors() -> None:
    _, model = words(share="layers", r=4, rank_pattern={"second": 3})
    own = layers(model)
    assert own["second"].polyadic_cp["default"] is not own["first"].polyadic_cp["default"]
    assert own["second"].polyadic_cp["default"].rank == 3
    rows = own["first"].polyadic_rows["default"]
    assert set(rows.tolist()) <= {-1.0, 1.0}


@every_share
def test_several_adapters_rows_of_a_batch_and_sums(share: str) -> None:
    base, model = words(share=share)
    x = indices()
    answers = {"__base__": base(x), "default": model(x)}
    more = CPConfig(
        r=3, alpha=9, share=share, target_modules=["first", "second", "conv"], init_weights=False
    )
    model.add_adapter("two", more)
    model.set_adapter("two")
    answers["two"] = model(x)
    model.base_model.add_weighted_adapter(["default", "two"], [0.5, -2.0], "sum")
    assert not any(p.requires_grad for m in layers(model).values() for p in parts(m, "sum"))
    assert model.active_adapter == "two"
    model.set_adapter("sum")
    answers["sum"] = model(x)
    for name, layer in layers(model).items():
        want = 0.5 * change(layer, "default")
        if "two" in layer.polyadic_cp:
            want = want - 2 * change(layer, "two")
        torch.testing.assert_close(change(layer, "sum"), want, msg=name)
    first, second = (layers(model)[name].polyadic_cp["sum"] for name in ("first", "second"))
    assert (first is second) == (share == "layers")
    names = ["default", "two", "__base__", "sum", "default", "__base__"]
    mixed = model(x, adapter_names=names)
    want = torch.stack([answers[name][i] for i, name in enumerate(names)])
    torch.testing.assert_close(mixed, want)
    model.base_model.set_adapter(["default", "two"])
    both = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), both)
    model.unmerge_adapter()
    model.set_adapter("default")
    for name in ("sum", "two"):
        model.delete_adapter(name)
    torch.testing.assert_close(model(x), answers["default"])
    assert not [key for key in model.state_dict() if ".two" in key or ".sum" in key]
    with model.disable_adapter():
        torch.testing.assert_close(model(x), answers["__base__"])


def test_a_combination_of_shared_and_own_factors_has_own_ones() -> None:
    _, model = words(share="layers")
    model.add_adapter("two", CPConfig(r=3, target_modules=ALL, init_weights=False))
    model.base_model.add_weighted_adapter(["default", "two", "two"], [1.0, 0.5, 2.0], "sum")
    for layer in layers(model).values():
        want = change(layer, "default") + 2.5 * change(layer, "two")
        torch.testing.assert_close(change(layer, "sum"), want)
    assert model.peft_config["sum"].share == "none"


@every_share
def test_a_sum_is_fitted_to_a_rank(share: str) -> None:
    """The errors that it names are those of ΔW, and a rank that suffices has none."""
    _, model = words(share=share)
    model.add_adapter("two", CPConfig(r=3, share=share, target_modules=ALL, init_weights=False))
    add = model.base_model.add_weighted_adapter
    assert not any(add(["default", "two"], [1.0, -0.5], "sum").values())
    errors = add(["default", "two"], [1.0, -0.5], "two components", "fit", rank=2)
    add(["default", "two"], [1.0, -0.5], "exact", "fit", rank=200)
    for name, layer in layers(model).items():
        want, got = change(layer, "sum"), change(layer, "two components")
        error = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)
        assert 0 < errors[name] < 1
        torch.testing.assert_close(error.item(), errors[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(change(layer, "exact"), want, rtol=1e-4, atol=1e-4)
    assert model.peft_config["two components"].r == 2


def test_a_sum_is_saved_and_loaded(tmp_path: Path) -> None:
    base, model = words(share="layers", order=1)
    model.add_adapter(
        "two", CPConfig(r=3, order=1, share="layers", target_modules=["last"], init_weights=False)
    )
    model.base_model.add_weighted_adapter(["two", "default"], [1.0, 2.0], "sum")
    model.set_adapter("sum")
    x = indices()
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "sum")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"combination_type": "linear"}, "combination_type must be 'cat'"),
        ({"combination_type": "fit"}, "'fit' needs a rank"),
        ({"rank": 2}, "'cat' has the sum of ranks"),
        ({"adapters": ["default", "none"]}, "Adapter none does not exist"),
        ({"weights": [1.0]}, "one weight for each adapter"),
        ({"adapter_name": "two"}, "there is an adapter 'two' already"),
        ({"adapters": ["default", "three"]}, "of first have"),
        ({"adapters": ["default", "saved"]}, "modules_to_save"),
    ],
)
def test_sums_that_have_no_exact_format_are_refused(call: dict[str, Any], message: str) -> None:
    _, model = words(target_modules=["first"])
    model.add_adapter("two", CPConfig(r=3, target_modules=["first"]))
    model.add_adapter("three", CPConfig(r=3, order=3, target_modules=["first"]))
    model.add_adapter("saved", CPConfig(target_modules=["first"], modules_to_save=["last"]))
    given = {"adapters": ["default", "two"], "weights": [1.0, 1.0], "adapter_name": "new", **call}
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(**given)
    assert "new" not in model.peft_config


@every_share
def test_direct_injection_needs_no_tuner(share: str) -> None:
    base, model = words(share=share)
    x = indices()
    y, state = model(x), get_peft_model_state_dict(model)
    config = CPConfig(r=4, alpha=6, target_modules=ALL, share=share)
    injected = inject_adapter_in_model(config, copy.deepcopy(base))
    assert isinstance(injected, Words)
    assert torch.equal(injected(x), base(x))
    result = set_peft_model_state_dict(injected, state)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "polyadic" in key]
    assert torch.equal(injected(x), y)
    found, values = to_lora(injected)
    lora = get_peft_model(copy.deepcopy(base), found)
    assert not set_peft_model_state_dict(lora, values).unexpected_keys
    torch.testing.assert_close(lora.eval()(x), y)


@every_share
def test_a_lora_is_saved_for_plain_peft_and_fitted_back(share: str, tmp_path: Path) -> None:
    base, model = words(share=share, rank_pattern={"conv": 3}, alpha_pattern={"last": 2})
    x = indices()
    y = model(x)
    save_as_lora(tmp_path / "lora", model)
    lora = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(lora(x), y)
    back = from_lora(tmp_path / "lora", rank=12, iterations=60)
    assert set(back.errors) == set(ALL)
    assert max(back.errors.values()) < 0.02
    again = get_peft_model(copy.deepcopy(base), back.config).eval()
    assert not set_peft_model_state_dict(again, back.state_dict).unexpected_keys
    for name, layer in layers(again).items():
        want = change(layers(model)[name])
        error = ((change(layer) - want).norm() / want.norm()).detach()
        assert abs(float(error) - back.errors[name]) < 1e-4, name


def test_a_fit_of_a_lora_says_how_far_it_is_off() -> None:
    lora = get_peft_model(
        nn.Sequential(nn.Linear(24, 36)),
        LoraConfig(
            r=6, lora_alpha=3, target_modules=["0"], init_lora_weights=False, use_rslora=True
        ),
    )
    given = lora.peft_config["default"], get_peft_model_state_dict(lora)
    delta = lora.base_model.model[0].get_delta_weight("default")
    errors = []
    for rank in (1, 4, 16):
        fit = from_lora(given, rank, order=2, iterations=60)
        model = get_peft_model(nn.Sequential(nn.Linear(24, 36)), fit.config)
        set_peft_model_state_dict(model, fit.state_dict)
        found = model.base_model.model[0].get_delta_weight("default")
        off = ((found - delta).norm() / delta.norm()).detach()
        assert abs(float(off) - fit.errors["0"]) < 1e-4
        errors.append(float(off))
    assert errors[0] > errors[1] > errors[2]
    # Order 1 is LoRA itself, so that its rank suffices.
    assert from_lora(given, 6, order=1).errors["0"] < 1e-5
    untrained = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(target_modules=["0"]))
    found = from_lora((untrained.peft_config["default"], get_peft_model_state_dict(untrained)), 2)
    assert found.errors == {"0": 0.0}


@every_share
def test_biases_and_saved_modules_go_along(share: str, tmp_path: Path) -> None:
    base, model = words(
        share=share,
        target_modules=["first", "second"],
        bias="polyadic_only",
        modules_to_save=["last"],
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split("polyadic")[0] for name in trained if name.endswith("base_layer.bias")} == {
        f"base_model.model.{name}.base_layer.bias" for name in ("first", "second")
    }
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    x = indices()
    y = model(x)
    model.save_pretrained(tmp_path / "cp")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "cp")).eval()
    torch.testing.assert_close(loaded(x), y)
    save_as_lora(tmp_path / "lora", model)
    lora = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(lora(x), y)


@every_share
def test_it_trains_with_checkpoints_and_dropout(share: str) -> None:
    _, model = words(share=share, init_weights=True, dropout=0.5)
    model.eval()
    x = indices()
    plain = model(x).square().sum()
    plain.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    again = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum()
    again.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(got, want)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    goal = torch.randn(6, 7, 5)
    losses = []
    for _ in range(20):
        loss = (model(x) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < losses[0]
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be a positive int"),
        ({"r": 2.5}, TypeError, "r must be a positive int"),
        ({"order": 0}, ValueError, "order must be a positive int"),
        ({"alpha": "1"}, TypeError, "alpha must be a number"),
        ({"alpha_pattern": {"first": None}}, TypeError, "alpha must be a number"),
        ({"rank_pattern": {"first": 0}}, ValueError, "rank_pattern"),
        ({"rank_pattern": ["first"]}, TypeError, "rank_pattern must be a dict"),
        ({"dropout": 1.0}, ValueError, "dropout must be in"),
        ({"share": "all"}, ValueError, "share must be one of 'none', 'layers'"),
        ({"bias": "lora_only"}, ValueError, "bias must be one of"),
        ({"init_weights": "pissa"}, ValueError, "init_weights must be True or False"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, ValueError, "layers_to_transform"),
        ({"layers_pattern": "h"}, ValueError, "layers_pattern needs layers_to_transform"),
        ({"in_shape_pattern": {"first": (5, 2)}}, ValueError, "in_shape_pattern must multiply"),
        ({"out_shape_pattern": {"last": (5, 2)}}, ValueError, "out_shape_pattern must multiply"),
        ({"in_shape_pattern": {"table": (5, 2)}}, ValueError, "must cover the 30 rows"),
        ({"in_shape_pattern": {"first": 12}}, TypeError, "in_shape_pattern"),
        ({"use_dora": True}, TypeError, "use_dora"),
        ({"target_parameters": ["weight"]}, TypeError, "target_parameters"),
    ],
)
def test_what_fits_nowhere_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        words(**options)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2)
        self.block = nn.TransformerEncoderLayer(8, 2, 16)
        self.up = nn.ConvTranspose1d(8, 4, 3)
        self.norm = nn.Embedding(9, 8, max_norm=1.0)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("inner", TypeError, "MultiheadAttention.*is not supported"),
        ("inner.out_proj", TypeError, "inner.out_proj is the out projection"),
        ("block.linear1", ValueError, "block.linear1 is not called in evaluation"),
        ("up", TypeError, "ConvTranspose1d.*is not supported"),
        ("norm", ValueError, "norm has max_norm=1.0"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named(
    target: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        get_peft_model(Attention(), CPConfig(target_modules=[target]))


def test_other_refusals() -> None:
    base, model = words()
    x = indices()
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, adapter_names=["default"])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): typo"):
        model(x, adapter_names=["typo"] * 6)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(x, adapter_names=["default"] * 6)
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(x, adapter_names=["default"] * 6)
    for name in ("factors", "0"):
        with pytest.raises(ValueError, match="must not be called"):
            get_peft_model(copy.deepcopy(base), CPConfig(target_modules=["first"]), name)
    with pytest.raises(ValueError, match="get_peft_model expects model without a wrapper"):
        get_peft_model(nn.DataParallel(copy.deepcopy(base)), CPConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="has no CP adapter 'two'"):
        to_lora(model, "two")
    with pytest.raises(TypeError, match="must be a saved LoRA"):
        from_lora((CPConfig(), {}), 2)
    with pytest.raises(ValueError, match="use_dora=True"):
        from_lora((LoraConfig(use_dora=True), {}), 2)


def test_a_broken_adapter_is_not_merged_safely() -> None:
    _, model = words()
    layer = layers(model)["first"]
    before = layer.get_base_layer().weight.clone()
    with torch.no_grad():
        layer.polyadic_cp["default"].factors[0][0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged


PLAIN = """
import sys, torch, peft
base, x, y = torch.load(sys.argv[1], weights_only=False)
found = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval()(x)
torch.testing.assert_close(found, y)
assert not any("polyadic" in name for name in sys.modules)
from peft import PEFT_TYPE_TO_CONFIG_MAPPING as known
import polyadic
assert "POLYADIC" not in known and "polyadic.adapters" not in sys.modules
methods, types = dict(vars(peft.PeftModel)), list(peft.PeftType)
import polyadic.adapters
assert known["POLYADIC"] is polyadic.adapters.CPConfig
assert methods == dict(vars(peft.PeftModel)) and types == list(peft.PeftType)
"""


def test_a_process_without_us_loads_the_lora_and_an_import_makes_peft_know_us(
    tmp_path: Path,
) -> None:
    """Nothing is patched, and ``import polyadic`` alone imports neither PEFT nor adapters."""
    plain = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5)).eval()
    config = CPConfig(r=4, target_modules=["0", "2"], init_weights=False)
    model, x = get_peft_model(copy.deepcopy(plain), config).eval(), torch.randn(3, 12)
    save_as_lora(tmp_path / "lora", model)
    torch.save((plain, x, model(x).detach()), tmp_path / "given.pt")
    given = [str(tmp_path / "given.pt"), str(tmp_path / "lora")]
    subprocess.run([sys.executable, "-c", PLAIN, *given], check=True, timeout=300)


def test_another_version_of_peft_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("0.20.1", "0.23.0", "1.0.0"):
        monkeypatch.setattr(adapters, "version", lambda _, found=found: found)
        with pytest.raises(ImportError, match=rf"peft>=0.21,<0.23, found {found}"):
            adapters._check_peft()
    monkeypatch.setattr(adapters, "version", lambda _: "0.22.0.dev0")
    adapters._check_peft()


def test_a_table_that_scales_its_rows() -> None:
    """As some language models' do."""

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, indices: Tensor) -> Tensor:
            return super().forward(indices) * self.embed_scale

    base = nn.Sequential(Scaled(11, 6))
    config = CPConfig(r=3, alpha=6, target_modules=["0"], init_weights=False)
    model = get_peft_model(base, config).eval()
    x = torch.arange(11)
    y = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y)
