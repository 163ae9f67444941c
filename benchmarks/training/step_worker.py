"""``python step_worker.py SPEC`` (JSON): times steps in one process, alone or one of torchrun's.

The first process prints a JSON document.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from itertools import cycle, islice, pairwise
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from host_trainer import config as configuration
from host_trainer.data import open_training, share
from host_trainer.loop import Step, Task, TrainSettings, Watcher, run
from host_trainer.objective import build
from host_trainer.parallel import Parallel
from training.steps import Spec
from training.synthetic import cases

#: Batches that take turns, so that no step finds its inputs in the cache.
BATCHES = 4
PROFILED_STEPS = 4


def main() -> None:
    """Time one spec."""
    spec = Spec(**json.loads(sys.argv[1]))
    result = _hand(spec) if spec.way == "hand" else _trainer(spec)
    if result is not None:
        print(json.dumps(result))


def _trainer(spec: Spec) -> dict[str, Any] | None:
    torch.backends.cudnn.allow_tf32 = False
    case = cases(spec.quick)[spec.case]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = configuration.parse(
        {
            "run": "unused",
            "model": {"source": "training.synthetic:none"},
            "data": {"train": spec.data or "training.synthetic:none", "workers": spec.workers},
            "optimize": {"batch_size": case.per_process * world, "epochs": 1},
            "precision": {"amp": spec.amp, "activation_checkpointing": spec.activation_checkpointing},
            "parallel": {"strategy": spec.strategy},
        },
        "the benchmark",
    )
    torch.manual_seed(0)
    engine = Parallel(config)
    try:
        model = case.build()
        objective = build(model, config)
        settings = TrainSettings(epochs=1, learning_rate=1e-5, clip_norm=1.0)
        model, optimizer = engine.prepare(model, settings)
        if spec.data:
            loader = open_training(config, share(config, engine.rank, world))
            batches: Any = loader.batches
        else:
            ready = [(case.batch(case.per_process, engine.device),) for _ in range(BATCHES)]
            batches = lambda epoch, first: islice(cycle(ready), first, None)  # noqa: E731
        return _timed(spec, engine, model, optimizer, batches, objective, settings, case.per_process)
    finally:
        engine.close()


def _timed(
    spec: Spec,
    engine: Any,
    model: Any,
    optimizer: Any,
    batches: Any,
    objective: Any,
    settings: Any,
    size: int,
) -> dict[str, Any] | None:
    task = Task(model, optimizer, batches, spec.warmup + spec.steps, objective, settings, engine)
    cuda = engine.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times_ms, waited = _run(task, spec.warmup)
    result = {
        "spec": asdict(spec),
        "processes": engine.world,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "step_ms": statistics.median(times_ms),
        "step_ms_spread": [min(times_ms), max(times_ms)],
        "samples_per_s": size * engine.world / (statistics.fmean(times_ms) / 1e3),
        "waiting_for_data_fraction": waited,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }
    if spec.communication and engine.world > 1:
        result |= _communication(task, spec, engine, statistics.median(times_ms))
    return result if engine.rank == 0 else None


class _Clock(Watcher):
    def __init__(self) -> None:
        self.times: list[float] = []
        self.waited: list[float] = []

    def judge(self, step: Step) -> None:
        """The gradient has just been waited for."""
        self.times.append(time.perf_counter())
        self.waited.append(step.waited_s)


def _run(task: Any, warmup: int) -> tuple[list[float], float]:
    """Milliseconds between gradients, which the loop waits for, and the share that batches took."""
    clock = _Clock()
    run(task, watchers=[clock])
    times = clock.times[warmup:]
    spans = [(after - before) * 1e3 for before, after in pairwise(times)]
    return spans, sum(clock.waited[warmup + 1 :]) / (sum(spans) / 1e3)


def _communication(task: Any, spec: Spec, engine: Any, step_ms: float) -> dict[str, float | None]:
    """How long the collectives run, and how much longer a step is for them.

    The first overlaps with the backward pass; the second is what is left of it, found by steps whose
    gradients stay where they are (DDP alone: FSDP cannot compute without its exchange).
    """
    cuda = engine.device.type == "cuda"
    few = replace(task, steps_per_epoch=PROFILED_STEPS)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        _run(few, 0)
    names = ("nccl",) if cuda else ("gloo:",)
    events = [event for event in profiler.key_averages() if any(name in event.key.lower() for name in names)]
    busy_us = sum(event.device_time_total if cuda else event.cpu_time_total for event in events)
    found: dict[str, float | None] = {
        "collectives_ms": busy_us / 1e3 / PROFILED_STEPS,
        "collectives_fraction": busy_us / 1e3 / PROFILED_STEPS / step_ms,
        "exposed_fraction": None,
    }
    if spec.strategy == "ddp":
        exchange = engine.micro_step
        engine.micro_step = lambda model, last: exchange(model, False)
        silent_ms, _ = _run(replace(task, steps_per_epoch=spec.warmup + spec.steps), spec.warmup)
        engine.micro_step = exchange
        found["exposed_fraction"] = 1 - statistics.median(silent_ms) / step_ms
    return found


def _hand(spec: Spec) -> dict[str, Any]:
    """The same steps in a loop as one writes it: no watching, no waiting for the gradient."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    case = cases(spec.quick)[spec.case]
    model = case.build().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=cuda or None)
    ready: Sequence[Any] = [case.batch(case.per_process, device) for _ in range(BATCHES)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for step, batch in enumerate(_turns(ready, spec.warmup + spec.steps)):
        if step == spec.warmup:
            _wait(cuda)
            began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with _autocast(spec.amp, device.type):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    _wait(cuda)
    step_ms = (time.perf_counter() - began) / spec.steps * 1e3
    return {
        "spec": asdict(spec),
        "step_ms": step_ms,
        "samples_per_s": case.per_process / step_ms * 1e3,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def _turns(ready: Sequence[Any], count: int) -> Iterator[Any]:
    return islice(cycle(ready), count)


def _autocast(amp: str, device: str) -> AbstractContextManager[Any]:
    return nullcontext() if amp == "no" else torch.autocast(device, dtype=torch.bfloat16)


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
