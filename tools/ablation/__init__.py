"""tools/ablate.py: grids of training runs, their scheduling, and their comparison."""
