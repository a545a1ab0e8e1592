"""What a CP adapter is to be: ``CPConfig``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key

from polyadic.adapters.register import PolyadicType
from polyadic.checks import a_number, an_int, check_word
from polyadic.durable.files import replacing, write_text
from polyadic.formats import Shape, mode_sizes, positive_int

SHARES = ("none", "layers")
BIASES = ("none", "all", "polyadic_only")
_CARD = """
## How to load

This adapter is in CP format, which PEFT knows after `import polyadic.adapters`
(`pip install "polyadic[peft]"`):

```python
import polyadic.adapters
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, path_of_this_adapter)
```

Without it PEFT raises `KeyError: 'POLYADIC'`. `polyadic.adapters.save_as_lora` writes it as an
exact LoRA adapter, which needs PEFT alone.
"""


@dataclass
class CPConfig(PeftConfig):
    """A CP adapter for PEFT: ΔW = (α/R) Σ_r λ_r ⊗_d A_d[:, r] ⊗_e C_e[:, r], which is never formed.

    Such an adapter of rank R is a LoRA of rank R whose two matrices are Khatri-Rao products: it
    costs a training step what LoRA costs and has fewer parameters. It adapts ``nn.Linear`` (also
    quantized), transformers' ``Conv1D``, ``nn.Conv1d`` to ``nn.Conv3d`` and ``nn.Embedding``.

    Args:
        r: R, the rank.
        alpha: α; the change of a weight is scaled by α/R.
        order: into how many modes in and out features are factored each; 1 makes LoRA's matrices.
        in_shape_pattern: modes of the in features (of a convolution in_channels/groups, of an
            embedding its rows, which the modes may exceed) by the name of a module, or a regular
            expression that its end must match; in place of what ``order`` gives.
        out_shape_pattern: modes of the out features by the name of a module.
        share: ``"none"`` gives each module factors of its own. ``"layers"`` lets all modules of one
            kind, shape and rank share them, with R numbers λ for each module: the CP format of
            their stacked weights.
        dropout: probability with which an entry of a module's input is dropped for the adapter.
            An embedding has indices as input, of which none is dropped.
        bias: which biases of the model train, ``"none"``, ``"all"`` or ``"polyadic_only"`` (those
            of adapted modules).
        target_modules: names of modules to adapt (by their ends), a regular expression, or
            ``"all-linear"``; None for what PEFT's LoRA adapts in a model of this type.
        exclude_modules: names or a regular expression of modules to leave.
        rank_pattern: ranks other than ``r`` by the name of a module, as LoRA's.
        alpha_pattern: α by the name of a module.
        layers_to_transform: index or indices of the layers to adapt.
        layers_pattern: name of the list of layers that these indices are of.
        modules_to_save: modules besides the adapter that train and are saved.
        init_weights: True starts from ΔW = 0, exactly: the largest out factor is zero, the others
            have orthonormal columns, and λ of modules that share factors are ±1. False draws
            all factors at random, for tests.

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: a value is out of range, or options exclude each other.
    """

    r: int = field(default=64)
    alpha: float = field(default=16)
    order: int = field(default=2)
    in_shape_pattern: dict[str, Any] = field(default_factory=dict)
    out_shape_pattern: dict[str, Any] = field(default_factory=dict)
    share: Literal["none", "layers"] = field(default="none")
    dropout: float = field(default=0.0)
    bias: str = field(default="none")
    target_modules: Any = field(default=None)
    exclude_modules: Any = field(default=None)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: Any = field(default=None)
    layers_pattern: Any = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = PolyadicType.POLYADIC
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            _check_names(getattr(self, name), name)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        for name in ("rank_pattern", "alpha_pattern", "in_shape_pattern", "out_shape_pattern"):
            setattr(self, name, _patterns(getattr(self, name), name))
        self._check()

    def _check(self) -> None:
        for name in ("r", "order"):
            setattr(self, name, positive_int(getattr(self, name), name))
        for pattern, rank in self.rank_pattern.items():
            positive_int(rank, f"rank_pattern[{pattern!r}]")
        for where, alpha in (("alpha", self.alpha), *self.alpha_pattern.items()):
            a_number(alpha, where if where == "alpha" else f"alpha_pattern[{where!r}]: alpha")
        for name in ("in_shape_pattern", "out_shape_pattern"):
            shapes = getattr(self, name)
            # Lists, as JSON has them, so that a saved configuration equals the one that was saved.
            setattr(
                self, name, {k: list(mode_sizes(v, f"{name}[{k!r}]")) for k, v in shapes.items()}
            )
        if a_number(self.dropout, "dropout", least=0) >= 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        indices = self.layers_to_transform
        for index in indices if isinstance(indices, (list, tuple)) else [indices]:
            if index is not None:
                an_int(index, "layers_to_transform", least=0)
        for name, known in (("share", SHARES), ("bias", BIASES)):
            check_word(getattr(self, name), name, known)
        if not isinstance(self.init_weights, bool):
            raise ValueError(f"init_weights must be True or False, got {self.init_weights!r}")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} cannot be used with target_modules as a regular expression; name "
                        f"the layers in the expression, or give target_modules as a list"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, the indices of layers")

    def rank_of(self, name: str) -> int:
        """The rank of the module of this name."""
        return int(_of(self.rank_pattern, name, self.r))

    def alpha_of(self, name: str) -> float:
        """The α of the module of this name."""
        return float(_of(self.alpha_pattern, name, self.alpha))

    def shapes_of(self, name: str) -> tuple[Shape | None, Shape | None]:
        """The modes given for the in and out features of the module of this name."""
        found = (_of(p, name, None) for p in (self.in_shape_pattern, self.out_shape_pattern))
        ins, outs = (None if shape is None else tuple(shape) for shape in found)
        return ins, outs

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as ``adapter_config.json``, and say in the model card how such an adapter is loaded.

        Each of the two files is written whole or not at all.

        Args:
            save_directory: made where it is missing.
            kwargs: as PEFT's own configurations take them.

        Raises:
            OSError: a file cannot be written; the one that was there is unchanged.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / CONFIG_NAME) as draft:
            super().save_pretrained(str(draft.parent), **kwargs)
            draft.with_name(CONFIG_NAME).replace(draft)
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        if "import polyadic.adapters" not in text:
            write_text(card, text + _CARD)


def exact_pattern(name: str) -> str:
    """The pattern that matches the module of this name and no other."""
    return f"^{re.escape(name)}"


def names_pattern(names: Iterable[str]) -> str:
    """A regular expression that matches these names of modules and no other."""
    return "|".join(map(re.escape, names))


def _patterns(value: Any, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict by names of modules, got {value!r}")
    for expression in value:
        _check_expression(expression, name)
    return dict(value)


def _check_names(value: Any, name: str) -> None:
    """Check what names modules: None, a regular expression, or a collection of names."""
    if isinstance(value, str):
        _check_expression(value, name)
    elif value is not None and not (
        isinstance(value, (list, tuple, set)) and all(isinstance(n, str) for n in value)
    ):
        raise TypeError(f"{name} must be names of modules, got {value!r}")


def _check_expression(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must hold regular expressions for names, got {value!r}")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name} has {value!r}, no regular expression: {error}") from None


def _of(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return patterns.get(get_pattern_key(patterns.keys(), name), default)
