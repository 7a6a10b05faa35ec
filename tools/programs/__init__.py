"""Programs of a single module; the scripts in tools/ call their `main`."""
