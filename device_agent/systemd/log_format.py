"""Log lines with the priority that the journal reads from their beginning (sd-daemon(3))."""

from __future__ import annotations

import logging
import os
import sys
from typing import Mapping

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7
FORMAT = "%(levelname)s %(name)s: %(message)s"


def formatter(environment: Mapping[str, str]) -> logging.Formatter:
    """The format of the log on standard error: the journal's where it goes there."""
    return JournalFormatter() if _goes_to_journal(environment) else logging.Formatter(FORMAT)


class JournalFormatter(logging.Formatter):
    """Every line begins with its priority; the level and the time are the journal's to show."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The record, also where it has several lines, as a traceback does."""
        prefix = f"<{_priority(record.levelno)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), _DEBUG)


def _goes_to_journal(environment: Mapping[str, str]) -> bool:
    """Whether standard error is the stream that systemd connected (JOURNAL_STREAM in systemd.exec(5))."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False  # standard error is closed, or no file
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
