"""Spectral convolutions beside neuraloperator's: layers timed side by side, and a whole solve."""
