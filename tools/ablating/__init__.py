"""The parts of tools/ablate.py: the grid, its runs, what is collected from them, and how it is shown."""
