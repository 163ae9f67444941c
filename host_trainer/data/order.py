"""The order of samples, and who computes which.

The order depends on the seed and the epoch alone. A step takes the next ``batch_size`` samples of it, and
each process its part: training has the same steps on any number of processes, and goes on from any.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from host_trainer.config import Config
from host_trainer.data import Loader, Samples, Share
from host_trainer.data.collate import collate
from host_trainer.errors import ConfigError, TrainingError

Key = tuple[int, int]


def training_loader(samples: Samples, config: Config, part: Share) -> Loader:
    """Batches of a map-style dataset, in another order each epoch; a rest that fills no step is left out.

    Raises:
        ConfigError: there are fewer samples than a step has.
    """
    steps = len(samples) // part.batch_size
    if not steps:
        raise ConfigError(
            f"data.train has {len(samples)} samples, fewer than one step",
            f"optimize.batch_size is {part.batch_size}",
            "give more data or a smaller optimize.batch_size",
        )
    order = _Order(samples, steps, config.seed, part)
    loader = _loader(samples, order, config.data.workers, config)

    def batches(epoch: int, first_step: int) -> Iterator[tuple[dict[str, Tensor], ...]]:
        order.begin(epoch, first_step)
        arriving = iter(loader)
        for _ in range(first_step, steps):
            yield tuple(_whole(next(arriving)) for _ in range(part.accumulated))

    return Loader(steps, batches)


def held_out_batches(
    samples: Samples, config: Config, part: Share
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """(batch, how many of its samples count) in this process, each sample counted once over all of them.

    Every process gets the same number of batches, for some engines compute them together: where one has no
    sample left, its batch is sample 0, and none of it counts.
    """
    mine = range(part.rank, len(samples), part.world)
    size = part.micro_batch_size
    keys = [[(0, index) for index in mine[start : start + size]] for start in range(0, len(mine), size)]
    rounds = -(-len(range(0, len(samples), part.world)) // size)
    counts = [len(batch) for batch in keys] + [0] * (rounds - len(keys))
    keys += [[(0, 0)]] * (rounds - len(keys))
    loader = _loader(samples, keys, 0, config)
    for batch, count in zip(loader, counts, strict=True):
        yield _whole(batch), count


class _Order:
    """The batch sampler: keys of this process's micro-batches, from the step that was asked for."""

    def __init__(self, samples: Samples, steps: int, seed: int, part: Share) -> None:
        self._samples, self._steps, self._seed, self._part = samples, steps, seed, part
        self.begin(0, 0)

    def begin(self, epoch: int, first_step: int) -> None:
        self._epoch, self._first_step = epoch, first_step

    def __iter__(self) -> Iterator[list[Key]]:
        part = self._part
        order = self._samples.order(self._seed, self._epoch)
        for step in range(self._first_step, self._steps):
            begin = step * part.batch_size + part.rank * part.per_process
            for start in range(begin, begin + part.per_process, part.micro_batch_size):
                yield [(self._epoch, int(index)) for index in order[start : start + part.micro_batch_size]]


class _Reporting(Dataset[Any]):
    """An error becomes a value: a worker process would hand on its text alone."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, key: Key) -> Any:
        try:
            return self._samples[key]
        except TrainingError as error:
            return error


def _loader(samples: Samples, keys: Any, workers: int, config: Config) -> DataLoader[Any]:
    return DataLoader(
        _Reporting(samples),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=config.parallel.device != "cpu" and _has_gpu(),
        persistent_workers=workers > 0,
        worker_init_fn=_leave_ctrl_c_to_the_trainer,
    )


def _leave_ctrl_c_to_the_trainer(_worker: int) -> None:
    """A terminal tells every process; the trainer needs batches until its step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(samples: Sequence[Any]) -> Any:
    for sample in samples:
        if isinstance(sample, TrainingError):
            return sample
    try:
        return collate(samples)
    except TrainingError as error:
        return error


def _whole(batch: Any) -> Any:
    if isinstance(batch, TrainingError):
        raise batch
    return batch


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
