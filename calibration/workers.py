"""Running several rows of samples at once, and accounting for them in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from calibration.graph import Array
from calibration.probe import Probe
from calibration.shapes import Shape


class Workers:
    """Threads that show rows to a probe: one runs the model while another fills histograms.

    Args:
        probe: what collects.
        count: threads; one row more waits for them, so that none of them has to.
        done: rows done before.
        progress: called with the number of rows done after each row.

    Attributes:
        done: rows done so far.
    """

    def __init__(self, probe: Probe, count: int, done: int, progress: Callable[[int], None] | None) -> None:
        self.done = done
        self._first = True
        self._probe = probe
        self._progress = progress
        self._most_waiting = count + 1
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="calibration")
        self._waiting: deque[Future[dict[str, Shape]]] = deque()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, row: Mapping[str, Array], position: int) -> None:
        """Run a row soon; wait where enough rows are running already.

        Raises:
            CalibrationError: the first row that is not accounted for yet did not run, or showed NaN.
        """
        if len(self._waiting) >= self._most_waiting:
            self._account()
        self._waiting.append(self._pool.submit(self._probe.run, row, position))
        if self._first:  # alone: ONNX Runtime plans its memory then, two at once would each take all of it
            self._first = False
            self._account()

    def finish(self) -> None:
        """Wait for every row; raises as ``submit``."""
        while self._waiting:
            self._account()

    def _account(self) -> None:
        shapes = self._waiting.popleft().result()
        self._probe.macs.add(shapes)
        self.done += 1
        if self._progress is not None:
            self._progress(self.done)
