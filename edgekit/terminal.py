"""What a person sees while a plan runs, and the tables afterwards. Everything goes to standard error."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from edgekit import run
from edgekit.report.document import Report


class TerminalProgress(run.Progress):
    """A bar for the step that runs, and a line for each that ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> TerminalProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, step: str) -> None:
        """Show the step."""
        self._task = self._bar.add_task(step, total=None)

    def tick(self, done: int, total: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def end(self, record: run.StageRecord) -> None:
        """Replace the bar by a line."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        took = "reused" if record.cached else f"{record.seconds:.1f} s"
        self._console.print(f"  {record.name:<18} {took}", highlight=False)


def result_table(report: Report) -> Table:
    """What was gained and what was lost."""
    was, now = report.baseline, report.chosen
    table = Table(title=f"{report.model} for {report.profile}: {now.precision}", title_justify="left")
    table.add_column("")
    for heading in ("original", "chosen", "ratio"):
        table.add_column(heading, justify="right")
    table.add_row("parameters", f"{was.params:,}", f"{now.params:,}", f"{now.params_ratio:.3f}")
    table.add_row("multiply-accumulates", f"{was.macs:,}", f"{now.macs:,}", _ratio(now.macs, was.macs))
    table.add_row("file, bytes", f"{was.size_bytes:,}", f"{now.size_bytes:,}", f"{now.size_ratio:.3f}")
    metric = f"{now.metric.name} on {now.metric.samples} held-out samples"
    table.add_row(metric, f"{was.metric.value:.4f}", f"{now.metric.value:.4f}", f"{0 - now.metric_drop:+.4f}")
    for quantile in ("p50", "p95"):
        before, after = getattr(was.latency_ms, quantile), getattr(now.latency_ms, quantile)
        table.add_row(
            f"latency {quantile}, batch 1", f"{before:.2f} ms", f"{after:.2f} ms", _ratio(after, before)
        )
    return table


def served_line(requests: int, identical: int, p50_ms: float, p99_ms: float) -> str:
    """What the local agent did, in one line."""
    return (
        f"served  {requests} requests, {identical} identical to ONNX Runtime bit for bit; "
        f"p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms over HTTP"
    )


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.3f}" if before else ""
