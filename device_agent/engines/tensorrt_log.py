"""What TensorRT says, kept: its functions return nothing and tell the reason to a logger."""

from __future__ import annotations

from collections import deque
from typing import Any, Deque

_KEPT = 100


def collecting_logger(trt: Any) -> Any:
    """A logger for TensorRT with ``errors`` and ``warnings``, the latest of each, and ``why``.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
    """

    class Collecting(trt.ILogger):  # type: ignore[misc]  # its base is only known here
        def __init__(self) -> None:
            super().__init__()
            self.errors: Deque[str] = deque(maxlen=_KEPT)
            self.warnings: Deque[str] = deque(maxlen=_KEPT)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)

        def why(self, otherwise: str) -> str:
            """What went wrong since this was last asked: the first error, which the others follow from."""
            first = self.errors[0] if self.errors else otherwise
            self.errors.clear()
            return first

    return Collecting()
