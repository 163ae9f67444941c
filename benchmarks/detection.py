"""The detector example for three seeds: mAP lost, and the jitter of the served detector beside in process.

python benchmarks/detection.py [--json] [--quick]

The contract is size, drop and latency: a first run says what the original takes, a second, which finds the
first one's stages finished, must meet a p95 below the original's. What is served is of the first run: an
agent holds a bundle to its contract, and this machine has other things to do beside it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, document, finish, parse_options, report_of, run_module

from edgekit import bundle, ort, sign
from edgekit.bench.client import Client
from edgekit.bench.local_agent import running
from edgekit.deploy import local

SEEDS = (0, 1, 2)
REQUESTS, WARM_UP = 2000, 100
SIZE, MAX_DROP = 0.35, 0.012


def main() -> None:
    """Run the example's commands for each seed, and serve what they made."""
    options = parse_options(__doc__)
    seeds = SEEDS[:1] if options.quick else SEEDS
    requests = 200 if options.quick else REQUESTS
    rows = [_seed(seed, requests) for seed in seeds]
    figures = {key: [row[key] for row in rows] for key in rows[0]}
    targets = {
        "contract_met": ("==", True),
        "params_ratio": ("<=", SIZE),
        "map_drop": ("<=", MAX_DROP),
        "latency_p50_ratio": ("<=", 1.0),
    }
    claim = f"a detector at {SIZE} of its parameters in INT8 loses at most {MAX_DROP} of mAP"
    finish(document("detection", claim, figures, targets, requests), options.json)


def _seed(seed: int, requests: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as temporary:
        work = Path(temporary)
        training_s = _train(work, seed)
        first = _compress(work, seed, "plain")
        original = first["baseline"]["latency_ms"]
        report = _compress(work, seed, "contract", "--latency", f"p95:{original['p95']:.3f}ms")
        chosen, baseline = report["chosen"], report["baseline"]
        interval = chosen["metric_drop_interval"]
        row = {
            "training_s": training_s,
            "contract_met": report["contract"]["met"],
            "contract_missed": report["contract"]["unmet"],
            "params_ratio": chosen["params_ratio"],
            "original_map": baseline["metric"]["value"],
            "map_drop": chosen["metric_drop"],
            "map_drop_low": interval["low"],
            "map_drop_high": interval["high"],
            "precision": chosen["precision"],
            "size_ratio": chosen["size_ratio"],
            "latency_bound": report["contract"]["latency"],
            "latency_p95_ms": chosen["latency_ms"]["p95"],
            "latency_p50_ratio": chosen["latency_ms"]["p50"] / baseline["latency_ms"]["p50"],
            **_served(work, Path(first["bundle"]["file"]), requests),
        }
    print(json.dumps(row), file=sys.stderr)
    return row


def _train(work: Path, seed: int) -> float:
    """Make the scenes and train; seconds of the latter."""
    run_module("examples.detection.scenes", work / "scenes", "--seed", seed)
    begin = time.perf_counter()
    run_module("examples.detection.train", work / "scenes", work / "detector.safetensors", "--seed", seed)
    return time.perf_counter() - begin


def _compress(work: Path, seed: int, out: str, *contract: str) -> dict[str, Any]:
    scenes = work / "scenes"
    return report_of(
        "compress", "examples.detection.detector:build", "--weights", work / "detector.safetensors",
        "--profile", "x86-cpu", "--seed", seed, "--recipe", ROOT / "examples" / "detection" / "recipe.toml",
        "--train", scenes / "train.jsonl", "--calib", scenes / "calib.jsonl",
        "--eval", scenes / "held_out.jsonl", "--out", work / out, "--workdir", work / "work", *contract,
    )  # fmt: skip


def _served(work: Path, single: Path, requests: int) -> dict[str, float]:
    """Ask the agent and the same graphs in this process in turn, one image at a time."""
    with bundle.open_bundle(single) as opened:
        behind = (opened.directory / "postprocess.onnx").read_bytes()
        chain = ort.open_chain(opened.directory / "model.onnx", behind)
        with np.load(opened.directory / opened.manifest.golden.inputs) as stored:
            images = stored["image"]
    (work / "keys").mkdir()
    private, public = sign.keygen(work / "release")
    shutil.move(public, work / "keys" / public.name)
    sign.sign(single, private)
    served_ms, here_ms = [], []
    with running(work, work / "keys") as agent:
        deployed = local.deploy(single, agent.control, lambda _: None)
        with Client(agent.host, agent.port, deployed.name, ["detections"]) as client:
            for number in range(WARM_UP + requests):
                image = images[number % len(images)][None]
                _, took_ms = client.infer({"image": image})
                served_ms.append(took_ms)
                begin = time.perf_counter()
                chain.run({"image": image})
                here_ms.append((time.perf_counter() - begin) * 1e3)
    served, here = np.quantile(served_ms[WARM_UP:], (0.5, 0.99)), np.quantile(here_ms[WARM_UP:], (0.5, 0.99))
    return {
        "served_p50_ms": float(served[0]),
        "served_p99_ms": float(served[1]),
        "jitter_served": float(served[1] / served[0]),
        "jitter_in_process": float(here[1] / here[0]),
        "served_over_in_process_p50": float(served[0] / here[0]),
    }


if __name__ == "__main__":
    main()
