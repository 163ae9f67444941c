"""Scaling over the GPUs of one host: samples per second on 1, 2, 4... of them, with DDP and FSDP2, in bf16.

python benchmarks/ddp_scaling.py [--json] [--quick]

Each process keeps its own share of samples, so that perfect scaling is as many times the rate of one
process, measured by the same script in the same call. Batches are on the device already, or come from
WebDataset shards on the disk. ``collectives`` is the time in which NCCL's kernels run, most of it beside the
computation; ``exposed`` is how much longer a step is for them. Without GPUs: small models on one and two CPU
processes, to see that it works. NVLink multicast stays off.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import document, finish, parse_options
from training.steps import Spec, measure
from training.synthetic import cases

MODELS = ("vit-b16", "bert-base")
#: The model whose scaling is the target: the one that computes most for each byte that it exchanges.
COMPUTE_BOUND = "vit-b16"
CLASSES, SIDE = 10, 256
WARMUP, STEPS = 6, 30
SHARD_BYTES = 32 << 20


def main() -> None:
    """Measure each arm on every number of processes."""
    options = parse_options(__doc__)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    gpus = _gpus()
    counts = [count for count in (1, 2, 4, 8) if count <= max(gpus, 2 if options.quick else 1)]
    warmup, steps = (2, 3) if options.quick else (WARMUP, STEPS)
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as temporary:
        per_process = cases(options.quick)[COMPUTE_BOUND].per_process
        images = max(counts) * per_process * (warmup + steps)  # an epoch is long enough for every arm
        spec = _write_shards(Path(temporary), max(images, 64))
        for model, strategy, data in _arms(spec):
            for count in counts:
                workers = 0 if not data else max(1, min(16, len(os.sched_getaffinity(0)) // count - 1))
                measured = Spec(
                    case=model, quick=options.quick, amp="bf16", strategy=strategy, data=data,
                    workers=workers, steps=steps, warmup=warmup, communication=count > 1,
                )  # fmt: skip
                row = _row(measure(measured, count), table)
                table.append(row)
                print({key: value for key, value in row.items() if value is not None}, file=sys.stderr)
    largest = counts[-1]
    efficiency = next(
        row["efficiency"]
        for row in table
        if (row["model"], row["strategy"], row["data"], row["processes"])
        == (COMPUTE_BOUND, "ddp", "synthetic", largest)
    )
    figures = {"largest": largest, "efficiency": efficiency, "table": table}
    targets = {"efficiency": (">=", 0.95)} if gpus > 1 else {}
    claim = "the compute-bound model keeps 0.95 of perfect scaling on the GPUs of one host"
    finish(document("ddp_scaling", claim, figures, targets, steps, table[0]["device"]), options.json)


def _arms(shards: str) -> list[tuple[str, str, str]]:
    arms = [(model, strategy, "") for model in MODELS for strategy in ("ddp", "fsdp")]
    return [*arms, (COMPUTE_BOUND, "ddp", shards)]


def _row(result: dict[str, Any], table: list[dict[str, Any]]) -> dict[str, Any]:
    spec, processes = result["spec"], result["processes"]
    row = {
        "model": spec["case"],
        "strategy": spec["strategy"],
        "data": "shards" if spec["data"] else "synthetic",
        "processes": processes,
        "device": result["device"],
        "step_ms": result["step_ms"],
        "samples_per_s": result["samples_per_s"],
        "waiting_for_data_fraction": result["waiting_for_data_fraction"],
        "peak_bytes": result["peak_bytes"],
        **{key: result.get(key) for key in ("collectives_ms", "collectives_fraction", "exposed_fraction")},
    }
    same = ("model", "strategy", "data")
    single = next((r for r in table if all(r[k] == row[k] for k in same) and r["processes"] == 1), row)
    row["efficiency"] = row["samples_per_s"] / (processes * single["samples_per_s"])
    return row


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _write_shards(root: Path, count: int) -> str:
    """Smooth noise as JPEG, as large as photographs that were made ready for training."""
    import numpy as np
    from PIL import Image

    from host_trainer.shards.writer import write

    generator = np.random.default_rng(0)
    for number in range(count):
        folder = root / "images" / f"class-{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        small = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    return write(root / "images", root / "shards", SHARD_BYTES).spec


if __name__ == "__main__":
    main()
