"""Types of command-line options."""

from argparse import ArgumentTypeError


def positive(text: str) -> float:
    """Parse a positive number."""
    if not 0 < (value := float(text)) < float("inf"):
        raise ArgumentTypeError(f"must be positive, got {text}")
    return value
