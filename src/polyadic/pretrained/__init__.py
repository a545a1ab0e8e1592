"""Models with CP layers on disk: saved, loaded, and turned back into dense ones."""

from polyadic.pretrained._store import from_pretrained, save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
