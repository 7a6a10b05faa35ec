"""The parts of tools/benchmark.py: problems, methods, measuring, and the tables that come of it."""
