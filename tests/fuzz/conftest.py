"""Makes the fuzz targets importable; no package, so that an environment of their own can run them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
