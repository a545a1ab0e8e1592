"""Experiments on trained models whose stored records make ``docs/compression.md``.

``python -m benchmarks.study minilm`` converts a sentence encoder, ``... digits`` small classifiers;
``... report`` turns their records, and nothing else, into tables and figures.
"""
