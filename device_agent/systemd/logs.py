"""What the journal holds of the service: ``edgekit-agent logs``."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import datetime, timezone
from typing import Any, Dict, List, Mapping

from device_agent.errors import Missing, Refused

UNIT = "edgekit-agent.service"


def read(lines: int) -> List[Dict[str, Any]]:
    """The last lines, oldest first, each with ``time`` (UTC), ``priority`` (0 to 7) and ``message``.

    Raises:
        Missing: there is no journal here.
        Refused: this user may not read it.
    """
    if shutil.which("journalctl") is None:
        raise Missing(
            "there is no journal to read",
            "journalctl is not on this machine",
            "look where the agent's standard error goes",
        )
    command = ["journalctl", "--unit", UNIT, "--lines", str(lines), "--no-pager", "--output", "json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise Refused(
            "the journal cannot be read",
            said[0] if said else f"journalctl ended with {done.returncode}",
            "run this as root or as a member of the group systemd-journal",
        )
    return [_entry(json.loads(line)) for line in done.stdout.splitlines() if line.strip()]


def _entry(raw: Mapping[str, Any]) -> Dict[str, Any]:
    message = raw.get("MESSAGE") or ""
    if isinstance(message, list):  # bytes that are not text come as numbers
        message = bytes(message).decode(errors="replace")
    moment = datetime.fromtimestamp(int(raw["__REALTIME_TIMESTAMP"]) / 1e6, timezone.utc)
    return {
        "time": moment.isoformat(timespec="milliseconds"),
        "priority": int(raw.get("PRIORITY", 6)),
        "message": message,
    }
