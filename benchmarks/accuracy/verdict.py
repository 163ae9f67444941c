"""From comparisons to the table and to the figures that have targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accuracy.comparison import Comparison, Entry
from accuracy.tools import PEERS

#: A model lost to a peer is one too many; a model won is one on which every peer is further away.
TARGETS: Mapping[str, tuple[str, float]] = {
    "compared_pairs": (">=", 30),
    "lost_pairs": ("==", 0),
    "models_won_fraction": (">", 0.5),
    "pairs_below_peer_beyond_error": ("==", 0),
}


def figures(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """What is judged: the distance to the float model; and the task's metric, within its sampling error.

    Equal means the same number. A peer that wrote no graph is not compared with; its reason is in the table.
    """
    pairs = [
        (comparison.case.name, peer, comparison.entries["ours"], comparison.entries[peer])
        for comparison in comparisons
        for peer in PEERS
        if peer in comparison.entries and comparison.entries[peer].distance is not None
    ]
    lost = [f"{case}/{peer}" for case, peer, ours, theirs in pairs if _distance(ours) > _distance(theirs)]
    not_won = {case for case, _, ours, theirs in pairs if _distance(ours) >= _distance(theirs)}
    judged = {case for case, *_ in pairs}
    below = [f"{case}/{peer}" for case, peer, ours, theirs in pairs if _below(ours, theirs)]
    return {
        "models": len(comparisons),
        "compared_pairs": len(pairs),
        "lost_pairs": len(lost),
        "models_won_fraction": len(judged - not_won) / len(judged) if judged else None,
        "pairs_below_peer_beyond_error": len(below),
        "lost": lost,
        "below_peer_beyond_error": below,
    }


def table(comparisons: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
    """For each model the float quality, and for each tool quality, distance, error, choice and time."""
    return {
        comparison.case.name: {
            "summary": comparison.case.summary,
            "test_rows": comparison.rows,
            "metric": comparison.case.metric,
            "distance": comparison.case.distance_name,
            "fp32": comparison.float_quality,
            "tools": {name: _as_json(entry) for name, entry in comparison.entries.items()},
        }
        for comparison in comparisons
    }


def render(comparisons: Sequence[Comparison]) -> str:
    """The table as text: a block a model, a line a tool."""
    lines = []
    for comparison in comparisons:
        case = comparison.case
        lines.append(f"{case.name}: {case.summary}; {comparison.rows} test rows")
        lines.append(f"  {'':<16}{case.metric:>18}{'ours less its':>16}  {case.distance_name:>26}")
        lines.append(f"  {'fp32':<16}{comparison.float_quality:>18.5f}{'':>16}  {0:>26}")
        ours = comparison.entries["ours"]
        lines += [_line(name, entry, ours) for name, entry in comparison.entries.items()]
    return "\n".join(lines)


def _line(name: str, entry: Entry, ours: Entry) -> str:
    if entry.quality is None:
        return f"  {name:<16}  {entry.why}"
    compared = ""
    if entry.error is not None and ours.quality is not None:
        compared = f"{ours.quality - entry.quality:+.5f}±{entry.error:.5f}"
    settings = f"  {entry.result.settings}" if entry.result.settings else ""
    return f"  {name:<16}{entry.quality:>18.5f}{compared:>18}{entry.distance:>26.4f}{settings}"


def _as_json(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {
        "quality": entry.quality,
        "distance": entry.distance,
        "error_of_difference_to_ours": entry.error,
        "quantizing_seconds": entry.seconds,
    }
    optional = {"chosen": entry.result.settings, "attempts": entry.result.attempts, "why": entry.why}
    return found | {key: value for key, value in optional.items() if value}


def _distance(entry: Entry) -> float:
    """Infinite where the tool wrote no graph: ours then loses to every peer that did."""
    return float("inf") if entry.distance is None else entry.distance


def _below(ours: Entry, theirs: Entry) -> bool:
    """Whether the peer's quality is higher by more than two standard errors of the difference."""
    if ours.quality is None or theirs.quality is None or theirs.error is None:
        return False
    return theirs.quality - ours.quality > 2 * theirs.error
