"""The soak, for a few seconds: it is run for ten minutes by hand."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from serving.soak import soak  # noqa: E402 - found through the line above
from serving.soaking.site import Here  # noqa: E402

sys.path.remove(str(BENCHMARKS))  # calibration.py there would hide the package from later tests


def test_the_agent_serves_on_whatever_its_clients_do(tmp_path: Path) -> None:
    """Right answers, no hang, no leak, no 500 without a cause, while clients vanish, lie and bomb."""
    result = soak(tmp_path, Here(), seconds=5.0, seed=2)
    assert result["figures"]["first_violations"] == []
    judged = {name: result["figures"][name] for name in result["targets"]}
    assert result["met"], (judged, result["targets"])
    assert result["figures"]["answered_200"] > 100
    assert result["figures"]["swaps"] > 0
