"""Benchmarks and experiments. They stand outside the package, and run from the root of the project.

``records`` and ``pages`` are what all of them share; ``bench`` times layers, ``study`` converts
trained models, ``decompose`` compares fits of single weights. ``README.md`` says how to run them.
"""
