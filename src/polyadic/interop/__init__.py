"""Tensors and layers of other libraries: tltorch and tensorly."""
