"""Two network namespaces as two machines, and the situations that `tools/dev/two_machines.py` reproduces."""
