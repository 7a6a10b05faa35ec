"""tools/visualize.py: figures of attention maps, rollout and relative bias tables."""
