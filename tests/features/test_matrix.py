"""Every cell of the matrix, and the page that shows it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from typing import Any

import distributed_models
import matrix
import matrix_distributed
import pytest
import torch
from matrix import FEATURES, LAYERS, REFUSED, Feature, claimed
from matrix_layers import Layer
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import profiler

from polyadic import CPTensor, init, nn
from polyadic.nn import linear as linear_layer
from polyadic.nn.frozen import Frozen
from polyadic.nn.kinds import KINDS


def marks(row: Feature) -> list[Any]:
    """How long a row takes."""
    return [pytest.mark.long] * row.long + [pytest.mark.slow] * row.slow


CELLS = [
    pytest.param(layer, feature, id=f"{layer}-{feature}", marks=marks(row))
    for feature, row in FEATURES.items()
    if row.check is not None
    for layer in LAYERS
    if layer not in row.without_meaning
]


@pytest.mark.parametrize(("layer", "feature"), CELLS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_cell(layer: str, feature: str) -> None:
    found, error = matrix.found(layer, feature)
    if found != claimed(layer, feature) and error is not None:
        raise error
    assert found == claimed(layer, feature)


@pytest.mark.slow
def test_two_processes() -> None:
    """Layers in every way in which torch spreads modules, and models of several layers."""
    models = distributed_models.CHECKS
    outcomes = matrix_distributed.outcomes(models=models)
    assert len(outcomes) == len(LAYERS) * len(matrix_distributed.CHECKS) + len(models)
    for (layer, feature), error in outcomes.items():
        if layer == matrix_distributed.A_MODEL:
            assert not error, feature
            continue
        assert matrix.outcome(layer, feature, error) == claimed(layer, feature)


@pytest.mark.long
def test_four_processes() -> None:
    """Meshes of two by two, four shares of a rank, and compiled code."""
    models = distributed_models.CHECKS | distributed_models.LONG
    for (layer, feature), error in matrix_distributed.outcomes(4, models=models).items():
        if layer == matrix_distributed.A_MODEL:
            assert not error, feature
        else:
            assert matrix.outcome(layer, feature, error) == claimed(layer, feature)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("c++"), reason="the inductor needs a compiler of C++")
def test_two_processes_compiled_by_the_inductor() -> None:
    """FSDP2 and RankParallel, whose gradients are those of one process that is not compiled."""
    found = matrix_distributed.outcomes(checks={}, models=distributed_models.INDUCTOR)
    assert list(found.values()) == [""], found


def test_the_page_shows_the_table() -> None:
    """Written by make matrix from the cells' results."""
    cells = {(layer, feature): claimed(layer, feature) for layer in LAYERS for feature in FEATURES}
    assert matrix.block(matrix.PAGE.read_text(encoding="utf-8")) == matrix.page(cells)


def test_every_layer_is_in_the_table() -> None:
    """Of the package's table of kinds; what only calls several layers is none."""
    assert {name for name in LAYERS if "." not in name} == {kind.name for kind in KINDS}
    assert all(layer in LAYERS and feature in FEATURES for layer, feature in REFUSED)


def wrong_value(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    """Expect twice what is right."""
    return dataclasses.replace(layer, dense=lambda module, x: 2 * layer.dense(module, x))


def hooked(hook: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch, Layer], Layer]:
    """Do something to each output."""

    def spoil(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
        def build(**kwargs: Any) -> Any:
            module = layer.build(**kwargs)
            module.register_forward_hook(hook)
            return module

        return dataclasses.replace(layer, build=build)

    return spoil


def without_reset(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    patch.setattr(nn.CPLinear, "reset_parameters", lambda self: None)
    return layer


def later_version(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    patch.setattr(CPTensor, "_version", 3)
    return layer


def without_labels(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    patch.setattr(profiler, "record_function", lambda name: contextlib.nullcontext())
    return layer


def wrong_weight(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    patch.setattr(nn.CPLinear, "weight", property(lambda self: 2 * self.cp.to_matrix().t()))
    return layer


def of_one_size(module: Any, given: Any, y: Tensor) -> Tensor:
    return y + 0 if y.shape[0] == 17 else y - 0


def one_more_where_exporting(module: Any, given: Any, y: Tensor) -> Tensor:
    return y + 1 if torch.compiler.is_exporting() else y


def without_drawing(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    patch.setattr(init.Factors, "reset_parameters", lambda self: None)
    return layer


def square_blocks(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    """Draw factors as a part of square matrices."""

    def fill(factor: Tensor, scale: float) -> None:
        square = torch.randn(factor.shape[0], factor.shape[0], dtype=factor.dtype)
        factor.copy_(scale * square[:, : factor.shape[1]])

    patch.setattr(init, "_fill_with_orthonormal_columns", fill)
    return layer


def plain_weight(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    """A dense tensor in the place of the weight, to which writing is lost."""
    patch.setattr(nn.CPLinear, "weight", property(lambda self: self.cp.to_matrix().t()))
    return layer


def detached_weight(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    patch.setattr(nn.CPLinear, "weight", property(lambda self: self.cp.to_matrix().t().detach()))
    return layer


def silent_fusion(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    patch.setattr(torch.nn.utils, "fuse_conv_bn_eval", lambda *args, **kwargs: None)
    return layer


def uncalled(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    """The list of factors is read, and its hooks do not run."""
    patch.setattr(
        CPTensor,
        "forward",
        lambda self: (
            tuple([tuple(self.factors)[piece] for piece in self._pieces]),
            self.weights,
        ),
    )
    return layer


def one_row_of_fakes(module: Any, given: Any, y: Tensor) -> Tensor:
    return y[:1] if isinstance(y, FakeTensor) else y


def one_more_by_default(module: Any, given: Any, y: Tensor) -> Tensor:
    return y + 1 if torch.get_default_device().type == "meta" else y


def wrong_linear(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    forward = nn.CPLinear.forward
    patch.setattr(nn.CPLinear, "forward", lambda self, x: 2 * forward(self, x))
    return layer


def scripts(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    patch.setattr(torch.jit, "script", lambda module: module)
    return layer


def unrecorded(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    patch.setattr(linear_layer, "call_recorded", lambda *args: None)
    return layer


def unwatched(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    patch.setattr(Frozen, "check", lambda self: None)
    return layer


def casting(patch: pytest.MonkeyPatch, layer: Layer) -> Layer:
    """Cast the input to the layer's dtype, whatever is lost."""

    def build(**kwargs: Any) -> Any:
        module = layer.build(**kwargs)
        dtype = module.cp.factors[0].dtype
        real = not dtype.is_complex
        module.register_forward_pre_hook(
            lambda _, args: ((args[0].real if real else args[0]).to(dtype),)
        )
        return module

    return dataclasses.replace(layer, build=build)


SPOILT = {
    "real and complex input are never mixed": casting,
    "torch.fx: a leaf of the graph": unrecorded,
    "torch.jit.script is refused": scripts,
    "frozen, after torch.export that is not strict": unwatched,
    "frozen, exported to ONNX": hooked(one_more_where_exporting),
    "frozen, offloaded by accelerate": unwatched,
    "reset_parameters module by module, in any order": without_drawing,
    "construction costs a few times the factors": square_blocks,
    "construction under a default device": hooked(one_more_by_default),
    "construction under FakeTensorMode": hooked(one_row_of_fakes),
    "layer.weight can be read, differentiably": detached_weight,
    "layer.weight tells shape and dtype without being built": plain_weight,
    "writing to layer.weight is refused": plain_weight,
    "layer.weight in torch.compile and torch.export: read, writing refused": plain_weight,
    "layer.weight in torch.func: read, writing refused": plain_weight,
    "fuse_conv_bn_eval is refused": silent_fusion,
    "PEFT: LoRA over it, merging refused": plain_weight,
    "accelerate.cpu_offload": uncalled,
    "accelerate.disk_offload": uncalled,
    "accelerate.dispatch_model": uncalled,
    "torch.compile, three batch sizes, compiled once": hooked(of_one_size),
    "ONNX, run by onnxruntime, dynamic batch": hooked(one_more_where_exporting),
    "meta device, to_empty, reset_parameters": without_reset,
    "state_dict of a later version is refused": later_version,
    "FlopCounterMode counts what explain says": hooked(
        lambda module, given, y: y @ torch.eye(y.shape[-1])
    ),
    "profiler label": without_labels,
    "nn.TransformerEncoderLayer, its fast path too": wrong_linear,
    "out_proj of nn.MultiheadAttention": wrong_weight,
}


@pytest.mark.parametrize(
    "feature",
    [
        pytest.param(name, marks=[pytest.mark.long] * row.long)
        for name, row in FEATURES.items()
        if row.check
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_cell_can_fail(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check finds what is made wrong for it."""
    name = "CPConvTranspose2d" if "channels_last" in feature else "CPLinear"
    if name in FEATURES[feature].without_meaning:
        name = "CPConv2d"
    spoilt = SPOILT.get(feature, wrong_value)(monkeypatch, LAYERS[name])
    with pytest.raises(
        (AssertionError, RuntimeError, ValueError, TypeError, pytest.fail.Exception)
    ):
        FEATURES[feature].check(spoilt)
