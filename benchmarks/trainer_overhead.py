"""What the trainer costs: its steps per second against a minimal loop written by hand that does the same.

python benchmarks/trainer_overhead.py [--json] [--quick]

Both train the demo's network of scanned digits on the same batches with the same optimizer, learning rate and
clipping, on a CPU. The trainer also judges every gradient and records into TensorBoard, as it always does.
They take turns in one process; each round gives a ratio, and the median counts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import document, finish, parse_options
from torch import Tensor, nn

from edgekit.demo.digits import build, load
from host_trainer import config as configuration
from host_trainer.health import Health
from host_trainer.loop import Task, TrainSettings, adamw, one_cycle, run
from host_trainer.objective import Objective
from host_trainer.parallel import Parallel
from host_trainer.record import Journal, Recorder

BATCH = 16
Batch = dict[str, Tensor]


def main() -> None:
    """Let the two take turns."""
    options = parse_options(__doc__)
    rounds, steps = (2, 3) if options.quick else (9, 20)
    torch.set_num_threads(2)
    batches = _batches()
    settings = TrainSettings(epochs=1, learning_rate=1e-3, clip_norm=1.0)
    with tempfile.TemporaryDirectory() as temporary:
        trainer = _trainer(Path(temporary), batches, steps, settings)
        hand = _hand(batches, steps, settings)
        trainer(), hand()  # what happens only once
        seconds = [(trainer(), hand()) for _ in range(rounds)]
    figures = {
        "trainer_steps_per_s": statistics.median(steps / own for own, _ in seconds),
        "hand_steps_per_s": statistics.median(steps / other for _, other in seconds),
        "ratio": statistics.median(other / own for own, other in seconds),
        "ratio_spread": [min(o / t for t, o in seconds), max(o / t for t, o in seconds)],
        "overhead_ms_per_step": statistics.median((own - other) / steps * 1e3 for own, other in seconds),
    }
    claim = "the trainer takes at least 0.97 of the steps of a hand-written loop"
    finish(document("trainer_overhead", claim, figures, {"ratio": (">=", 0.97)}, rounds), options.json)


def _batches() -> list[Batch]:
    images, labels = (torch.from_numpy(array) for array in (load(0)[0].images, load(0)[0].labels))
    starts = range(0, len(labels) - BATCH + 1, BATCH)
    return [{"image": images[s : s + BATCH], "labels": labels[s : s + BATCH]} for s in starts]


def _trainer(
    directory: Path, batches: list[Batch], steps: int, settings: TrainSettings
) -> Callable[[], float]:
    """The trainer as ``edgekit train`` sets it up, without reading data and writing checkpoints."""
    document: dict[str, Any] = {
        "run": str(directory),
        "model": {"source": "edgekit.demo.digits:build"},
        "data": {"train": "given:here"},
        "optimize": {"batch_size": BATCH, "loss": "cross_entropy"},
        "parallel": {"device": "cpu"},
    }
    config = configuration.parse(document, "the benchmark")
    engine = Parallel(config)
    torch.manual_seed(0)
    module = build()
    objective = Objective(module, config)
    model, optimizer = engine.prepare(module, settings)

    def given(epoch: int, first: int) -> Iterator[tuple[Batch]]:
        return ((batch,) for batch in islice(cycle(batches), first, None))

    task = Task(model, optimizer, given, steps, objective, settings, engine)
    watchers = [
        Health(config.monitor, print, directory),
        Recorder(Journal(directory, config.monitor), config.monitor, BATCH, dict),
    ]

    def timed() -> float:
        began = time.perf_counter()
        run(task, watchers=watchers)
        return time.perf_counter() - began

    return timed


def _hand(batches: list[Batch], steps: int, settings: TrainSettings) -> Callable[[], float]:
    torch.manual_seed(0)
    model = build()
    optimizer = adamw(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: one_cycle(step % steps, steps, settings.warmup_fraction)
    )

    def timed() -> float:
        began = time.perf_counter()
        model.train()
        for batch in islice(cycle(batches), steps):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(batch["image"]), batch["labels"])
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            schedule.step()
        return time.perf_counter() - began

    return timed


if __name__ == "__main__":
    main()
