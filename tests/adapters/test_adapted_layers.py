"""Laws of one adapted layer, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from adapters.adapted import CASES, Case, by_weight, change, layer_of, parts
from polyadic.adapters import CPConfig, to_lora
from polyadic.testing.counting import allocations, flops, kept_bytes

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_share = pytest.mark.parametrize("share", ["none", "layers"])


@every_case
@every_share
def test_it_starts_from_the_base_model_bitwise(case: Case, share: str) -> None:
    model = case.model(share=share, zero=True)
    layer, x = layer_of(model), case.input()
    assert torch.equal(model(x), layer.base_layer(x))
    factors = [*layer.polyadic_cp["default"].factors]
    assert sum(not factor.any() for factor in factors) == 1
    if len(x):
        model(x).square().sum().backward()
        assert any(factor.grad.any() for factor in factors if not factor.any())


@every_case
@every_share
def test_it_is_the_layer_with_a_changed_weight(case: Case, share: str) -> None:
    """Value and gradients of all factors, λ and the input are those of W + ΔW by torch."""
    model = case.model(share=share)
    layer, x = layer_of(model), case.input()
    x.requires_grad_(x.is_floating_point())
    inputs = [*parts(layer), *([x] if x.requires_grad else [])]
    y, want = model(x), by_weight(layer, x, change(layer))
    torch.testing.assert_close(y, want)
    up = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, up)
    torch.testing.assert_close(got, torch.autograd.grad(want, inputs, up))


@every_case
@every_share
def test_it_is_merged_and_taken_out_again(case: Case, share: str) -> None:
    model = case.model(share=share)
    layer, x = layer_of(model), case.input()
    y, weight = model(x), layer.get_base_layer().weight.clone()
    torch.testing.assert_close(layer.get_delta_weight("default"), change(layer).detach())
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(layer.get_base_layer()(x), y)
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight, weight)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


@every_case
@every_share
def test_it_is_a_lora_exactly(case: Case, share: str) -> None:
    model = case.model(share=share)
    x, y = case.input(), None
    base = layer_of(model).get_base_layer()
    plain = (
        getattr(base, "groups", 1) == 1
        and set(getattr(base, "dilation", (1,))) == {1}
        and getattr(base, "padding_mode", "zeros") == "zeros"
    )
    if not plain:
        with pytest.raises(ValueError, match=r"layer has (groups|dilation|padding_mode)"):
            to_lora(model)
        return
    y = model(x)
    config, state = to_lora(model)
    assert config.r == layer_of(model).r["default"]
    fresh = nn.Sequential()
    fresh.add_module("layer", base)
    lora = get_peft_model(fresh, config, autocast_adapter_dtype=False).eval().double()
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    torch.testing.assert_close(lora(x), y)


@pytest.mark.parametrize("name", ["linear", "Conv1D", "conv1d", "conv2d, groups", "embedding"])
def test_it_compiles_without_a_graph_break(name: str) -> None:
    case = CASES[name]
    model, x = case.model(share="layers"), case.input()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = model(x)
    torch.testing.assert_close(compiled(x), y)
    torch.compiler.reset()


def counted(config: object) -> tuple[int, int, int, int]:
    """Kept bytes, FLOPs forward, FLOPs backward and the largest allocation of 512 rows."""
    base = nn.Sequential()
    base.add_module("layer", nn.Linear(96, 128))
    model = get_peft_model(base, config)
    x = torch.randn(512, 96, requires_grad=True)
    kept = kept_bytes(lambda: model(x), [*model.parameters(), x])
    forward = flops(lambda: model(x))
    y = model(x)
    backward = flops(y.sum().backward)
    made = allocations(lambda: model(x).sum().backward())
    others = {512 * 96, 512 * 128}
    return kept, forward, backward, max(a.elements for a in made if a.elements not in others)


@pytest.mark.parametrize("alpha", [1, 8, 10.5])
def test_it_costs_what_a_lora_of_its_rank_costs(alpha: float) -> None:
    """Counted: the same bytes kept and FLOPs whatever the scaling, and no ΔW in any step."""
    lora = counted(LoraConfig(r=8, lora_alpha=alpha, target_modules=["layer"]))
    for order, share in ((1, "none"), (2, "none"), (3, "none"), (2, "layers")):
        cp = counted(CPConfig(r=8, alpha=alpha, order=order, share=share, target_modules=["layer"]))
        assert cp[:3] == lora[:3]
        assert cp[3] < 96 * 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_keep_their_dtype(dtype: torch.dtype) -> None:
    base = nn.Sequential()
    base.add_module("layer", nn.Linear(12, 18))
    base.to(dtype)
    config = CPConfig(r=4, target_modules=["layer"], init_weights=False)
    x = torch.randn(5, 12, dtype=dtype)
    for cast in (True, False):
        model = get_peft_model(base, config, autocast_adapter_dtype=cast)
        layer = layer_of(model)
        assert {p.dtype for p in parts(layer)} == {torch.float32 if cast else dtype}
        y = model(x)
        assert y.dtype == dtype
        want = layer.base_layer(x).double() + x.double() @ change(layer).double().t()
        torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2)
        base = model.unload()


def test_autocast_computes_in_its_dtype() -> None:
    model = CASES["linear"].model().float()
    x = CASES["linear"].input().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=2e-2, atol=2e-2)


def test_scalings() -> None:
    model = CASES["linear"].model(alpha=20)
    layer, x = layer_of(model), CASES["linear"].input()
    base = layer.base_layer(x)
    added = model(x) - base
    layer.scale_layer(3)
    torch.testing.assert_close(model(x) - base, 3 * added)
    layer.unscale_layer(3)
    torch.testing.assert_close(model(x) - base, added)
    layer.set_scale("default", 0.5)
    layer.set_scale("not there", 2.0)
    torch.testing.assert_close(model(x) - base, added / 2)
    layer.unscale_layer()
    torch.testing.assert_close(model(x) - base, added)
    assert layer.scaling == {"default": 4.0}


@every_share
@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_of_a_jagged_nested_tensor_it_gives_a_jagged_one(name: str, share: str) -> None:
    """As torch's layers do, and LoRA over them."""
    case = CASES[name]
    model = case.model(share=share)
    rows = [case.input().flatten(0, -2) for _ in range(3)]
    if name == "embedding":
        rows = [case.input().flatten()[:length] for length in (2, 3, 1)]
    y = model(torch.nested.nested_tensor(rows, layout=torch.jagged))
    want = model(torch.cat(rows))
    torch.testing.assert_close(y.values(), want)
    factors = [*layer_of(model).polyadic_cp["default"].factors]
    got = torch.autograd.grad(y.values().square().sum(), factors)
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), factors))


def test_torch_jit_script_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"AdaptedLinear does not support torch.jit.script"):
        torch.jit.script(CASES["linear"].model())
