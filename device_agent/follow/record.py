"""What a device remembers of a tag that it follows, across power cuts: ``STATE_DIR/follow/NAME.json``.

It decides one thing: that an artifact which was installed, or which the device refused, is not tried again
before the tag moves on. A record that is lost costs one more try.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Dict, Optional

from device_agent import durable, json_text

MAX_TRIES = 3
SUCCESS_KEPT_EVERY_S = 3600.0  # to write once an hour wears no flash out
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """The durable part of a follower's state.

    Attributes:
        reference: the tag that it is about, as configured.
        artifact: digest of the artifact that was dealt with last or is being tried.
        outcome: ``installed``, ``refused``, or empty while it is being tried.
        tries: how often its installation was begun; one that ends the whole agent each time is given up.
        bundle: digest of the bundle inside; empty: not known.
        why: the reason of a refusal.
        changed_s: when, as seconds since 1970 by the device's clock.
        last_success_s: when the registry last answered as it should; at most an hour behind the truth.
    """

    reference: str = ""
    artifact: str = ""
    outcome: str = ""
    tries: int = 0
    bundle: str = ""
    why: str = ""
    changed_s: float = 0.0
    last_success_s: float = 0.0

    def settled(self, artifact: str) -> bool:
        """Whether there is nothing to do about an artifact until the tag moves."""
        return self.artifact == artifact and bool(self.outcome)

    def tries_of(self, artifact: str) -> int:
        """How often the installation of an artifact was begun."""
        return self.tries if self.artifact == artifact else 0


def path_of(state_dir: Path, name: str) -> Path:
    """Where the record of a model's follower lies."""
    return state_dir / "follow" / f"{name}.json"


def read(state_dir: Path, name: str, reference: str) -> Record:
    """The record, if it is about this reference; an empty one where it is not, or is missing or damaged."""
    path = path_of(state_dir, name)
    try:
        record = _parse(json_text.loads(path.read_bytes()))
    except FileNotFoundError:
        record = None
    except (OSError, ValueError) as error:
        _log.error("%s is damaged and ignored: %s", path, error)
        record = None
    if record is None or record.reference != reference:
        return Record(reference=reference)
    return record


def write(state_dir: Path, name: str, record: Record) -> None:
    """Replace the record.

    Raises:
        OSError: the disk failed; the old record is still there.
    """
    path = path_of(state_dir, name)
    durable.make_directory(path.parent)
    durable.write(path, (json.dumps(asdict(record), sort_keys=True, indent=2) + "\n").encode())


def _parse(raw: Any) -> Optional[Record]:
    if not isinstance(raw, dict):
        return None
    values: Dict[str, Any] = {}
    for field in fields(Record):
        value = raw.get(field.name, field.default)
        if type(value) is not type(field.default):
            return None
        values[field.name] = value
    return Record(**values)
