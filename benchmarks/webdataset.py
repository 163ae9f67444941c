"""Shards against a folder of files: what a loader keeps in memory, and how fast it reads from the disk.

python benchmarks/webdataset.py [--json] [--quick] [--directory DIR]

Both hold the same samples, read by a torch DataLoader with two workers in a drawn order. Memory is what the
processes of a loader hold (PSS) beyond those of a loader without data, for many small samples: it is the
number that counts. Rates are taken of samples as large as ImageNet's mean (110 kB) with a cold page cache,
beside one sequential read of the same bytes on the same disk. Samples are random bytes: reading is measured,
and no decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import document, finish, options_parser

from host_trainer.shards.reader import ShardDataset
from host_trainer.shards.writer import write

WORKERS = 2
CLASSES = 10
#: Number of samples and bytes of each: for memory, and for rates.
MANY, LARGE = (100_000, 1_000), (5_000, 110_000)
SHARD_BYTES = 64 << 20
BLOCK_BYTES = 4 << 20
BATCH = 32


class Files:
    """The plain alternative: a list of (path, label), as torchvision's ImageFolder keeps it."""

    def __init__(self, root: str) -> None:
        self._samples = [
            (str(path), label)
            for label, folder in enumerate(sorted(Path(root).iterdir()))
            for path in sorted(folder.iterdir())
        ]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, position: int) -> int:
        path, label = self._samples[position]
        with open(path, "rb") as stream:
            return len(stream.read()) if label >= 0 else 0

    def order(self, seed: int, epoch: int) -> list[int]:
        """A permutation of everything, as torch's RandomSampler makes it."""
        drawn: list[int] = np.random.default_rng((seed, epoch)).permutation(len(self)).tolist()
        return drawn


class Shards:
    """Ours; gives sizes, so that no content travels between processes."""

    def __init__(self, spec: str) -> None:
        self._dataset = ShardDataset(spec)
        self.order = self._dataset.order

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, positions: Sequence[int]) -> list[int]:
        return [len(sample.parts["jpg"]) for sample in self._dataset.__getitems__(positions)]


class Nothing:
    """No data: what any loader with workers holds."""

    def __init__(self, count: str) -> None:
        self._count = int(count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> int:
        return position

    def order(self, seed: int, epoch: int) -> range:
        """As they come."""
        return range(self._count)


ARMS = {"files": Files, "shards": Shards, "nothing": Nothing}


def main() -> None:
    """Write the data, read it in child processes that take turns."""
    parser = options_parser(__doc__)
    parser.add_argument("--directory", type=Path, help="on the disk to be measured")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return _child(*options.child)
    many, large, runs = ((2000, 1000), (500, 110_000), 1) if options.quick else (MANY, LARGE, 3)
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-", dir=options.directory) as temporary:
        held = _Samples(Path(temporary) / "many", *many)
        read = _Samples(Path(temporary) / "large", *large)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
        disk: list[float] = []
        for _ in range(runs):
            disk.append(_sequential_rate(read.root))
            for name in ARMS:
                memory, rate = held.read(name), read.read(name)
                found[name].append({"held_bytes": memory["held_bytes"], "mb_per_s": rate["mb_per_s"]})
        figures = _figures(found, disk, many[0], large[1])
    targets = {"memory_ratio": ("<=", 0.37), "rate_over_files": (">=", 1.0)}
    claim = "shards take at most 0.37 of the memory that a folder of files takes, and are read no slower"
    finish(document("webdataset", claim, figures, targets, runs), options.json)
    return None


class _Samples:
    """The same samples as files and as shards, below ``root``."""

    def __init__(self, root: Path, count: int, size: int) -> None:
        self.root = root
        _make_files(root / "files", count, size)
        shards = write(root / "files", root / "shards", SHARD_BYTES).spec
        self._arms = {"nothing": str(count), "files": str(root / "files"), "shards": shards}

    def read(self, name: str) -> dict[str, float]:
        """One epoch in a process of its own, with a cold page cache."""
        _forget(self.root.rglob("*.jpg") if name == "files" else self.root.rglob("*.tar"))
        return _in_child(name, self._arms[name])


def _figures(
    found: dict[str, list[dict[str, float]]], disk: list[float], count: int, size: int
) -> dict[str, Any]:
    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in found[name])

    sequential = statistics.median(disk)
    figures: dict[str, Any] = {
        "samples_held": count, "sample_read_bytes": size, "workers": WORKERS,
        "disk_sequential_mb_per_s": sequential, "loader_held_bytes": median("nothing", "held_bytes"),
    }  # fmt: skip
    growth = {}
    for name in ("files", "shards"):
        growth[name] = median(name, "held_bytes") - figures["loader_held_bytes"]
        figures |= {
            f"{name}_mb_per_s": median(name, "mb_per_s"),
            f"{name}_share_of_sequential": median(name, "mb_per_s") / sequential,
            f"{name}_samples_per_s": median(name, "mb_per_s") * 1e6 / size,
            f"{name}_growth_bytes": growth[name],
            f"{name}_bytes_per_sample": growth[name] / count,
        }
    return figures | {
        "memory_ratio": growth["shards"] / growth["files"],
        "rate_over_files": median("shards", "mb_per_s") / median("files", "mb_per_s"),
    }


def _make_files(root: Path, count: int, size: int) -> None:
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (root / f"class-{label}").mkdir(parents=True)
    for number in range(count):
        path = root / f"class-{number % CLASSES}" / f"image-{number:09d}.jpg"
        path.write_bytes(rng.bytes(size))
    os.sync()


def _forget(paths: Iterable[Path]) -> None:
    """Drop what the page cache holds of them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _sequential_rate(root: Path) -> float:
    """Megabytes a second of the shards read front to back, one after the other."""
    paths = sorted(root.rglob("*.tar"))
    _forget(paths)
    began, read = time.perf_counter(), 0
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while block := stream.read(BLOCK_BYTES):
                read += len(block)
    return read / (time.perf_counter() - began) / 1e6


def _in_child(name: str, where: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, where], check=True, stdout=subprocess.PIPE
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _child(name: str, where: str) -> None:
    """Read one epoch; what the processes hold is measured near its end, while the workers live."""
    from torch.utils.data import DataLoader

    began, read, held = time.perf_counter(), 0, 0
    data: Any = ARMS[name](where)
    loader: DataLoader[Any] = DataLoader(
        data, batch_size=BATCH, sampler=data.order(0, 0), num_workers=WORKERS
    )
    arriving: Any = iter(loader)
    measured_at = len(loader) - 4 * WORKERS
    for step, sizes in enumerate(arriving):
        read += int(sizes.sum())
        if step == measured_at:
            held = _held_bytes([os.getpid(), *(worker.pid for worker in arriving._workers)])
    seconds = time.perf_counter() - began
    print(json.dumps({"mb_per_s": read / seconds / 1e6, "held_bytes": held}))


def _held_bytes(pids: Iterable[int]) -> int:
    """Proportional set size of processes: pages that they share count once."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) << 10
    return total


if __name__ == "__main__":
    main()
