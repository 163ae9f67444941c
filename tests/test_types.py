"""That the type checker knows TensorRT, and does not take it for anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

_MISTAKES = """
from device_agent.engines.tensorrt_module import TensorRt, load

def build(trt: TensorRt) -> None:
    trt.Bilder
    trt.BuilderFlag.FP17
    config = trt.Builder(trt.ILogger()).create_builder_config()
    config.DLA_core = "0"
    config.set_timing_cache(b"")
    config.set_flag(trt.BuilderFlag.FP16)

build(load("tensorrt"))
"""


def test_a_name_that_tensorrt_has_not_is_an_error(tmp_path: Path) -> None:
    """TensorRT's own names and types hold in ``make lint``: mistakes are found, and what is right passes."""
    script = tmp_path / "mistakes.py"
    script.write_text(_MISTAKES)
    said = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(script)],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    ).stdout  # fmt: skip
    lines = {int(line.split(":")[1]) for line in said.splitlines() if ": error: " in line}
    assert lines == {5, 6, 8, 9}, said
