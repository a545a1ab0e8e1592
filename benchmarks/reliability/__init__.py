"""What is done to break polyadic: kills, damaged files, hostile input, threads; what came of it.

``python -m benchmarks.reliability`` runs all of it and stores a record of each; the page
docs/reliability.md is made of the records.
"""
