"""Shards in training: two processes with two workers each see every sample as promised."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from host_trainer.shards.writer import write

SAMPLES = 50
#: Prints, for each epoch, the labels of each step that a process of ``world`` gets.
PROGRAM = """
import json, sys
from host_trainer.config import parse
from host_trainer.data import Share, open_training
spec, rank, world, starts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
config = parse({
    "run": "unused", "seed": 3, "model": {"source": "unused:unused"}, "parallel": {"device": "cpu"},
    "data": {"train": spec, "workers": 2, "image_size": 4}, "optimize": {"batch_size": 12},
}, "test")
loader = open_training(config, Share(12, 3, rank, world))
seen = [
    [[int(n) for part in step for n in part["labels"]] for step in loader.batches(epoch, first)]
    for epoch, first in starts
]
print(json.dumps(seen))
"""


def _data(tmp_path: Path) -> Path:
    rows = []
    for number in range(SAMPLES):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "label": number}) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(rows))
    return tmp_path / "data.jsonl"


def _start(spec: str, rank: int, world: int, starts: list[tuple[int, int]]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, spec, str(rank), str(world), json.dumps(starts)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _seen(process: subprocess.Popen[str]) -> list[list[list[int]]]:
    out, _ = process.communicate(timeout=250)
    assert process.returncode == 0
    result: list[list[list[int]]] = json.loads(out)
    return result


def _together(parts: list[Any]) -> list[list[int]]:
    """The steps of an epoch, from the processes' parts of each."""
    return [sorted(chain(*step)) for step in zip(*parts, strict=True)]


def test_two_processes_with_two_workers_see_every_sample_as_promised(tmp_path: Path) -> None:
    """Equal steps; no sample twice in an epoch; what one process alone would see; also from one shard.

    50 samples fill four steps of 12; another epoch has another order; a run goes on from any step.
    """
    data = _data(tmp_path)
    specs = [write(data, tmp_path / name, size).spec for name, size in (("many", 8_000), ("one", 1 << 20))]
    assert specs[0].endswith("}.tar")
    assert specs[1].endswith("shard-000000.tar")
    starts = [(0, 0), (1, 0), (1, 2)]
    for spec in specs:
        pair = [_start(spec, rank, 2, starts) for rank in range(2)]
        first, second = map(_seen, pair)
        [alone] = [_seen(_start(spec, 0, 1, starts))]
        assert [[len(step) for step in epoch] for epoch in first] == [[6] * 4, [6] * 4, [6] * 2]
        assert [[len(step) for step in epoch] for epoch in second] == [[6] * 4, [6] * 4, [6] * 2]
        epochs = [_together(list(parts)) for parts in zip(first, second, strict=True)]
        assert epochs == [[sorted(step) for step in epoch] for epoch in alone]
        for epoch in epochs[:2]:
            labels = list(chain(*epoch))
            assert len(set(labels)) == len(labels) == 48
            assert set(labels) <= set(range(SAMPLES))
        assert epochs[0] != epochs[1]
        assert epochs[2] == epochs[1][2:]
