"""Damaged files for every reader of the package: `python -m tests.fuzz --inputs 20000` prints what came of them."""
