"""Checks and benchmarks of a GPU: see tools/check_gpu.py."""
