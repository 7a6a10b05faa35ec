"""The sections of tools/check_gpu.py, and the processes that they run in."""
