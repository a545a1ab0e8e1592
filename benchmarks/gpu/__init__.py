"""Measures the layers on one GPU within a few minutes; ``gpu.sh`` beside this folder starts it.

``__main__`` starts one worker after another and prints the short table; ``worker`` runs the phases;
each file of ``phases`` is one phase; ``contest`` times contestants side by side.
"""
