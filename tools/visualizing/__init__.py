"""Parts of tools/visualize.py."""
