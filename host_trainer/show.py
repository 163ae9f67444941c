"""What a person sees while a run goes: a bar with the time left, and alerts. On standard error."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from host_trainer.loop import Step, Task, Watcher


class Bar(Watcher):
    """A progress bar; without a terminal, a line now and then."""

    def __init__(self, visible: bool) -> None:
        """Prepare it; one process of several is the visible one."""
        self._console = Console(stderr=True, quiet=not visible)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not visible or not self._console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=None)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, task: Task, step: int) -> None:
        """Show where it begins."""
        self._progress.update(self._bar, total=task.total_steps, completed=step)
        self._epochs = task.settings.epochs

    def after(self, step: Step) -> None:
        """Move the bar."""
        what = f"epoch {step.epoch + 1}/{self._epochs}  loss {step.loss:.4f}"
        self._progress.update(self._bar, completed=step.number, description=what)

    def epoch_end(self, epoch: int, step: int) -> None:
        """Without a terminal, say that an epoch ended."""
        if not self._console.is_terminal:
            self._console.print(f"epoch {epoch + 1} of {self._epochs} done, step {step}", highlight=False)

    def alert(self, text: str) -> None:
        """A line that stays."""
        self._console.print(f"! {text}", highlight=False, markup=False)
