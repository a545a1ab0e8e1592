"""The demo: dense and CP networks trained on handwritten digits, compared in a table and a report.

Run it from the root of the project: ``python -m examples.digits``. ``models`` says what is
compared, ``training`` trains and measures it, ``report`` and ``plots`` say what was found.
"""
