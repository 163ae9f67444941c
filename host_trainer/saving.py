"""When checkpoints are written, and stopping in good order."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from host_trainer.checkpoint import Snapshot, Store, agree
from host_trainer.errors import TrainingError
from host_trainer.loop import Step, Watcher


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; what was done until then is in a checkpoint."""


class Saver(Watcher):
    """Writes a checkpoint every so many steps, after the last, and when the process is told to end."""

    def __init__(
        self,
        store: Store,
        every_steps: int,
        snapshot: Callable[[int], Snapshot],
        writes: bool,
        alert: Callable[[str], None],
    ) -> None:
        """Save a run.

        Args:
            store: where to.
            every_steps: how often.
            snapshot: gives the run's state at a step; every process takes part.
            writes: whether this process is the one that writes.
            alert: told about a checkpoint that could not be written.
        """
        self._store = store
        self._every_steps = every_steps
        self._snapshot = snapshot
        self._writes = writes
        self._alert = alert
        #: Whether this process was told to end.
        self.told_to_end = False
        #: Step of the newest checkpoint that was begun.
        self.last_step = 0

    def after(self, step: Step) -> None:
        """Save where it is due."""
        if step.number % self._every_steps == 0 or step.number == step.total or step.ending:
            self.save(step.number)
        if step.ending:
            self.finish()
            raise Interrupted

    def save(self, step: int) -> None:
        """Begin a checkpoint; training goes on while it is written."""
        snapshot = self._snapshot(step)
        self.last_step = step
        if self._writes:
            failure = self._store.begin(snapshot)
            if failure is not None:
                self._alert(
                    f"a checkpoint before step {step} could not be written: {failure}; older ones stay"
                )

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            TrainingError: it could not be written; in every process.
        """
        failure = self._store.wait()
        reason = agree(None if failure is None else str(failure))
        if reason is not None:
            raise TrainingError(
                "the last checkpoint could not be written", reason,
                "make room on the disk and run the same command again; the checkpoints before it are whole",
            )  # fmt: skip

    @contextmanager
    def listening(self, alone: bool) -> Iterator[None]:
        """Let Ctrl-C end the run with a checkpoint, and SIGTERM too.

        Several processes end after the same step. One of several ends at once at SIGTERM, and the last
        checkpoint counts: the launcher sends it to those that wait for one that failed.
        """
        heard = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.told_to_end = True
