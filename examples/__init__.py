"""Programs that use polyadic; each runs from the root of the project."""
