"""Training data: whatever its form, a loader gives each process its share of every step, from any step on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from host_trainer.config import Config, check_processes
from host_trainer.errors import ConfigError
from host_trainer.loop import MicroBatches

Sample = Mapping[str, Any]


class Samples(Protocol):
    """A map-style dataset. A sample is a dict of arrays, ``labels`` among them where there are any."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Sample ``key[1]`` as epoch ``key[0]`` sees it: random changes depend on both and the seed alone."""

    def order(self, seed: int, epoch: int) -> np.ndarray[Any, Any]:
        """The samples of an epoch, each once."""


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    """An order of ``count`` samples that depends on the seed and the epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclass(frozen=True)
class Share:
    """What one process computes of each step.

    Attributes:
        batch_size: samples of a step, over all processes.
        micro_batch_size: samples of a micro-batch.
        rank: this process, of ``world``.
        world: processes.
    """

    batch_size: int
    micro_batch_size: int
    rank: int = 0
    world: int = 1

    @property
    def per_process(self) -> int:
        """Samples of a step in each process."""
        return self.batch_size // self.world

    @property
    def accumulated(self) -> int:
        """Micro-batches of a step in each process."""
        return self.per_process // self.micro_batch_size


@dataclass(frozen=True)
class Loader:
    """Batches for the loop.

    Attributes:
        steps_per_epoch: steps of an epoch, the same in each process.
        batches: see ``loop.MicroBatches``; a micro-batch is a dict of tensors, samples first.
    """

    steps_per_epoch: int
    batches: MicroBatches


def share(config: Config, rank: int, world: int) -> Share:
    """Divide a step among the processes, in micro-batches of one size.

    Raises:
        ConfigError: it cannot be divided evenly; the key is named.
    """
    check_processes(config, world)
    mine = config.optimize.batch_size // world
    micro = min(config.optimize.micro_batch_size or mine, mine)
    return Share(config.optimize.batch_size, micro, rank, world)


def open_training(config: Config, part: Share) -> Loader:
    """Open ``data.train``.

    Raises:
        ConfigError: it does not exist, holds nothing, or has fewer samples than a step.
    """
    from host_trainer.data.order import training_loader

    return training_loader(open_samples(config.data.train, config, training=True), config, part)


def open_samples(spec: str, config: Config, training: bool) -> Samples:
    """Find out what form the data has, and open it.

    Raises:
        ConfigError: it does not exist, or has a form that is not known.
    """
    path = Path(spec)
    if path.is_dir():
        from host_trainer.data.images import ImageFolder

        return ImageFolder.open(path, config, training)
    if path.suffix == ".jsonl":
        from host_trainer.data.records import Records

        return Records.open(path, config, training)
    if path.suffix == ".tar":
        from host_trainer.data.shards import Shards

        return Shards(spec, config, training)
    if ":" in spec:
        return _Keyed(call(spec, "data.train"))
    raise ConfigError(
        f"the data {spec} does not exist",
        "it is no directory of class folders, no .jsonl, no .tar and no package.module:function",
        "check the path",
    )


def call(spec: str, key: str) -> Any:
    """Import ``package.module:function`` and call it without arguments.

    Raises:
        ConfigError: there is no such module or function.
    """
    return resolve(spec, key)()


def resolve(spec: str, key: str) -> Callable[..., Any]:
    """Import ``package.module:function``.

    Raises:
        ConfigError: there is no such module or function.
    """
    module, _, name = spec.partition(":")
    try:
        found: Callable[..., Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key} '{spec}' cannot be imported", str(error), "give package.module:function"
        ) from error
    return found


class _Keyed:
    """A user's dataset, which knows no epochs."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        sample: Sample = self._dataset[key[1]]
        return sample

    def order(self, seed: int, epoch: int) -> np.ndarray[Any, Any]:
        """Any sample may come next."""
        return shuffled(len(self), seed, epoch)
