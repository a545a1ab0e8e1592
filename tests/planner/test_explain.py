"""explain(): the report says what will run, what it costs and what was rejected."""

from __future__ import annotations

import functools
import json

import pytest
import torch

import polyadic
from polyadic import ConvFormat, ConvPlan, ConvRoute, LinearFormat, LinearPlan, LinearRoute
from polyadic.formats import EmbeddingFormat
from polyadic.nn import CPConv2d, CPConvTranspose2d, CPEmbedding, CPLinear
from polyadic.planner.calibrated import machine_at
from polyadic.planner.request import place_now
from polyadic.reference import dense
from polyadic.testing import kept_bytes
from polyadic_cli.main import main


def test_the_report_names_plan_steps_dense_and_rejected() -> None:
    found = polyadic.explain(CPLinear(1024, 1024, rank=64), batch=32)
    text = str(found)
    even = f"break-even rank {found.break_even_rank}"
    for part in ("FLOPs", "kept for backward", "dense layer", even, "rejected"):
        assert part in text
    assert "rebuild W" in text
    assert str(found.chosen.plan) in text
    assert len(found.rejected) >= 10
    seconds = [other.seconds for other, _ in found.rejected]
    assert seconds == sorted(seconds)
    assert found.chosen.seconds <= seconds[0]


def test_flops_of_the_dense_layer_and_of_the_khatri_rao_plan_are_the_formulas() -> None:
    fmt, rows = LinearFormat((4, 4, 16), (4, 4, 8), 16), 32
    route = LinearRoute((3,), (3,))
    found = polyadic.explain(fmt, batch=rows, plan=LinearPlan(route, route))
    assert found.chosen.flops == 3 * 2 * rows * 16 * (256 + 128)
    assert found.dense.flops == 3 * 2 * rows * 256 * 128
    assert found.chosen.kept_bytes == 4 * rows * (256 + 16)
    assert found.dense.kept_bytes == 4 * rows * 256


def test_it_says_where_dense_is_faster() -> None:
    tiny = polyadic.explain(LinearFormat((4, 4), (2, 5), 2), batch=4)
    assert tiny.dense_is_faster
    assert "dense is faster here" in str(tiny)
    wide = polyadic.explain(LinearFormat((16, 16, 16), (16, 16, 16), 64), batch=256)
    assert not wide.dense_is_faster
    assert "times as fast as dense" in str(wide)


def test_inference_has_no_backward_and_keeps_nothing() -> None:
    found = polyadic.explain(CPLinear(64, 64, rank=4), batch=8, training=False)
    assert found.chosen.backward == ()
    assert found.chosen.kept_bytes == 0


def test_least_memory_keeps_the_input_alone() -> None:
    layer = CPConv2d(8, 8, 3, padding=1, rank=4, memory="least")
    found = polyadic.explain(layer, batch=2, size=(6, 5))
    assert found.chosen.kept_bytes == 4 * 2 * 8 * 30
    balanced = polyadic.explain(
        layer, batch=2, size=(6, 5), plan=ConvPlan(ConvRoute(), ConvRoute(), keep=1)
    )
    assert balanced.chosen.kept_bytes == 4 * 2 * 30 * (8 + 4)


def test_a_convolution_says_its_layouts() -> None:
    layer = CPConv2d(64, 64, 3, padding="same", rank=32)
    text = str(polyadic.explain(layer, batch=8, size=32))
    assert "channels_last" in text
    assert "rebuild kernel" in text
    fmt = ConvFormat(layer.out_shape, layer.in_shape, (3, 3), 32)
    assert text == str(polyadic.explain(fmt, batch=8, size=(32, 32), padding="same"))


def test_what_explain_says_is_what_runs() -> None:
    layer = CPLinear(256, 256, rank=8)
    found = polyadic.explain(layer, batch=16)
    x = torch.randn(16, 256)
    forced = polyadic.functional.cp_linear(
        x, layer.in_factors, layer.out_factors, layer.bias, plan=found.chosen.plan
    )
    assert torch.equal(layer(x), forced)
    torch.testing.assert_close(layer(x), x @ dense(layer.cp) + layer.bias)


def test_to_dict_is_plain_data() -> None:
    found = polyadic.explain(CPLinear(64, 32, rank=4), batch=8)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["break_even_rank"] == 64 * 32 // (64 + 32)
    machine = machine_at(place_now("cpu", torch.float32))
    assert sum(s["seconds"] for s in data["chosen"]["steps"]) == pytest.approx(
        found.chosen.seconds - 2 * machine.call
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: polyadic.explain(torch.nn.Linear(4, 4), batch=1), TypeError, "got Linear"),
        (lambda: polyadic.explain(CPLinear(4, 4, rank=1), batch=-1), ValueError, "batch"),
        (lambda: polyadic.explain(CPLinear(4, 4, rank=1), batch=1, size=3), ValueError, "size"),
        (lambda: polyadic.explain(CPConv2d(4, 4, 3, rank=1), batch=1), ValueError, "size=(32, 32)"),
        (
            lambda: polyadic.explain(CPConv2d(4, 4, 3, rank=1), batch=1, size=2),
            ValueError,
            "does not fit",
        ),
        (
            lambda: polyadic.explain(CPLinear(4, 4, rank=1), batch=1, memory="none"),
            ValueError,
            "memory must be one of",
        ),
        (
            lambda: polyadic.explain(
                CPLinear(4, 4, rank=1), batch=1, plan=ConvPlan(ConvRoute(), ConvRoute())
            ),
            TypeError,
            "LinearPlan",
        ),
        (
            lambda: polyadic.explain(
                CPEmbedding(9, 4, rank=1), batch=1, plan=ConvPlan(ConvRoute(), ConvRoute())
            ),
            ValueError,
            "an embedding takes no plan",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_a_grouped_convolution_costs_what_its_groups_cost() -> None:
    grouped = CPConv2d(32, 32, 3, padding=1, groups=4, rank=4)
    alone = CPConv2d(8, 8, 3, padding=1, rank=4)
    plan = ConvPlan(ConvRoute(), ConvRoute())
    ours, one = (
        polyadic.explain(layer, batch=b, size=16, plan=plan)
        for layer, b in ((grouped, 2), (alone, 8))
    )
    assert ours.chosen.flops == one.chosen.flops
    assert ours.dense.flops == one.dense.flops == 3 * 2 * 2 * 256 * 32 * 8 * 9
    x = torch.randn(2, 32, 16, 16)
    before = grouped(x)
    torch.testing.assert_close(polyadic.freeze(grouped, batch=2, size=16)(x), before)


def kept(layer: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes autograd keeps beside the parameters; an index counts 8."""
    return kept_bytes(lambda: layer(x), leave_out=layer.parameters())


@pytest.mark.parametrize("memory", ["fast", "balanced", "least"])
def test_what_explain_says_is_kept_is_kept(memory: str) -> None:
    transposed = CPConvTranspose2d(6, 8, 3, stride=2, groups=2, rank=4, memory=memory)
    strided = CPConv2d(8, 6, 1, stride=2, rank=3, memory=memory)
    embedding = CPEmbedding(50, 12, rank=4, memory=memory)
    for layer, x, size in (
        (transposed, torch.randn(2, 6, 5, 7, requires_grad=True), (5, 7)),
        (strided, torch.randn(2, 8, 5, 7, requires_grad=True), (5, 7)),
        (embedding, torch.arange(9), None),
    ):
        found = polyadic.explain(layer, batch=len(x), size=size)
        assert kept(layer, x) == found.chosen.kept_bytes, found.title


def test_an_embedding_says_what_a_lookup_costs() -> None:
    found = polyadic.explain(CPEmbedding(30522, 384, rank=64), batch=2048)
    # One product with KC forward, and the gradients of both its sides backward.
    assert found.chosen.flops == 3 * 2 * 2048 * 64 * 384
    assert found.dense.flops == 0
    assert found.dense.largest == 30522 * 384
    assert "as an output head: a lookup has none" in str(found)
    fmt = EmbeddingFormat((28, 32, 35), (6, 8, 8), 64, 30522)
    assert polyadic.explain(fmt, batch=2048).chosen.flops == found.chosen.flops


def test_a_transposed_convolution_is_planned_as_itself() -> None:
    layer = CPConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, rank=4)
    found = polyadic.explain(layer, batch=2, size=(5, 4), plan=ConvPlan(ConvRoute(), ConvRoute()))
    assert "transposed convolution 8 -> 6" in found.title
    taken, made = 2 * 20, 2 * 80
    products = 2 * 4 * (8 * taken + 6 * made)
    depthwise = 2 * 4 * 9 * taken
    assert found.chosen.flops == 3 * (products + depthwise) + depthwise
    assert found.dense.flops == 3 * 2 * taken * 8 * 6 * 9
    fmt = layer.format
    options = {"stride": 2, "padding": 1, "output_padding": 1}
    same = polyadic.explain(fmt, batch=2, size=(5, 4), plan=found.chosen.plan, **options)
    assert str(same) == str(found)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("memory", ["fast", "balanced", "least"])
def test_a_padded_input_is_what_is_explained(mode: str, memory: str) -> None:
    layer = CPConv2d(8, 6, 3, padding=2, padding_mode=mode, rank=4, memory=memory)
    zeros = CPConv2d(8, 6, 3, rank=4, memory=memory)
    found = polyadic.explain(layer, batch=2, size=(5, 7))
    same = polyadic.explain(zeros, batch=2, size=(9, 11))
    assert found.chosen.plan == same.chosen.plan
    assert found.chosen.flops == same.chosen.flops
    assert found.dense.flops == same.dense.flops
    x = torch.randn(2, 8, 5, 7, requires_grad=True)
    assert kept(layer, x) == found.chosen.kept_bytes
    assert kept(layer.to_conv(), x) == found.dense.kept_bytes
    if mode != "replicate":
        with pytest.raises(ValueError, match="can pad a dimension of size 1"):
            polyadic.explain(layer, batch=2, size=1)


def test_a_layer_with_weights_keeps_their_product_too() -> None:
    """λ is one more in factor, in front: with "fast" memory its product with A_1 is kept."""
    joint = CPLinear.joint(2, 12, 8, rank=2, memory="fast")[1]
    alone = CPLinear(12, 8, rank=2, memory="fast")
    alone.cp.weights = torch.nn.Parameter(torch.ones(2))
    for layer in (joint, alone):
        found = polyadic.explain(layer, batch=3)
        assert found.chosen.plan.keep == "autograd"
        x = torch.randn(3, 12, requires_grad=True)
        assert kept(layer, x) == found.chosen.kept_bytes


@pytest.mark.parametrize("memory", ["fast", "balanced", "least"])
@pytest.mark.parametrize("training", [True, False])
def test_the_chosen_plan_is_not_among_the_rejected(memory: str, training: bool) -> None:
    linear, conv = LinearFormat((4, 4), (4, 4), 512), ConvFormat((8,), (8,), (3, 3), 512)
    for fmt, options in ((linear, {}), (conv, {"size": 16})):
        found = polyadic.explain(fmt, batch=64, memory=memory, training=training, **options)
        assert found.chosen.plan.forward.kind == "dense"
        names = [str(other.plan) for other, _ in found.rejected]
        assert str(found.chosen.plan) not in names
        assert all(other.seconds >= found.chosen.seconds for other, _ in found.rejected)


def test_two_kept_maps_spare_a_convolution_no_call() -> None:
    """Only a linear layer's keep='autograd' leaves the backward to autograd."""
    fmt, machine = ConvFormat((8,), (8,), (3, 3), 4), machine_at(place_now("cpu", torch.float32))
    found = polyadic.explain(
        fmt, batch=2, size=8, plan=ConvPlan(ConvRoute(), ConvRoute(), keep=2)
    ).chosen
    assert found.seconds - 2 * machine.call == pytest.approx(
        machine.total((*found.forward, *found.backward))
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e: e(CPConv2d(4, 4, 3, rank=1), size=8, stride=2), ValueError, "stride is not an"),
        (lambda e: e(CPLinear(4, 4, rank=1), padding="same"), ValueError, "padding is not an"),
        (lambda e: e(LinearFormat((4,), (4,), 1), dilation=2), ValueError, "dilation is not an"),
        (
            lambda e: e(ConvFormat((4,), (4,), (3,), 1), size=8, output_padding=1),
            ValueError,
            "output_padding is not an option of a ConvFormat",
        ),
        (lambda e: e(CPLinear(4, 4, rank=1), dtype="float32"), TypeError, "dtype must be"),
        (lambda e: e(CPLinear(4, 4, rank=1), dtype=torch.int8), TypeError, "dtype must be"),
        (lambda e: e(CPLinear(4, 4, rank=1), device="tpu"), ValueError, "device must be"),
        (lambda e: e(CPLinear(4, 4, rank=1), memory=""), ValueError, "memory must be one of"),
        (lambda e: e(LinearFormat((0,), (4,), 1)), ValueError, "in_shape must be a positive int"),
        (lambda e: e(LinearFormat((4,), (4,), 0)), ValueError, "rank must be a positive int"),
        (
            lambda e: e(ConvFormat((4,), (4,), (3,), 1, groups=3), size=8),
            ValueError,
            "divisible by groups=3",
        ),
        (
            lambda e: e(ConvFormat((4,), (4,), (3,) * 4, 1), size=8),
            ValueError,
            "kernel_size must have 1 to 3 entries",
        ),
        (
            lambda e: e(polyadic.freeze(CPLinear(16, 10, rank=8, order=2))),
            ValueError,
            "frozen and follows no plan",
        ),
    ],
)
def test_nothing_given_is_ignored(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(functools.partial(polyadic.explain, batch=2))


def test_a_device_is_its_type() -> None:
    layer = CPLinear(4, 4, rank=1)
    there = polyadic.explain(layer, batch=2, device=torch.device("cpu", 0))
    assert str(there) == str(polyadic.explain(layer, batch=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--order", "0"], "order must be a positive int, got 0"),
        (["--size", "8x8"], "--size is of a convolution, whose --kernel is missing"),
        (["--stride", "2"], "--stride is of a convolution"),
        (["--padding", "same"], "--padding is of a convolution"),
        (["--threads", str(10**12)], "Overflow"),
        (["--calibrate", "--dtype", "float8_e4m3fn"], "dtype must be floating point"),
    ],
)
def test_the_command_ignores_no_option(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "--in", "64", "--out", "64", "--rank", "4", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_takes_what_is_left_out_as_the_layers_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = []
    for more in ([], ["--size", "32x32", "--stride", "1", "--padding", "0", "--order", "2"]):
        with pytest.raises(SystemExit) as exit_:
            main(["plan", "--in", "8", "--out", "8", "--rank", "4", "--kernel", "3x3", *more])
        assert exit_.value.code == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    layer = CPConv2d(8, 8, 3, rank=4)
    assert printed[0].strip() == str(polyadic.explain(layer, batch=32, size=32))
