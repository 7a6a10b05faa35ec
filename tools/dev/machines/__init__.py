"""Two network namespaces as two machines, and the scenarios that `tools/dev/two_machines.py` reproduces."""
