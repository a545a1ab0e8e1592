"""The demo: a byte-level language model, and small networks on digits, dense beside CP.

Run it from the root of the project: ``python -m examples.demo``. ``language`` trains the models of
the study of training, ``models`` and ``training`` the networks on digits; ``report`` and ``plots``
say what was found, on one page.
"""
