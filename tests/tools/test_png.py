"""Fonts of class names in figures."""

import warnings

import matplotlib
import pytest
from matplotlib import font_manager, ft2font
from matplotlib.figure import Figure

from tools import png


def characters(family: str) -> set[int]:
    return set(ft2font.FT2Font(font_manager.findfont(family)).get_charmap())


def draw(text: str) -> list[str]:
    """Draw a text; return the warnings."""
    figure = Figure()
    figure.text(0.5, 0.5, text)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        png.as_png(figure)
    return [str(warning.message) for warning in found]


def test_characters_of_an_installed_fallback_font(monkeypatch: pytest.MonkeyPatch) -> None:
    text = chr(max(characters("STIXNonUnicode") - characters("DejaVu Sans")))
    monkeypatch.setitem(matplotlib.rcParams, "font.family", matplotlib.rcParamsDefault["font.family"])
    assert any("Glyph" in message for message in draw(text))
    monkeypatch.setattr(png, "FALLBACK_FONTS", ("No Such Font", "STIXNonUnicode"))
    png.use_fallback_fonts()
    assert draw(text) == []


def test_the_font_of_a_matplotlibrc_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["serif"])
    monkeypatch.setattr(png, "FALLBACK_FONTS", ("STIXNonUnicode",))
    for _ in range(2):
        png.use_fallback_fonts()
        assert matplotlib.rcParams["font.family"] == ["serif", "STIXNonUnicode"]
