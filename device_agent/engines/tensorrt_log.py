"""What TensorRT says, kept: its functions return nothing and tell the reason to a logger."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Deque

if TYPE_CHECKING:
    from tensorrt import ILogger

    from device_agent.engines.tensorrt_module import TensorRt

_KEPT = 100


class Said:
    """What TensorRT said.

    Attributes:
        logger: to hand to TensorRT.
        errors: the latest.
        warnings: the latest.
    """

    def __init__(self, trt: TensorRt) -> None:
        self.errors: Deque[str] = deque(maxlen=_KEPT)
        self.warnings: Deque[str] = deque(maxlen=_KEPT)
        self._listings: Deque[str] = deque(maxlen=1)
        self.logger = _logger(trt, self.errors, self.warnings, self._listings)

    @property
    def layers(self) -> str:
        """Of the last engine that was built, where the builder lists them: TensorRT-RTX does."""
        return self._listings[0] if self._listings else ""

    def why(self, otherwise: str) -> str:
        """What went wrong since this was last asked: the first error, and the last where that is another.

        Most often the others follow from the first; but a timing cache that is not used is an error too.
        """
        lines = [error.strip().splitlines()[0] for error in self.errors if error.strip()] or [otherwise]
        self.errors.clear()
        return lines[0] if lines[-1] == lines[0] else f"{lines[0]}; at last: {lines[-1]}"


def _logger(trt: TensorRt, errors: Deque[str], warnings: Deque[str], listings: Deque[str]) -> ILogger:
    if TYPE_CHECKING:
        from tensorrt import ILogger as Base
    else:
        Base = trt.ILogger  # known only here

    class Logger(Base):
        def log(self, severity: ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors.append(msg)
            elif severity == trt.ILogger.WARNING:
                warnings.append(msg)
            elif msg.startswith("Layers:\n"):
                listings.append(msg)

    return Logger()
