"""Mixed precision and activation checkpointing on a GPU: time and peak memory of a step against plain fp32.

python benchmarks/gpu/trainer_precision.py [--json] [--quick]

TF32 is off, so that fp32 is fp32. Every way is timed in processes of its own that take turns. ``hand`` is a
minimal loop in bf16 that never waits for the GPU: what the trainer's watching costs.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import document, finish, parse_options
from training.steps import Spec, measure

MODELS = ("bert-base", "resnet50")
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"amp": "bf16"},
    "fp16": {"amp": "fp16"},
    "bf16_recomputed": {"amp": "bf16", "activation_checkpointing": True},
    "hand_bf16": {"amp": "bf16", "way": "hand"},
}


def main() -> None:
    """Time every way of every model in turns, and compare."""
    options = parse_options(__doc__)
    runs, steps = (1, 3) if options.quick else (2, 30)
    ways = {name: way for name, way in WAYS.items() if not options.quick or name != "fp16"}
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(runs):
        for model in MODELS[:1] if options.quick else MODELS:
            for name, way in ways.items():
                result = measure(Spec(case=model, quick=options.quick, steps=steps, **way), gpu=0)
                found.setdefault(f"{model} {name}", []).append(result)
                print(f"{model} {name} {result['step_ms']:.2f} ms {result['peak_bytes']}", file=sys.stderr)
    figures: dict[str, Any] = {}
    for key, results in found.items():
        figures[f"{key} step_ms"] = statistics.median(result["step_ms"] for result in results)
        figures[f"{key} peak_bytes"] = results[0]["peak_bytes"]
    models = sorted({key.split()[0] for key in found})
    figures |= {
        "bf16_speedup": [figures[f"{m} fp32 step_ms"] / figures[f"{m} bf16 step_ms"] for m in models],
        "over_hand": [figures[f"{m} hand_bf16 step_ms"] / figures[f"{m} bf16 step_ms"] for m in models],
        "memory_ratio_bf16": [_ratio(figures, m, "bf16") for m in models],
        "memory_ratio_bf16_recomputed": [_ratio(figures, m, "bf16_recomputed") for m in models],
        "models": models,
    }
    targets = {
        "bf16_speedup": (">=", 1.74),
        "memory_ratio_bf16_recomputed": ("<=", 0.6),
        "over_hand": (">=", 0.97),
    }
    claim = "bf16 is 1.74 times as fast as fp32; with activation checkpointing the peak memory is 40% less"
    device = next(iter(found.values()))[0]["device"]
    finish(
        document("trainer_precision", claim, figures, {} if options.quick else targets, runs, device),
        options.json,
    )


def _ratio(figures: dict[str, Any], model: str, way: str) -> float | None:
    whole = figures[f"{model} fp32 peak_bytes"]
    return figures[f"{model} {way} peak_bytes"] / whole if whole else None


if __name__ == "__main__":
    main()
