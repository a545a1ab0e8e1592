"""The command line; only ``main`` can be imported without typer and rich."""
