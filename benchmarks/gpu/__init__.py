"""Checks of everything that differs on a GPU; `python -m benchmarks.gpu`."""
