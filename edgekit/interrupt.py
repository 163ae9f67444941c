"""Ctrl-C, remembered.

Python raises ``KeyboardInterrupt`` wherever the program is. Some libraries turn it into an error of their own
(torch's argument parser into ``TypeError``, a class body into ``RuntimeError``), and code that falls back to
another way on an error would then go on, with a result that depends on when the person lost patience.
"""

from __future__ import annotations

import signal
from types import FrameType

_heard = False


def listen() -> None:
    """Remember SIGINT from now on; it still raises ``KeyboardInterrupt``."""
    signal.signal(signal.SIGINT, _remember)


def heard() -> bool:
    """Whether Ctrl-C was pressed, even if its exception was lost since."""
    return _heard


def check() -> None:
    """Raise the ``KeyboardInterrupt`` that was lost, if there was one."""
    if _heard:
        raise KeyboardInterrupt


def _remember(number: int, frame: FrameType | None) -> None:
    global _heard
    _heard = True
    signal.default_int_handler(number, frame)
