"""Programs for maintainers: `python -m tools.dev.NAME --help` in the repository's root."""
