"""What ``status`` shows of the followers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from device_agent.follow import record
from device_agent.follow.record import Record
from device_agent.follow.settings import Follow


def describe(
    kept: Record, phase: str, last_success_s: float, failures: int, last_error: Optional[Mapping[str, Any]]
) -> Dict[str, Any]:
    """A follower for JSON.

    Args:
        kept: its durable state.
        phase: what it does now.
        last_success_s: when the registry last answered; 0: never.
        failures: in a row.
        last_error: the last of them.
    """
    error = None if last_error is None else {**last_error, "at": timestamp(last_error["at_s"])}
    if error is not None:
        del error["at_s"]
    return {
        "reference": kept.reference,
        "phase": phase,
        "artifact": kept.artifact or None,
        "bundle": kept.bundle or None,
        "outcome": kept.outcome or None,
        "why": kept.why or None,
        "since": timestamp(kept.changed_s),
        "last_success": timestamp(last_success_s),
        "failures": failures,
        "last_error": error,
    }


def recorded(state_dir: Path, follows: Mapping[str, Follow]) -> Dict[str, Dict[str, Any]]:
    """The followers of an agent that does not run, from what they left on disk."""
    described = {}
    for name, follow in follows.items():
        kept = record.read(state_dir, name, follow.reference)
        described[name] = describe(kept, "not running", kept.last_success_s, 0, None)
    return described


def line(follower: Mapping[str, Any]) -> str:
    """One line for people."""
    text = f"  follows {follower['reference']}: {follower['phase']}"
    text += f" ({follower['why']})" if follower["why"] else ""
    text += f", last answer {follower['last_success'] or 'never'}"
    error = follower["last_error"]
    if error is not None:
        text += f", {follower['failures']} failures in a row: {error['what']}: {error['why']}"
    return text


def timestamp(seconds: float) -> Optional[str]:
    """ISO 8601 in UTC; None for never."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)) if seconds else None
