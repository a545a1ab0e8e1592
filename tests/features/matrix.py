"""The matrix: every layer with every feature of torch, as data; and the page made of its results.

A cell is a check that passes; or it stands in ``REFUSED`` with its reason, and then the check must
fail; or its feature has no meaning for the layer. ``make matrix`` runs all cells and
writes what it found into docs/compatibility.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matrix_distributed
import matrix_features as features
import matrix_inplace
import matrix_modules as modules
import matrix_traced
import torch
from matrix_features import Check
from matrix_layers import LAYERS
from torch.nn.utils import parametrizations

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
MARKS = ("<!-- written by make matrix -->", "<!-- end -->")
WORKS = "works"


@dataclass(frozen=True)
class Feature:
    """A row of the table.

    Args:
        check: raises where a layer does not do it; None where processes check it.
        without_meaning: why there is nothing to check, by layer.
        slow: takes seconds for every layer.
        long: takes as long, and is left to ``pytest -m long``, as another row shows most of it.
    """

    check: Check | None
    without_meaning: Mapping[str, str] = field(default_factory=dict)
    slow: bool = False
    long: bool = False


def _all_but(names: set[str], reason: str) -> dict[str, str]:
    return {name: reason for name in LAYERS if name not in names}


SPECTRAL = [name for name, layer in LAYERS.items() if layer.spectral]
NO_IMAGE = {
    name: "torch's Fourier transforms hand on no such layout"
    if layer.spectral
    else "torch has the layout for two and three spatial dimensions"
    for name, layer in LAYERS.items()
    if layer.dims < 2 or layer.spectral
}
NO_FUSION = {
    **{
        name: "torch fuses its own convolutions"
        for name, layer in LAYERS.items()
        if not layer.dims or layer.spectral
    },
    "CPConvTranspose2d": "torch's fusion fails for a transposed convolution with groups",
}
NO_LORA = _all_but({"CPLinear", "CPLinear.joint"}, "the adapter is one of linear layers")
NO_ROWS = {name: "torch's convolutions take none" for name, layer in LAYERS.items() if layer.dims}
NOT_FROZEN = {
    name: "freeze leaves it as it is"
    for name in LAYERS
    if "Transpose" in name or "Embedding" in name or "Tied" in name or "Spectral" in name
}
OF_REAL_MAPS = dict.fromkeys(SPECTRAL, "its maps are real and its factors complex in every row")
OF_INDICES = {name: "indices are of no such dtype" for name, row in LAYERS.items() if row.indices}
OF_LINEAR = _all_but({"CPLinear"}, "the module is made of linear layers")
FEATURES = {
    "eager, float64": Feature(features.eager),
    "bfloat16": Feature(partial(features.lower, dtype=torch.bfloat16)),
    "float16": Feature(partial(features.lower, dtype=torch.float16)),
    "autocast to bfloat16": Feature(partial(features.autocast, dtype=torch.bfloat16)),
    "autocast to float16": Feature(partial(features.autocast, dtype=torch.float16)),
    "complex128": Feature(features.of_complex(features.eager), OF_REAL_MAPS),
    "complex64": Feature(
        features.of_complex(partial(features.lower, dtype=torch.complex64)), OF_REAL_MAPS
    ),
    "real and complex input are never mixed": Feature(features.mixed, OF_INDICES | OF_REAL_MAPS),
    "complex128, torch.compile, fullgraph": Feature(
        features.of_complex(features.compiled), OF_REAL_MAPS, long=True
    ),
    "complex128, torch.export, not strict": Feature(
        features.of_complex(partial(features.export, strict=False)), OF_REAL_MAPS, long=True
    ),
    "complex128, torch.func.vmap": Feature(
        features.of_complex(features.of_functions(features._vmap)), OF_REAL_MAPS
    ),
    "complex128, torch.func.jvp": Feature(
        features.of_complex(features.of_functions(features._jvp)), OF_REAL_MAPS
    ),
    "complex128, double backward": Feature(
        features.of_complex(features.of_functions(features._double_backward)), OF_REAL_MAPS
    ),
    "complex128, state_dict": Feature(features.of_complex(features.state_dict), OF_REAL_MAPS),
    "channels_last in and out": Feature(features.channels_last, NO_IMAGE),
    "output changed in place": Feature(matrix_inplace.eager),
    "output changed in place, torch.compile": Feature(matrix_inplace.compiled, slow=True),
    "output changed in place, torch.func and double backward": Feature(matrix_inplace.transformed),
    "torch.compile, fullgraph": Feature(features.compiled, slow=True),
    "torch.compile, three batch sizes, compiled once": Feature(
        features.compiled_dynamic, slow=True
    ),
    "torch.export, strict, dynamic batch": Feature(
        partial(features.export, strict=True), slow=True
    ),
    "torch.export, not strict, dynamic batch": Feature(
        partial(features.export, strict=False), slow=True
    ),
    "ONNX, run by onnxruntime, dynamic batch": Feature(features.onnx, slow=True),
    "torch.func.grad": Feature(features.of_functions(features._grad)),
    "torch.func.vmap": Feature(features.of_functions(features._vmap)),
    "torch.func.jvp": Feature(features.of_functions(features._jvp)),
    "torch.func.jacrev, jacfwd": Feature(features.of_functions(features._jacobians)),
    "torch.func.hessian": Feature(features.of_functions(features._hessian)),
    "per-sample gradients": Feature(features.per_sample),
    "double backward": Feature(features.of_functions(features._double_backward)),
    "checkpoint": Feature(features.checkpointed),
    "checkpoint, use_reentrant=True": Feature(features.checkpointed_reentrant),
    "meta device, to_empty, reset_parameters": Feature(features.meta),
    "copy.deepcopy": Feature(features.deepcopied),
    "pickle": Feature(features.pickled),
    "torch.save, torch.load": Feature(features.saved),
    "state_dict": Feature(features.state_dict),
    "state_dict of a later version is refused": Feature(features.versioned),
    "safetensors": Feature(features.safetensors),
    "parametrize on a factor": Feature(partial(features.parametrized, how=features.tripled)),
    "weight_norm on a factor": Feature(
        partial(features.parametrized, how=parametrizations.weight_norm)
    ),
    "orthogonal on a factor": Feature(
        partial(features.parametrized, how=parametrizations.orthogonal)
    ),
    "FlopCounterMode counts what explain says": Feature(features.flops),
    "profiler label": Feature(features.profiled),
    "nn.TransformerEncoderLayer, its fast path too": Feature(features.encoder, OF_LINEAR),
    "out_proj of nn.MultiheadAttention": Feature(features.attention, OF_LINEAR),
    "reset_parameters module by module, in any order": Feature(modules.reset_by_module),
    "construction costs a few times the factors": Feature(modules.constructed),
    "construction under a default device": Feature(modules.default_device),
    "construction under FakeTensorMode": Feature(modules.fake),
    "layer.weight can be read, differentiably": Feature(modules.read),
    "layer.weight tells shape and dtype without being built": Feature(modules.metadata),
    "writing to layer.weight is refused": Feature(modules.writes),
    "layer.weight in torch.compile and torch.export: read, writing refused": Feature(
        matrix_traced.traced_writes, slow=True
    ),
    "layer.weight in torch.func: read, writing refused": Feature(matrix_traced.transformed_writes),
    "fuse_conv_bn_eval is refused": Feature(modules.fused, NO_FUSION),
    "PEFT: LoRA over it, merging refused": Feature(modules.merged, NO_LORA),
    "accelerate.cpu_offload": Feature(partial(modules.offloaded, how="cpu")),
    "accelerate.disk_offload": Feature(partial(modules.offloaded, how="disk")),
    "accelerate.dispatch_model": Feature(partial(modules.offloaded, how="dispatch")),
    "torch.fx: a leaf of the graph": Feature(modules.traced),
    "torch.jit.script is refused": Feature(modules.scripted),
    "jagged nested tensors": Feature(modules.jagged, NO_ROWS),
    "frozen, after torch.export that is not strict": Feature(
        modules.frozen_and_exported, NOT_FROZEN
    ),
    "frozen, exported to ONNX": Feature(modules.frozen_to_onnx, NOT_FROZEN, slow=True),
    "frozen, offloaded by accelerate": Feature(modules.frozen_and_offloaded, NOT_FROZEN),
    **{name: Feature(None, slow=True) for name in matrix_distributed.CHECKS},
}


@dataclass(frozen=True)
class Refusal:
    """Why a cell does not work, for the page, and a part of the error it ends in."""

    reason: str
    error: str


REENTRANT = Refusal(
    "this kind of checkpoint needs an input that requires a gradient, which indices are not; "
    "torch's Embedding is not different",
    "does not require grad",
)
FEATURES_OF_IMAGES = Refusal(
    "refused by name: the sum would be of images with R channels; RankParallel serves",
    "FeatureParallel does not support",
)
OF_HALVES = Refusal(
    "refused by name: Fourier transforms take float32 or float64; precision='mixed' rounds the "
    "spectra",
    "a spectral convolution transforms maps in",
)
TWO_DTYPES = Refusal(
    "torch's optimizer wants parameters of one dtype, and the bias is real; bias=False leaves "
    "complex ones alone",
    "only supports using the same dense type",
)
NO_COMPLEX_NORM = Refusal(
    "torch's weight_norm has no complex numbers", "not implemented for 'ComplexDouble'"
)
NO_COMPLEX_ONNX = Refusal(
    "torch's exporter to ONNX has no rules for the complex numbers of a transform", "complex"
)
REFUSED = {
    **{(name, dtype): OF_HALVES for name in SPECTRAL for dtype in ("bfloat16", "float16")},
    **{(name, "FSDP2, bfloat16 with sums in float32"): OF_HALVES for name in SPECTRAL},
    **{(name, "ZeroRedundancyOptimizer"): TWO_DTYPES for name in SPECTRAL if name[-2:] != "3d"},
    **{(name, "weight_norm on a factor"): NO_COMPLEX_NORM for name in SPECTRAL},
    **{(name, "ONNX, run by onnxruntime, dynamic batch"): NO_COMPLEX_ONNX for name in SPECTRAL},
    **{(name, "checkpoint, use_reentrant=True"): REENTRANT
       for name, layer in LAYERS.items() if layer.indices},
    **{(name, matrix_distributed.FEATURES): FEATURES_OF_IMAGES
       for name, layer in LAYERS.items() if layer.dims},
}  # fmt: skip


def claimed(layer: str, feature: str) -> str:
    """What the table says of a cell."""
    without = FEATURES[feature].without_meaning.get(layer)
    if without:
        return f"no meaning: {without}"
    refusal = REFUSED.get((layer, feature))
    return WORKS if refusal is None else refusal.reason


def outcome(layer: str, feature: str, error: str) -> str:
    """What a cell that ended in this error (or none) says, in the table's words."""
    refusal = REFUSED.get((layer, feature))
    if not error:
        return WORKS
    return refusal.reason if refusal and refusal.error in error else f"fails: {error}"


def found(layer: str, feature: str) -> tuple[str, Exception | None]:
    """What running a cell says of it, and the error behind it."""
    check, said = FEATURES[feature].check, claimed(layer, feature)
    if layer in FEATURES[feature].without_meaning:
        return said, None
    assert check is not None
    try:
        check(LAYERS[layer])
    except Exception as error:
        return outcome(layer, feature, f"{type(error).__name__}: {error}"), error
    return WORKS, None


def page(cells: Mapping[tuple[str, str], str]) -> str:
    """The table in Markdown: ✓ for what works, a number for a reason, – for no meaning."""
    reasons: dict[str, int] = {}
    lines = ["| | " + " | ".join(LAYERS) + " |", "|---" * (len(LAYERS) + 1) + "|"]
    for feature in FEATURES:
        row = []
        for layer in LAYERS:
            said = cells[layer, feature]
            if said == WORKS:
                row.append("✓")
            elif said.startswith("no meaning"):
                row.append("–")
            else:
                row.append(f"[{reasons.setdefault(said, len(reasons) + 1)}]")
        lines.append(f"| {feature} | " + " | ".join(row) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def block(text: str) -> str:
    """What stands between the marks of the page."""
    begin, end = MARKS
    return text.split(begin + "\n")[1].split(end)[0]


def main() -> None:
    """Run every cell and write the page."""
    torch.set_num_threads(1)
    cells, bad = {}, []
    together = matrix_distributed.outcomes()
    for feature, row in FEATURES.items():
        for layer in LAYERS:
            if row.check is None:
                said = outcome(layer, feature, together[layer, feature])
            else:
                said, _ = found(layer, feature)
            cells[layer, feature] = said
            if said != claimed(layer, feature):
                bad.append(f"{layer}, {feature}: {said}")
    if bad:
        raise SystemExit("\n".join(bad))
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0] + "\n")
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n{page(cells)}{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
