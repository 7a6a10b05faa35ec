"""Figures as PNG files."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


def as_png(figure: Figure, dpi: int = 110) -> bytes:
    """Return a figure as PNG; equal figures give equal bytes with the same version of matplotlib."""
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi, format="png", facecolor="white", metadata={"Software": None})
    return file.getvalue()
