"""What authors of layers, our tests and our benchmarks check and count with."""
