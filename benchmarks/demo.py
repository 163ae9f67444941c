"""The demo for three seeds: what compression gains and loses, measured beside the original in one process.

python benchmarks/demo.py [--json] [--quick] [--work DIR]

Each seed is then compressed once more under a latency contract: half of the p95 that was measured of the
original. ``--work`` keeps what was trained and computed, as ``edgekit demo --out`` does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from common import document, finish, options_parser, report_of

SEEDS = (0, 1, 2)
SIZE, MAX_DROP = 0.35, 0.012
#: Of the original's p95: the latency that the contract asks for.
LATENCY_SHARE = 0.5


def main() -> None:
    """Run ``edgekit demo`` for each seed in a fresh directory."""
    parser = options_parser(__doc__)
    parser.add_argument("--work", type=Path, help="keep everything there, and go on with it")
    options = parser.parse_args()
    seeds = SEEDS[:1] if options.quick else SEEDS
    reports, contracts = [], []
    for seed in seeds:
        with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as temporary:
            out = (options.work or Path(temporary)).resolve()
            reports.append(_demo(seed, out))
            contracts.append(_under_contract(seed, out, reports[-1]["baseline"]["latency_ms"]["p95"]))
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
        "contract": [report["contract"]["latency"] for report in contracts],
        "contract_p95_ms": [report["chosen"]["latency_ms"]["p95"] for report in contracts],
        "contract_met": [report["contract"]["met"] for report in contracts],
    }
    targets = {
        "params_ratio": ("<=", 0.35),
        "metric_drop": ("<=", 0.012),
        "latency_p50_ratio": ("<=", 0.42),
        "original_p50_ms": (">=", 2.0),
        "identical_share": ("==", 1.0),
        "contract_met": ("==", True),
    }
    claim = (
        "a third of the parameters, INT8, no more than 0.012 of accuracy lost, at most 0.42 of the latency"
    )
    runs = reports[0]["chosen"]["latency_ms"]["runs"]
    finish(document("demo", claim, figures, targets, runs), options.json)


def _demo(seed: int, out: Path) -> dict[str, Any]:
    return report_of("demo", "--seed", seed, "--out", out)


def _under_contract(seed: int, out: Path, original_p95_ms: float) -> dict[str, Any]:
    home = out / f"seed-{seed}"
    return report_of(
        "compress", "edgekit.demo.digits:build", "--weights", home / "digits.safetensors",
        "--profile", "x86-cpu", "--calib", home / "calib.npz", "--eval", home / "held_out.npz",
        "--seed", seed,
        "--size", SIZE, "--max-drop", MAX_DROP, "--latency", f"p95:{LATENCY_SHARE * original_p95_ms:.3f}ms",
        "--out", out / "contract", "--workdir", out / "work",
    )  # fmt: skip


def _p50(figures: dict[str, Any]) -> float:
    return float(figures["latency_ms"]["p50"])


if __name__ == "__main__":
    main()
