"""``edgekit check`` on the zoo's graphs against every profile: how long it takes, and what it finds.

    python benchmarks/check_zoo.py --python ZOO/bin/python --graphs DIR   exports what DIR lacks, then checks
    python benchmarks/check_zoo.py --python ZOO/bin/python --quick        one of every kind of graph

ZOO is the environment of ``zoo.py``. Only ``check`` itself is timed: reading a graph, lowering it for every
release of TensorRT, proving that by ONNX Runtime, and asking TensorRT-RTX's own parser.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import zoo
from common import document, finish

from edgekit import profile
from edgekit.check.verdicts import Verdict, check
from edgekit.errors import EdgekitError
from edgekit.models import load_model

EXPORT_LIMIT_S = 900
LIMIT_S = 600


def main() -> None:
    """Export, check, and print what came of it."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as temporary:
        folder = options.graphs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        reasons = {name: _export(options.python, name, folder) for name in zoo.names(options)}
        found = [_check(folder / f"{name}.onnx") for name, why in reasons.items() if why is None]
    not_exported = {name: why for name, why in reasons.items() if why is not None}
    finish(_summary(found, not_exported), options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the document only")
    parser.add_argument("--quick", action="store_true", help="one model of every kind of graph")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the zoo's environment")
    parser.add_argument("--graphs", type=Path, help="where graphs are kept; left out: they are not")
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    return parser.parse_args()


def _export(python: str, name: str, folder: Path) -> str | None:
    """Export a model, unless that was tried before; returns why there is no graph."""
    graph, reason = folder / f"{name}.onnx", folder / f"{name}.txt"
    if not graph.exists() and not reason.exists():
        print(f"exporting {name}", file=sys.stderr)
        command = [python, "-m", "benchmarks.menagerie.graphs", name, str(folder)]
        quiet = subprocess.DEVNULL
        try:
            subprocess.run(
                command, cwd=zoo.HERE.parent, env=zoo.environment(), timeout=EXPORT_LIMIT_S,
                stdout=quiet, stderr=quiet,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"it took more than {EXPORT_LIMIT_S} s"
    if graph.exists():
        return None
    return reason.read_text() if reason.exists() else "the process ended without a reason"


def _check(path: Path) -> dict[str, Any]:
    """All verdicts on one graph, and the seconds that they took."""
    devices = [profile.load(name) for name in profile.names()]
    verdicts: list[Verdict] = []
    failed = None
    began = time.perf_counter()
    try:
        verdicts = check(load_model(path), devices)
    except EdgekitError as error:
        failed = " ".join(str(error).split())
    seconds = time.perf_counter() - began
    print(f"checked {path.stem} in {seconds:.1f} s{': ' + failed if failed else ''}", file=sys.stderr)
    return {"name": path.stem, "seconds": seconds, "failed": failed, "verdicts": verdicts}


def _summary(found: list[dict[str, Any]], not_exported: dict[str, str]) -> dict[str, Any]:
    verdicts = [verdict for graph in found for verdict in graph["verdicts"]]
    answers = [(v.verdict != "refused", v.oracle.accepted) for v in verdicts if v.oracle is not None]
    asked = [(table, parser) for table, parser in answers if parser is not None]
    slowest = sorted(found, key=lambda graph: -graph["seconds"])[:5]
    figures = {
        "graphs": len(found),
        "profiles": len(profile.names()),
        "seconds": round(sum(graph["seconds"] for graph in found), 1),
        "slowest": {graph["name"]: round(graph["seconds"], 1) for graph in slowest},
        "verdicts": dict(Counter(verdict.verdict for verdict in verdicts)),
        "refused": dict(
            Counter(f"{r.op_type}: {r.why}" for v in verdicts for r in v.refused[:1]).most_common(20)
        ),
        "failed": {graph["name"]: graph["failed"] for graph in found if graph["failed"]},
        "rtx_unanswered": len(answers) - len(asked),
        "rtx_agreement_fraction": sum(a == b for a, b in asked) / len(asked) if asked else None,
        "not_exported": not_exported,
    }
    targets = {"graphs": (">=", 1), "seconds": ("<=", LIMIT_S)}
    claim = "a preflight of the whole zoo against every profile takes less than ten minutes"
    return document("check_zoo", claim, figures, targets, 1)


if __name__ == "__main__":
    main()
