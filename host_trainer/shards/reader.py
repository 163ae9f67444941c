"""Shards as a map-style data set: any sample at any time, in one read.

dataset = ShardDataset("data/train-{000000..000031}.tar")
len(dataset), dataset[7], dataset.order(seed, epoch)
"""

from __future__ import annotations

import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from host_trainer.errors import TrainingError
from host_trainer.shards import index
from host_trainer.shards.members import files
from host_trainer.shards.order import epoch_order

MAX_OPEN_FILES = 64
STRETCH_BYTES = 8 << 20
#: Stretches that are taken to be in the page cache still.
MAX_STRETCHES = 64


class RawSample(NamedTuple):
    """A sample as it lies in a shard: where (for messages), and its members' contents by extension."""

    where: str
    parts: dict[str, bytes]


class ShardDataset:
    """What a ``torch.utils.data.DataLoader`` takes, its workers forked or spawned.

    A worker may open it anywhere: there may be fewer shards than workers, and no sample is lost or seen
    twice for it.
    """

    def __init__(self, spec: str) -> None:
        """Find the shards.

        Raises:
            TrainingError: one is missing, empty or damaged.
        """
        self.shards = index.find(spec)
        self._ends = np.cumsum([shard.count for shard in self.shards])
        self._disk = _Disk()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> RawSample:
        """Read a sample.

        Raises:
            IndexError: there is no such sample.
            TrainingError: the shard is damaged there.
        """
        if not 0 <= position < len(self):
            raise IndexError(position)
        number = int(np.searchsorted(self._ends, position, side="right"))
        shard = self.shards[number]
        row = position - (int(self._ends[number]) - shard.count)
        start, end = int(shard.starts[row]), int(shard.starts[row + 1])
        return _parsed(self._disk.read(shard.path, start, end - start), shard.path, start)

    def __getitems__(self, positions: Sequence[int]) -> list[RawSample]:
        """Read a batch, front to back in the shards, whatever order it is asked for in."""
        found = {position: self[position] for position in sorted(positions)}
        return [found[position] for position in positions]

    def order(self, seed: int, epoch: int) -> np.ndarray[Any, Any]:
        """The positions of an epoch, each sample once; see ``epoch_order``."""
        return epoch_order([shard.count for shard in self.shards], seed, epoch)


class _Disk:
    """Reads at given places, so that forked processes may share the files, and has what is around fetched.

    Samples of one window lie near each other and are asked for in a mixed order: the first one that falls
    into a stretch of a shard has the kernel read all of it, in one go.
    """

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        self._fetched: OrderedDict[tuple[Path, int], None] = OrderedDict()

    def read(self, path: Path, start: int, size: int) -> bytes:
        descriptor = self._open(path, start)
        self._fetch(path, descriptor, start // STRETCH_BYTES)
        return os.pread(descriptor, size, start)

    def _open(self, path: Path, start: int) -> int:
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
            return self._descriptors[path]
        if len(self._descriptors) >= MAX_OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        try:
            self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _damaged(path, start, str(error)) from error
        return self._descriptors[path]

    def _fetch(self, path: Path, descriptor: int, stretch: int) -> None:
        if (path, stretch) in self._fetched:
            return
        if len(self._fetched) >= MAX_STRETCHES:
            self._fetched.popitem(last=False)
        self._fetched[path, stretch] = None
        os.posix_fadvise(descriptor, stretch * STRETCH_BYTES, STRETCH_BYTES, os.POSIX_FADV_WILLNEED)

    def __getstate__(self) -> dict[str, Any]:
        return {"_descriptors": OrderedDict(), "_fetched": OrderedDict()}  # a spawned process opens its own

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def _parsed(content: bytes, path: Path, start: int) -> RawSample:
    key, parts = "", {}
    try:
        for name, data in files(content):
            named = index.split_name(name)
            if named is None:
                continue
            key, extension = named
            if extension in parts:
                raise _damaged(path, start, f"two members are called {name}")
            parts[extension] = data
    except tarfile.TarError as error:
        raise _damaged(path, start, str(error)) from error
    return RawSample(f"{path}, sample {key}", parts)


def _damaged(path: Path, start: int, why: str) -> TrainingError:
    return TrainingError(
        f"the shard {path} is damaged at byte {start}",
        why,
        "copy it again; if it was changed, delete its .idx",
    )
