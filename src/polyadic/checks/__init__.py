"""Validation at the public boundary: each rule stated once, with what was expected and got."""

from polyadic.checks.arguments import (
    a_number,
    a_seed,
    an_int,
    check_backend,
    check_device,
    check_dtype,
    check_memory,
    check_module,
    check_plan,
)
from polyadic.checks.factors import (
    check_bias,
    check_dense,
    check_factor_group,
    check_factors,
    check_last_dimension,
    check_like_factors,
)
from polyadic.checks.geometry import (
    PADDING_MODES,
    check_channel_groups,
    check_conv_input,
    check_geometry,
    check_padding_fits,
    check_padding_mode,
    check_sizes,
    check_spatial_size,
    check_transposed_geometry,
)
from polyadic.checks.indices import (
    check_in_range,
    check_indices,
    check_padding_index,
    check_table_rows,
)

__all__ = [
    "PADDING_MODES",
    "a_number",
    "a_seed",
    "an_int",
    "check_backend",
    "check_bias",
    "check_channel_groups",
    "check_conv_input",
    "check_dense",
    "check_device",
    "check_dtype",
    "check_factor_group",
    "check_factors",
    "check_geometry",
    "check_in_range",
    "check_indices",
    "check_last_dimension",
    "check_like_factors",
    "check_memory",
    "check_module",
    "check_padding_fits",
    "check_padding_index",
    "check_padding_mode",
    "check_plan",
    "check_sizes",
    "check_spatial_size",
    "check_table_rows",
    "check_transposed_geometry",
]
