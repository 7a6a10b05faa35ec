"""Benchmarks of local attention, whole models and data loaders: see tools/benchmark.py."""
