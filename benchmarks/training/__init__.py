"""Training from scratch: CP layers against dense and other factorized layers, at equal everything.

A byte-level language model on the source of Python's standard library, and a convolutional network
on scikit-learn's digits and on MNIST. Every contestant takes the best of several learning rates;
``recipe`` runs then repeat CP at the dense model's best rate with the groups of
``polyadic.param_groups``.
"""
