"""tools/inspect_data.py: what a data set contains."""
