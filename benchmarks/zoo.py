"""Every torchvision builder and transformers of all kinds, from random weights to INT8 and an engine.

    python benchmarks/zoo.py --python ZOO/bin/python --results zoo.jsonl      (goes on where it stopped)
    python benchmarks/zoo.py --python ZOO/bin/python --quick                  one of every kind of graph

ZOO is an environment of its own, since torchvision needs another torch than edgekit:

    pip install torch==2.14.1 torchvision==0.29.1 transformers onnx onnxscript onnxruntime tensorrt-rtx-cu13 \
        pydantic safetensors

Each model runs in a process of its own (``menagerie/worker.py``), with limits of time and memory; every
failure has its reason in one line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from common import document, finish

CPU_LIMIT_S = 900  # of processor time, so that a busy machine makes no failures
_CPU_LIMITS_S = (CPU_LIMIT_S, CPU_LIMIT_S + 5)
WALL_LIMIT_S = 3600
MEMORY_BYTES = 16 * 2**30  # the exporter holds the largest, of 0.6 billion parameters, several times
SMALLEST, LARGEST = 0.30, 0.36
GOOD_COSINE = 0.99
HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run what has no result yet, and print the summary."""
    options = _options()
    wanted = names(options)
    done = {line["model"]: line for line in _read(options.results)}
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(_run, options.python, name) for name in wanted if name not in done]
        try:
            for run in as_completed(runs):
                line = run.result()
                done[line["model"]] = line
                with options.results.open("a") as stream:
                    stream.write(json.dumps(line) + "\n")
                print(_shown(line), file=sys.stderr)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    lines = [done[name] for name in wanted]
    finish(_summary(lines), options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the document only")
    parser.add_argument("--quick", action="store_true", help="one model of every kind of graph")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the zoo's environment")
    parser.add_argument("--results", type=Path, default=Path("zoo.jsonl"), help="JSON lines, one a model")
    parser.add_argument("--jobs", type=int, default=1, help="how many models at a time")
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    return parser.parse_args()


def names(options: argparse.Namespace) -> list[str]:
    """What was asked for, of what the zoo's environment can build."""
    chosen = "z.DOZEN" if options.quick else "z.subjects()"
    script = (
        f"from benchmarks.menagerie import models as z; print(*(n for n in {chosen} if n in z.subjects()))"
    )
    return options.only or _call(options.python, "-c", script).split()


def _call(python: str, *arguments: str) -> str:
    return subprocess.run(
        [python, *arguments], cwd=HERE.parent, env=environment(), check=True, capture_output=True, text=True
    ).stdout


def environment() -> dict[str, str]:
    """Of processes in the zoo's environment."""
    return {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(python: str, name: str) -> dict[str, Any]:
    """One model in a process of its own; what it said last, and why it ended if it was stopped."""
    with tempfile.TemporaryFile("w+") as said:  # a pipe that nobody reads holds 64 KiB, and then the worker
        worker = subprocess.Popen(
            [python, "-m", "benchmarks.menagerie.worker", name],
            cwd=HERE.parent,
            env=environment(),
            stdout=said,
            stderr=subprocess.DEVNULL,
        )
        resource.prlimit(worker.pid, resource.RLIMIT_CPU, _CPU_LIMITS_S)
        why = _watch(worker)
        said.seek(0)
        lines = said.read().splitlines()
    facts: dict[str, Any] = json.loads(lines[-1]) if lines else {"model": name, "step": "start"}
    if worker.returncode == -signal.SIGXCPU:
        why = f"took more than {CPU_LIMIT_S} s of processor time"
    if facts["step"] != "done" and "why" not in facts:
        facts["why"] = why or f"the process ended with {worker.returncode}"
    return facts


def _watch(worker: subprocess.Popen[bytes]) -> str | None:
    """Wait for a worker; why it was killed, if it was."""
    why, began = None, time.monotonic()
    while worker.poll() is None:
        time.sleep(0.2)
        if time.monotonic() - began > WALL_LIMIT_S:
            why = f"took more than {WALL_LIMIT_S} s"
        elif _resident_bytes(worker.pid) > MEMORY_BYTES:
            why = f"took more than {MEMORY_BYTES / 2**30:g} GiB"
        if why:
            worker.kill()
            worker.wait()
    return why


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _shown(line: dict[str, Any]) -> str:
    if line["step"] != "done":
        return f"{line['model']}: stopped at {line['step']}: {line['why']}"
    return f"{line['model']}: {line['ratio']:.3f} of the parameters, cosine {line['cosine']:.4f}"


def _summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    passed = [line for line in lines if line["step"] == "done"]
    compared = [line["cosine"] for line in lines if "cosine" in line]
    wanted = [line for line in lines if line.get("prunable", 1.0) > 0.5]
    sized = [line for line in wanted if SMALLEST <= line.get("ratio", 1.0) <= LARGEST]
    figures = {
        "models": len(lines),
        "end_to_end": len(passed) / len(lines),
        "cosine_at_least_0.99": sum(cosine >= GOOD_COSINE for cosine in compared) / max(1, len(compared)),
        "cosine_worst": min(compared, default=None),
        "sized": len(sized) / max(1, len(wanted)),
        "failures": {
            line["model"]: f"{line['step']}: {line['why']}" for line in lines if line["step"] != "done"
        },
        "cosine_below_0.99": {x["model"]: x["cosine"] for x in lines if x.get("cosine", 1.0) < GOOD_COSINE},
        "ratio_outside": {x["model"]: x.get("ratio") for x in wanted if x not in sized},
    }
    targets = {"end_to_end": (">=", 0.97), "cosine_at_least_0.99": (">=", 0.95), "sized": (">=", 1.0)}
    claim = "models of every kind go from torch to a pruned INT8 graph that runs and that TensorRT-RTX builds"
    return document("zoo", claim, figures, targets, len(lines))


if __name__ == "__main__":
    main()
