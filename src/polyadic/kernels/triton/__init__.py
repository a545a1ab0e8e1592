"""Triton kernels for NVIDIA GPUs, each another way to compute a piece that the maps already have.

Nothing here is imported before the first CUDA tensor that a kernel could serve. A map never calls
this package: it asks a module of ``polyadic.kernels`` for a piece, and that module chooses.

A new kernel stands on two modules:

- ``numerics``: ``rounded(x, dtype)``, ``product(a, b, accumulator)`` and ``khatri_rao_rows(…)`` for
  use in device code. They make bfloat16 right under Triton's interpreter too, where its dot product
  and its rounding are not, so that each kernel can be checked on a machine without a GPU.
- ``launch``: ``LAUNCHER = Launcher(kernel)`` once for each kernel, then
  ``LAUNCHER(key, grid, tensors, numbers, arguments, warps=…, stages=…)`` starts it through its
  compiled form, which takes a small part of the time that Triton's own way takes. Sizes that decide
  the code are constants of the kernel; ``key`` names them and all dtypes. What a layer starts at
  each pass holds on to ``LAUNCHER.form(key, …)`` and looks nothing up (see ``Matrices``).

Conventions: a kernel takes pointers, then 32-bit integers on which it is not specialized, then
constants; pointers of tensors that come in numbers are passed as (nested) tuples; tensors are
contiguous, or their row stride is a constant; sums are in float32; no atomic operations, so that
each run gives the same bits; nothing is read or written outside a tensor.
"""
