"""The results that the paper prints: Tables 1 and 2, and the published models (paper_results.json)."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any


def read_paper_results() -> dict[str, Any]:
    """Return the results; numbers with a decimal point are `Decimal`, which keeps the printed digits."""
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    results: dict[str, Any] = json.loads(text, parse_float=Decimal)
    return results
