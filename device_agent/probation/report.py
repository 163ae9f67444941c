"""How shadow traffic is shown to a person, in ``status``."""

from __future__ import annotations

from typing import Any, Mapping


def line(shadow: Mapping[str, Any]) -> str:
    """One line for what ``Shadow.describe`` returned."""
    if shadow["skipped"]:
        return f"  shadow traffic: none: {shadow['skipped']}"
    parts = [
        f"{shadow['requests']} requests and {shadow['golden_rows']} golden rows, {shadow['failed']} failed"
    ]
    if shadow["run_ms"] is not None:
        parts.append(
            f"{shadow['run_ms']:.3g} ms in the engine, the old version {shadow['old_run_ms']:.3g} ms"
        )
    for name, seen in shadow["outputs"].items():
        if seen["agreeing_fraction"] is not None:
            parts.append(f"'{name}' agrees in {seen['agreeing_fraction']:.1%}")
    return f"  shadow traffic: {'; '.join(parts)}"
