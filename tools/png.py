"""Figures as PNG files."""

from __future__ import annotations

import io
import logging

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure

FALLBACK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
    "Malgun Gothic",
    "Apple SD Gothic Neo",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Arial Unicode MS",
)
"""Fonts for class names in scripts that matplotlib's own font lacks, of Linux, Windows and macOS."""


def use_fallback_fonts() -> None:
    """Draw characters that the chosen font lacks in the `FALLBACK_FONTS` that are installed."""
    installed = set(font_manager.get_font_names())
    families = [name for name in FALLBACK_FONTS if name in installed]
    logging.getLogger(font_manager.__name__).setLevel(logging.ERROR)  # some have another weight only
    chosen = matplotlib.rcParams["font.family"]  # of matplotlib, or of a matplotlibrc
    matplotlib.rcParams["font.family"] = list(dict.fromkeys([*chosen, *families]))


def as_png(figure: Figure, dpi: int = 110) -> bytes:
    """Return a figure as PNG; equal figures give equal bytes with the same version of matplotlib."""
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi, format="png", facecolor="white", metadata={"Software": None})
    return file.getvalue()


use_fallback_fonts()
