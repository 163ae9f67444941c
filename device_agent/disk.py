"""What may be in the way of the store's disk: its failures, and another process."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from device_agent.errors import Refused


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an ``OSError`` into a refusal that says what could not be done."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space" if full else "check the disk and its mount options"
        raise Refused(
            what, error.strerror or str(error), f"{fix}; the versions already installed are untouched"
        ) from error


def lock(path: Path) -> int:
    """Hold the store's lock file until the descriptor is closed.

    Raises:
        Refused: another process holds it.
        OSError: the disk failed.
    """
    descriptor = os.open(str(path), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise Refused(
            f"the store {path.parent} is in use",
            "another edgekit-agent has it open",
            "stop that agent, or talk to it through its control socket",
        ) from error
    return descriptor
