"""How a process that the agent starts ends: with the agent, and before it where memory runs out."""

from __future__ import annotations

import ctypes
import logging
import os
import signal

_PR_SET_PDEATHSIG = 1

_log = logging.getLogger(__name__)


def die_with(parent: int) -> None:
    """Have the kernel end this process when the agent's thread that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:  # it was gone before
        os._exit(0)


def prefer_to_be_ended(score: int) -> None:
    """Have the kernel end this process rather than the agent when memory runs out.

    Args:
        score: from 0, as any process, to 1000, the first.
    """
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as stream:
            stream.write(str(score))
    except OSError as error:
        _log.info("the out-of-memory score cannot be raised: %s", error)
