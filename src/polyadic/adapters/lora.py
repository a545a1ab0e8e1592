"""To LoRA, exactly, and from LoRA, by a fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from polyadic.adapters.config import CPConfig, exact_pattern, names_pattern
from polyadic.adapters.model import layers_with
from polyadic.durable import sealed
from polyadic.durable.files import replacing
from polyadic.fitting import decompose
from polyadic.formats import Shape, padded_shape, positive_int, tensorize

StateDict = dict[str, Tensor]
_ROOT = "base_model.model."
# What a LoRA can have beside its two matrices, and a CP adapter has not.
_VARIANTS = ("use_dora", "use_qalora", "lora_bias", "alora_invocation_tokens", "target_parameters")


@torch.no_grad()
def to_lora(model: nn.Module, adapter_name: str = "default") -> tuple[LoraConfig, StateDict]:
    """Write a CP adapter of rank R as a LoRA of rank R, exactly: A = diag(λ) KAᵀ, B = s KC.

    No ΔW is formed and nothing is fitted: the Khatri-Rao products of the factors are LoRA's
    matrices.

    Args:
        model: a model with the adapter, from ``get_peft_model`` or ``inject_adapter_in_model``.
        adapter_name: the adapter.

    Returns:
        The configuration and the state dict of the LoRA, as ``get_peft_model`` and
        ``set_peft_model_state_dict`` take them.

    Raises:
        ValueError: the model has no such CP adapter, or a convolution has groups, a dilation or a
            padding mode that PEFT's LoRA of convolutions leaves out of account.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, CPConfig):
        raise ValueError(f"the model has no CP adapter {adapter_name!r}")
    state: StateDict = {}
    ranks: dict[str, int] = {}
    for name, layer in layers_with(model, adapter_name):
        name = name.removeprefix(_ROOT)
        ranks[name] = layer.r[adapter_name]
        for key, value in layer.lora(adapter_name, name).items():
            state[f"{_ROOT}{name}.{key}"] = value.contiguous()
    for key, value in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        if ".polyadic_" not in key:
            state[key if key.startswith(_ROOT) else _ROOT + key] = value
    # A common rank is said once.
    common = max(set(ranks.values()), key=[*ranks.values()].count)
    others = {exact_pattern(name): rank for name, rank in ranks.items() if rank != common}
    made = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=names_pattern(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        bias=config.bias.replace("polyadic", "lora"),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        fan_in_fan_out=any(
            type(layer.get_base_layer()).__name__ == "Conv1D"
            for _, layer in layers_with(model, adapter_name)
        ),
        inference_mode=True,
    )
    return made, state


def save_as_lora(path: str | Path, model: nn.Module, adapter_name: str = "default") -> None:
    """Save what ``to_lora`` returns, so that ``PeftModel.from_pretrained`` loads it.

    Args:
        path: a folder, made where it is missing.
        model: a model with the adapter.
        adapter_name: the adapter.

    Raises:
        ValueError: see ``to_lora``.
    """
    config, state = to_lora(model, adapter_name)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    with replacing(folder / SAFETENSORS_WEIGHTS_NAME) as draft:
        tensors = {key: value.detach().cpu() for key, value in state.items()}
        sealed.write(draft, tensors, {"format": "pt"})


class FromLora(NamedTuple):
    """What ``from_lora`` returns.

    Attributes:
        config: of the CP adapter.
        state_dict: of the CP adapter, for ``set_peft_model_state_dict``.
        errors: ‖ΔW − ΔŴ‖ / ‖ΔW‖ of each module, by name; 0 where ΔW = 0.
    """

    config: CPConfig
    state_dict: StateDict
    errors: dict[str, float]


def from_lora(
    adapter: str | Path | tuple[LoraConfig, Mapping[str, Tensor]],
    rank: int,
    order: int = 2,
    *,
    iterations: int = 200,
    seed: int = 0,
) -> FromLora:
    """Fit a CP adapter to a LoRA, each ΔW = s B A by ``polyadic.decompose``.

    Args:
        adapter: the folder of a saved LoRA, or its configuration and state dict as PEFT's
            ``get_peft_model_state_dict`` returns it.
        rank: R of the CP adapter.
        order: modes a side, as ``CPConfig``'s.
        iterations: most sweeps of each fit.
        seed: of the starts of the fits.

    Returns:
        Configuration, state dict and the relative error of each module.

    Raises:
        TypeError: ``adapter`` is no LoRA.
        ValueError: the LoRA is of a variant that is more than two matrices, or the folder lacks a
            file or holds a damaged one.
    """
    config, given = _loaded(adapter)
    rank, order = positive_int(rank, "rank"), positive_int(order, "order")
    state: StateDict = {}
    errors: dict[str, float] = {}
    pairs: dict[str, list[str]] = {}
    for key, value in given.items():
        module, found, _ = key.partition(".lora_")
        if found:
            pairs.setdefault(module, []).append(key)
        else:
            # Biases and modules saved beside the adapter.
            state[key.replace("lora_only", "polyadic_only")] = value
    for module, keys in pairs.items():
        name = module.removeprefix(_ROOT)
        weight, modes = _lora_weight(config, name, {key: given[key] for key in sorted(keys)}, order)
        fit = decompose(weight, modes, rank, iterations=iterations, seed=seed)
        errors[name] = 0.0 if not weight.any() else fit.frobenius_error
        for i, factor in enumerate(fit.cp.factors):
            state[f"{module}.polyadic_cp.factors.{i}"] = factor.detach().contiguous()
    made = CPConfig(
        r=rank,
        alpha=rank,
        order=order,
        target_modules=names_pattern(errors),
        bias=config.bias.replace("lora", "polyadic"),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    return FromLora(made, state, errors)


def _loaded(
    adapter: str | Path | tuple[LoraConfig, Mapping[str, Tensor]],
) -> tuple[LoraConfig, Mapping[str, Tensor]]:
    if isinstance(adapter, (str, Path)):
        # PEFT would look for what is missing in the hub, and read a pickle in its place.
        for file in (Path(adapter) / CONFIG_NAME, Path(adapter) / SAFETENSORS_WEIGHTS_NAME):
            if not file.is_file():
                raise ValueError(
                    f"{file} is no file; expected the folder of a LoRA that PEFT has saved with "
                    f"safetensors, which is its default"
                )
        config = PeftConfig.from_pretrained(str(adapter))
        with sealed.opened(Path(adapter) / SAFETENSORS_WEIGHTS_NAME) as weights:
            names = weights.keys()
            state: Any = dict(zip(names, map(weights.get_tensor, names), strict=True))
    elif isinstance(adapter, tuple) and len(adapter) == 2:
        config, state = adapter
    else:
        config = state = adapter
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"adapter must be a saved LoRA or its LoraConfig and state dict, got "
            f"{type(config).__name__}"
        )
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise TypeError("the state dict of a LoRA must hold tensors by name")
    for option in _VARIANTS:
        if getattr(config, option, None):
            raise ValueError(
                f"a LoRA with {option}={getattr(config, option)!r} is more than two matrices and "
                f"has no CP adapter"
            )
    return config, state


def _lora_weight(
    config: LoraConfig, name: str, pair: Mapping[str, Tensor], order: int
) -> tuple[Tensor, tuple[Shape, ...]]:
    """ΔW of a module of a LoRA, in the order of a CP adapter's modes, and these modes."""
    if len(pair) != 2:
        raise ValueError(f"a LoRA has two matrices for each module, {name} has {[*pair]}")
    down, up = (
        matrix.to(torch.promote_types(matrix.dtype, torch.float32)) for matrix in pair.values()
    )
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
    up = up * (alpha / (math.sqrt(rank) if config.use_rslora else rank))
    if any("lora_embedding" in key for key in pair):
        rows, columns = down.shape[1], up.shape[0]
        modes = padded_shape(rows, order), tensorize(columns, columns, order)[1]
        weight = (up @ down).t()
        return nn.functional.pad(weight, (0, 0, 0, math.prod(modes[0]) - rows)), modes
    if down.dim() == 2:
        return (up @ down).t(), tensorize(down.shape[1], up.shape[0], order)
    if up.shape[1] != down.shape[0]:
        raise ValueError(f"{name} is a convolution with groups, whose LoRA has no CP adapter")
    ins, outs = tensorize(down.shape[1], up.shape[0], order)
    weight = torch.einsum("nr,r...->n...", up.flatten(1), down)
    return weight, (outs, ins, tuple(down.shape[2:]))
