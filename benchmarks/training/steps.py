"""Times steps of the trainer in processes of their own: memory is counted from zero, and torchrun is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Spec:
    """What is timed.

    Attributes:
        case: a name in ``synthetic``.
        quick: the small case.
        way: ``trainer``, or ``hand``: a minimal loop on one process that does the same.
        amp: no, bf16 or fp16.
        activation_checkpointing: whether activations are computed twice.
        strategy: ddp or fsdp.
        data: shards to read; empty: batches that are on the device already.
        workers: processes that read them.
        warmup: steps before the clock starts.
        steps: timed steps.
        communication: also find out what the processes' exchange costs.
    """

    case: str
    quick: bool = False
    way: str = "trainer"
    amp: str = "no"
    activation_checkpointing: bool = False
    strategy: str = "ddp"
    data: str = ""
    workers: int = 0
    warmup: int = 5
    steps: int = 30
    communication: bool = False


def measure(spec: Spec, processes: int = 1, gpu: int | None = None) -> dict[str, Any]:
    """Run a spec in ``processes`` processes of this machine, on one given GPU where ``gpu`` names it."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}:{os.environ.get('PYTHONPATH', '')}",
    }
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    worker = [*(launcher if processes > 1 else []), str(HERE / "step_worker.py"), json.dumps(asdict(spec))]
    done = subprocess.run([sys.executable, *worker], env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{spec} failed")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
