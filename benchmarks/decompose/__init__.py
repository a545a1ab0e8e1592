"""``polyadic.decompose`` compared with the fits of tensorly and tltorch."""
