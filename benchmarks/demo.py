"""The demo for three seeds: what compression gains and loses, measured beside the original in one process.

python benchmarks/demo.py [--json] [--quick]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from statistics import median
from typing import Any

from common import document, finish, parse_options

SEEDS = (0, 1, 2)


def main() -> None:
    """Run ``edgekit demo`` for each seed in a fresh directory."""
    options = parse_options(__doc__)
    seeds = SEEDS[:1] if options.quick else SEEDS
    reports = [_demo(seed) for seed in seeds]
    figures: dict[str, Any] = {
        "params_ratio": [report["chosen"]["params_ratio"] for report in reports],
        "metric_drop": [report["chosen"]["metric_drop"] for report in reports],
        "original_metric": [report["baseline"]["metric"]["value"] for report in reports],
        "latency_p50_ratio": [_p50(report["chosen"]) / _p50(report["baseline"]) for report in reports],
        "original_p50_ms": [_p50(report["baseline"]) for report in reports],
        "precision": [report["chosen"]["precision"] for report in reports],
        "size_ratio": [report["chosen"]["size_ratio"] for report in reports],
        "identical_share": [
            report["served"]["identical"] / report["served"]["requests"] for report in reports
        ],
        "served_p50_ms": [report["served"]["p50_ms"] for report in reports],
        "median_latency_p50_ratio": median(_p50(r["chosen"]) / _p50(r["baseline"]) for r in reports),
    }
    targets = {
        "params_ratio": ("<=", 0.35),
        "metric_drop": ("<=", 0.012),
        "latency_p50_ratio": ("<=", 0.42),
        "original_p50_ms": (">=", 2.0),
        "identical_share": ("==", 1.0),
    }
    claim = (
        "a third of the parameters, INT8, no more than 0.012 of accuracy lost, at most 0.42 of the latency"
    )
    runs = reports[0]["chosen"]["latency_ms"]["runs"]
    finish(document("demo", claim, figures, targets, runs), options.json)


def _demo(seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as out:
        command = [sys.executable, "-m", "edgekit.cli", "demo", "--seed", str(seed), "--out", out, "--json"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        report: dict[str, Any] = json.loads(done.stdout)
        return report


def _p50(figures: dict[str, Any]) -> float:
    return float(figures["latency_ms"]["p50"])


if __name__ == "__main__":
    main()
