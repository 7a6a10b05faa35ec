"""Put the repository's root first on sys.path; scripts of this folder import `vil`, `data` and `tools`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
