"""The soak, for a few seconds: it is run for ten minutes by hand."""

from __future__ import annotations

from pathlib import Path

from serving.soak import soak
from serving.soaking.site import Here


def test_the_agent_serves_on_whatever_its_clients_do(tmp_path: Path) -> None:
    """Right answers, no hang, no leak, no 500 without a cause, while clients vanish, lie and bomb."""
    result = soak(tmp_path, Here(), seconds=5.0, seed=2)
    assert result["figures"]["first_violations"] == []
    judged = {name: result["figures"][name] for name in result["targets"]}
    assert result["met"], (judged, result["targets"])
    assert result["figures"]["answered_200"] > 100
    assert result["figures"]["swaps"] > 0
