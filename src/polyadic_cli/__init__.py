"""The command ``polyadic``.

It stands beside the package, not inside it: whoever imports a module of ``polyadic`` imports torch,
which takes seconds, and a page of help needs none of it. Only ``main`` can be imported without
typer and rich.
"""
