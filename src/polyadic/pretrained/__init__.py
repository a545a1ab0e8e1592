"""Models with CP layers on disk: saved, loaded, merged into dense ones."""

from polyadic.pretrained.store import (
    attach,
    from_pretrained,
    merge,
    register_transformers,
    resize_token_embeddings,
    save_pretrained,
)

__all__ = [
    "attach",
    "from_pretrained",
    "merge",
    "register_transformers",
    "resize_token_embeddings",
    "save_pretrained",
]
