"""Models with CP layers on disk: saved and loaded, by polyadic and by transformers."""

from polyadic.pretrained._store import (
    attach,
    from_pretrained,
    register_transformers,
    save_pretrained,
)

__all__ = ["attach", "from_pretrained", "register_transformers", "save_pretrained"]
