"""The parts of tools/torture.py: processes, faults, what they leave behind, and the table of it."""
