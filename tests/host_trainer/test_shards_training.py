"""Shards in training: two processes with two workers each see every sample as promised."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

from PIL import Image

from host_trainer.shards.writer import write

SAMPLES = 50
#: Prints, for each name of shards and each (epoch, first step), the labels of the steps that a process gets.
PROGRAM = """
import json, sys
from host_trainer.config import parse
from host_trainer.data import Share, open_training
rank, world, starts = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
seen = []
for spec in sys.argv[4:]:
    config = parse({
        "run": "unused", "seed": 3, "model": {"source": "unused:unused"}, "parallel": {"device": "cpu"},
        "data": {"train": spec, "workers": 2, "image_size": 4}, "optimize": {"batch_size": 12},
    }, "test")
    loader = open_training(config, Share(12, 3, rank, world))
    seen.append([
        [[int(n) for part in step for n in part["labels"]] for step in loader.batches(epoch, first)]
        for epoch, first in starts
    ])
print(json.dumps(seen))
"""
Epoch = list[list[int]]


def _data(tmp_path: Path) -> Path:
    rows = []
    for number in range(SAMPLES):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "label": number}) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(rows))
    return tmp_path / "data.jsonl"


def _start(rank: int, world: int, starts: list[tuple[int, int]], specs: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(rank), str(world), json.dumps(starts), *specs]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _seen(process: subprocess.Popen[str]) -> list[list[Epoch]]:
    out, _ = process.communicate(timeout=250)
    assert process.returncode == 0
    result: list[list[Epoch]] = json.loads(out)
    return result


def _together(first: Epoch, second: Epoch) -> Epoch:
    """The steps of an epoch, from the two processes' parts of each."""
    return [sorted(mine + theirs) for mine, theirs in zip(first, second, strict=True)]


def test_two_processes_with_two_workers_see_every_sample_as_promised(tmp_path: Path) -> None:
    """Equal steps; no sample twice in an epoch; what one process alone would see; also from one shard.

    50 samples fill four steps of 12; another epoch has another order; a run goes on from any step.
    """
    data = _data(tmp_path)
    specs = [write(data, tmp_path / name, size).spec for name, size in (("many", 8_000), ("one", 1 << 20))]
    assert specs[0].endswith("}.tar")
    assert specs[1].endswith("shard-000000.tar")
    starts = [(0, 0), (1, 0), (1, 2)]
    processes = [_start(rank, world, starts, specs) for rank, world in ((0, 2), (1, 2), (0, 1))]
    for first, second, alone in zip(*map(_seen, processes), strict=True):
        for part in (first, second):
            assert [[len(step) for step in epoch] for epoch in part] == [[6] * 4, [6] * 4, [6] * 2]
        epochs = [_together(*parts) for parts in zip(first, second, strict=True)]
        assert epochs == [[sorted(step) for step in epoch] for epoch in alone]
        for epoch in epochs[:2]:
            labels = list(chain(*epoch))
            assert len(set(labels)) == len(labels) == 48
            assert set(labels) <= set(range(SAMPLES))
        assert epochs[0] != epochs[1]
        assert epochs[2] == epochs[1][2:]
