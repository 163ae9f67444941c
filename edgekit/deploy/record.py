"""The record of a rollout: what became of each device, so that the next run goes on from there.

``.edgekit/rollouts/NAME-DIGEST.json``, one for each bundle. It is replaced whole after every change.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from edgekit.bundle import write_atomically
from edgekit.deploy.inventory import Device
from edgekit.errors import BadInput

COMMITTED, FAILED, UNREACHABLE, DEPLOYING = "committed", "failed", "unreachable", "deploying"


@dataclass(frozen=True)
class Outcome:
    """What became of a device.

    Attributes:
        device: its name.
        state: ``committed``; ``failed``: it refused or rolled back; ``unreachable``; or ``deploying``:
            it was interrupted, and whether it has the bundle is asked at the next run.
        what, why, fix: of a failure.
        at: when, in UTC.
    """

    device: str
    state: str
    what: str = ""
    why: str = ""
    fix: str = ""
    at: str = ""


class Record:
    """The outcomes by address; safe to use from several threads."""

    def __init__(self, path: Path, digest: str, outcomes: dict[str, Outcome]) -> None:
        self.path = path
        self._digest = digest
        self._outcomes = outcomes
        self._lock = threading.Lock()

    def of(self, device: Device) -> Outcome | None:
        """What became of a device; None if it had no turn."""
        with self._lock:
            return self._outcomes.get(str(device.address))

    def set(self, device: Device, outcome: Outcome) -> None:
        """Remember an outcome, on the disk too."""
        at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with self._lock:
            self._outcomes[str(device.address)] = Outcome(**{**asdict(outcome), "at": at})
            document = {
                "schema": 1,
                "bundle": self._digest,
                "devices": {address: asdict(outcome) for address, outcome in self._outcomes.items()},
            }
            write_atomically(self.path, (json.dumps(document, indent=2) + "\n").encode())


@contextmanager
def opened(path: Path, digest: str) -> Iterator[Record]:
    """Open a rollout's record, made if it is missing, for this process alone.

    Raises:
        BadInput: another process goes on with the same rollout; or the file is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_suffix(".lock"), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(
                "this rollout is under way already", f"another edgekit holds {path}", "wait for its end"
            ) from error
        yield Record(path, digest, _read(path))
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Outcome]:
    try:
        raw = json.loads(path.read_bytes())
        return {str(address): Outcome(**entry) for address, entry in raw["devices"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"the rollout record {path} cannot be read",
            str(error) or type(error).__name__,
            "move it away to begin anew: a device that has the bundle is not changed again",
        ) from error
