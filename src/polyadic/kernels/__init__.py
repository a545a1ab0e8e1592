"""The arithmetic of every layer, as a plan says."""
