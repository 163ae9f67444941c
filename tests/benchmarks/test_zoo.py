"""The zoo: models go from random weights to a pruned INT8 graph and an engine, each in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("hf-swin",)


def _zoo(results: Path, *names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/zoo.py", "--json", "--results", str(results), "--only", *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_windowed_attention_goes_from_end_to_end(tmp_path: Path) -> None:
    """It is pruned into the band, exported, quantized, compared and built; what is done stays done."""
    pytest.importorskip("tensorrt_rtx", reason="needs the wheel tensorrt-rtx-cu13")
    results = tmp_path / "zoo.jsonl"
    document = json.loads(_zoo(results, *MODELS).stdout)
    figures = document["figures"]
    assert figures["failures"] == {}
    assert (figures["end_to_end"], figures["sized"]) == (1.0, 1.0)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["model"] for line in lines] == list(MODELS)
    assert all(0.30 <= line["ratio"] <= 0.36 and line["quantized"] for line in lines)
    before = results.read_bytes()
    assert json.loads(_zoo(results, *MODELS).stdout)["figures"] == figures
    assert results.read_bytes() == before


def test_a_failure_has_its_reason_in_one_line(tmp_path: Path) -> None:
    """A model that cannot be built is a result with a step and a reason, not an end of the run."""
    results = tmp_path / "zoo.jsonl"
    ended = _zoo(results, "no-such-model")
    document = json.loads(ended.stdout)
    assert ended.returncode == 1
    assert document["figures"]["failures"] == {"no-such-model": "start: KeyError: 'no-such-model'"}
