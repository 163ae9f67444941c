"""What every benchmark shares: its options and the one document that it prints."""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# A checkout needs no installation: a GPU machine may reach no index.
sys.path.append(str(ROOT))

#: Exit code of a command that misses its contract.
_MISSED = 3

Figures = Mapping[str, Any]
#: Figure -> (comparison, bound), such as ("<=", 0.42).
Targets = Mapping[str, tuple[str, float]]

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq,
}  # fmt: skip


def options_parser(description: str) -> argparse.ArgumentParser:
    """``--json`` and ``--quick``, which every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print the document only")
    parser.add_argument("--quick", action="store_true", help="fewer runs, to see that it works")
    return parser


def parse_options(description: str) -> argparse.Namespace:
    """The options, where a benchmark has no others."""
    return options_parser(description).parse_args()


def report_of(*arguments: object) -> dict[str, Any]:
    """The report of an edgekit command; also where the contract is missed, which the figures say then."""
    command = [sys.executable, "-m", "edgekit.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE)
    if done.returncode not in (0, _MISSED):
        sys.exit(f"edgekit {arguments[0]} ended with {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def run_module(module: str, *arguments: object) -> None:
    """Run one of the repository's modules as a command; what it prints is progress here."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def document(
    name: str, claim: str, figures: Figures, targets: Targets, runs: int, gpu: str | None = None
) -> dict[str, Any]:
    """The document: a target is met when its figure, or every figure of a list, holds against its bound."""
    met = all(_holds(figures[key], *target) for key, target in targets.items())
    return {
        "name": name,
        "claim": claim,
        "figures": dict(figures),
        "targets": {key: f"{comparison} {bound:g}" for key, (comparison, bound) in targets.items()},
        "met": met,
        "runs": runs,
        "conditions": {"cpu": _cpu(), "gpu": gpu, "versions": _versions()},
    }


def finish(result: Mapping[str, Any], as_json: bool) -> None:
    """Print the document, and exit 1 where a target is missed."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['name']}: {result['claim']}")
        for key, value in result["figures"].items():
            print(f"  {key:<42} {_shown(value)}   {result['targets'].get(key, '')}")
        print(
            f"  {'met' if result['met'] else 'NOT MET'}, {result['runs']} runs, {result['conditions']['cpu']}"
        )
    sys.exit(0 if result["met"] else 1)


def _holds(figure: Any, comparison: str, bound: float) -> bool:
    values = figure if isinstance(figure, list) else [figure]
    return all(value is not None and _COMPARE[comparison](value, bound) for value in values)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            name = next(line.partition(":")[2].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} CPUs"


def _versions() -> dict[str, str]:
    installed = {}
    for name in ("edgekit", "torch", "onnx", "onnxruntime", "numpy"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **installed}
