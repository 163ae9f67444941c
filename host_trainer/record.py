"""Metrics of a run while it goes: in TensorBoard for people, as JSON lines for programs."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from host_trainer.config import Monitor
from host_trainer.loop import Step, Task, Watcher

METRICS_FILE = "metrics.jsonl"
_BAND = ("gradient/norm", "gradient/healthy_low", "gradient/healthy_high")
#: More of a layer's activations than this are thinned out.
_MOST_ACTIVATIONS = 1 << 16


class Journal:
    """Writes named numbers at a step: one line of ``metrics.jsonl``, and TensorBoard's files."""

    def __init__(self, run: Path, settings: Monitor) -> None:
        self._lines = (run / METRICS_FILE).open("a", encoding="utf-8")
        self._board: Any = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"))
            self._board.add_custom_scalars({"gradient": {"norm and healthy band": ["Margin", list(_BAND)]}})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers; a name's part before the slash is its group. In JSON what is infinite is null."""
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, **known}) + "\n")
        self._lines.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Write a distribution, into TensorBoard alone."""
        if self._board is not None:
            self._board.add_histogram(name, values.numpy(), step)

    def close(self) -> None:
        """Flush and close."""
        self._lines.close()
        if self._board is not None:
            self._board.close()


def last_metrics(run: Path) -> dict[str, float | None]:
    """The last of each number in ``metrics.jsonl``, None for what is none; a broken line is left out."""
    last: dict[str, float | None] = {}
    try:
        with (run / METRICS_FILE).open(encoding="utf-8") as lines:
            for line in lines:
                with suppress(ValueError):
                    record = json.loads(line)
                    last |= record if isinstance(record, dict) else {}
    except OSError:
        return {}
    return {name: value for name, value in last.items() if "/" in name and not name.startswith("activation")}


class Recorder(Watcher):
    """Loss, gradient, learning rate, throughput and the GPU, every so many steps."""

    def __init__(
        self,
        journal: Journal,
        settings: Monitor,
        batch_size: int,
        sources: Callable[[], Mapping[str, float]],
    ) -> None:
        """Record a run.

        Args:
            journal: where to.
            settings: how often, and the healthy band.
            batch_size: samples of a step.
            sources: further numbers, asked for at each record.
        """
        self._journal = journal
        self._settings = settings
        self._batch_size = batch_size
        self._sources = sources

    def begin(self, task: Task, step: int) -> None:
        """Start the clock."""
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._steps: list[tuple[float, float, float]] = []

    def after(self, step: Step) -> None:
        """Write a record where one is due."""
        self._steps.append((step.loss, step.grad_norm, step.waited_s))
        if step.number % self._settings.every_steps and step.number != step.total:
            return
        seconds = time.perf_counter() - self._since
        losses, norms, waits = zip(*self._steps, strict=True)
        low, high = self._settings.healthy_norm
        self._journal.write(
            step.number,
            {
                "train/loss": statistics.fmean(losses),
                "train/learning_rate": step.learning_rate,
                **dict(zip(_BAND, (statistics.median(norms), low, high), strict=True)),
                "gradient/largest_norm": max(norms),
                "speed/samples_per_s": len(losses) * self._batch_size / seconds,
                "speed/waiting_for_data_fraction": sum(waits) / seconds,
                **self._sources(),
            },
        )
        self._reset()


class Activations(Watcher):
    """Distributions of the layers' outputs, every so many steps; between them nothing is hooked."""

    def __init__(self, journal: Journal, every_steps: int) -> None:
        self._journal = journal
        self._every_steps = every_steps
        self._handles: list[Any] = []

    def begin(self, task: Task, step: int) -> None:
        """Find the layers."""
        self._layers = [
            (name.removeprefix("module."), module)
            for name, module in task.model.named_modules()
            if next(module.children(), None) is None
        ]

    def before(self, number: int) -> None:
        """Listen, where a record is due."""
        if number % self._every_steps == 0:
            self._handles = [
                module.register_forward_hook(self._hook(name, number)) for name, module in self._layers
            ]

    def judge(self, step: Step) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str, number: int) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            values = output.detach().flatten()
            values = values[:: max(1, values.numel() // _MOST_ACTIVATIONS)].float().cpu()
            self._journal.histogram(number, f"activations/{name}", values)
            self._journal.write(
                number,
                {
                    f"activation_mean/{name}": float(values.mean()),
                    f"activation_std/{name}": float(values.std(unbiased=False)),
                    f"activation_largest/{name}": float(values.abs().max()),
                    f"activation_zero_fraction/{name}": float((values == 0).float().mean()),
                },
            )

        return record
