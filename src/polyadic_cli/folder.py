"""The directory of a converted model: what the original's held besides the weights, and a card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

# Endings of weights in any format; the converted model has its own.
_WEIGHTS = {
    ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".safetensors",
}  # fmt: skip
_CARD = "README.md"


def complete(origin: Path, out: Path, verdict: Sequence[str], model_class: str) -> None:
    """Copy the other files of a model's directory, and write a card that says how to load it.

    Files that the converted model has already, and hidden ones, are not copied.

    Args:
        origin: the directory of the original.
        out: the directory of the converted model, where its weights and configuration are.
        verdict: sentences for the card.
        model_class: name of the class of transformers that loads it.

    Raises:
        OSError: a file cannot be read or written.
    """
    # Here, because the command line is to answer --help without loading torch.
    from polyadic.durable.files import replacing, write_text

    for name in _others(origin):
        if not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            with replacing(out / name) as draft:
                shutil.copyfile(origin / name, draft)
    text = _card(origin.resolve().name, verdict, model_class, (out / "modules.json").is_file())
    write_text(out / _CARD, text)


def _others(origin: Path) -> Iterator[Path]:
    """The files that are not weights, and do not lie in a folder of weights in another format."""
    files = [file.relative_to(origin) for file in sorted(origin.rglob("*")) if file.is_file()]
    weighty = {file.parent for file in files if file.suffix in _WEIGHTS} - {Path()}
    for file in files:
        hidden = any(part.startswith(".") for part in file.parts)
        weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
        if not (hidden or weights or file.parent in weighty or file == Path(_CARD)):
            yield file


def _card(name: str, verdict: Sequence[str], model_class: str, sentences: bool) -> str:
    said = "\n".join(f"- {sentence}" for sentence in verdict)
    more = ""
    if sentences:
        more = (
            "\nIt is a model of sentence-transformers: after the same two lines at the top,\n"
            "`SentenceTransformer(folder)` loads it with its pooling.\n"
        )
    return f"""---
library_name: polyadic
tags: [polyadic, cp-decomposition]
---

# {name}, with layers in CP format

Converted from {name} by `polyadic compress`.

{said}

## Load it

Register the layers first. Without that transformers does not know them, and refuses the model.

```python
import polyadic
from transformers import {model_class}

polyadic.register_transformers()
model = {model_class}.from_pretrained(folder)
```
{more}"""
